"""What the author of a handler writes: options, routes and versions, handler objects, decorators."""

import contextlib
import logging
from datetime import UTC, datetime

import pytest
from django.db import IntegrityError, OperationalError, connection, transaction

from events_outbox import (
    Consumer,
    FailureGuard,
    PermanentEventError,
    RetryPolicy,
    emit_event,
    logged,
    register_event,
    retrying,
    upcasts,
)
from events_outbox.conf import outbox_settings
from events_outbox.consumer import ConsumerProcess, ConsumerStopped
from events_outbox.exceptions import DuplicateRegistration, InvalidEventType, UnknownEventType
from events_outbox.handlers import call_handler, current_event
from events_outbox.models import OutboxEvent
from events_outbox.proto.base_event_pb2 import BaseEvent
from events_outbox.testing import handle_now, make_event
from monitoring import context
from voicehelper.identity.models import Tenant
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload, MessageSentPayload
from voicehelper.proto.identity_pb2 import UserRegisteredPayload

QUICK = RetryPolicy(initial_delay_seconds=0)
SHOP = "shop.order.placed"


@pytest.fixture
def versions(own_catalog):
    """An event type in three versions of different messages, and upcasters v1 -> v2 -> v3."""
    register_event(SHOP, ConversationCreatedPayload, "v1")
    register_event(SHOP, MessageSentPayload, "v2")
    register_event(SHOP, UserRegisteredPayload, "v3")
    upcasts(SHOP, "v1", to="v2")(lambda old: MessageSentPayload(content=f"{old.title}>2"))
    upcasts(SHOP, "v2", to="v3")(lambda old: UserRegisteredPayload(username=f"{old.content}>3"))


def emit_order(version="v1", **fields):
    payload = {
        "v1": ConversationCreatedPayload(title="1"),
        "v2": MessageSentPayload(content="2"),
        "v3": UserRegisteredPayload(username="3"),
    }[version]
    with transaction.atomic():
        return emit_event(SHOP, payload, event_version=version, **{"aggregate_id": "o1", "tenant_id": "t1", **fields})


class TestOptions:
    def test_defaults(self, make_consumer):
        consumer = make_consumer(retry=None)
        assert (consumer.start_at, consumer.on_failure) == ("earliest", "skip")
        assert consumer.guard == FailureGuard(max_failed_share=0.5, window_events=100)
        assert consumer.retry.delays_seconds() == [0.1, 0.2, 0.4]

    def test_given_ones_are_kept(self, make_consumer):
        start = datetime(2026, 1, 31, tzinfo=UTC)
        consumer = make_consumer(start_at=start, guard=None, topics=("a.events",))
        assert (consumer.start_at, consumer.guard, consumer.topics) == (start, None, ["a.events"])

    def test_the_size_of_its_batches(self, make_consumer):
        assert ConsumerProcess(make_consumer(batch_size=3))._batch_size == 3
        assert ConsumerProcess(make_consumer(batch_size=3), batch_size=7)._batch_size == 7  # the command line's
        assert ConsumerProcess(make_consumer())._batch_size == outbox_settings().CONSUMER_BATCH_SIZE

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"start_at": "beginning"}, "earliest"),
            ({"start_at": datetime(2026, 1, 31)}, "time zone"),
            ({"on_failure": "explode"}, "park_key"),
            ({"batch_size": 0}, "batch_size"),
            ({"batch_size": True}, "batch_size"),
            ({"guard": 0.5}, "FailureGuard"),
            ({"guard": True}, "FailureGuard"),
            ({"retry": 3}, "RetryPolicy"),
            ({"topics": "conversation.events"}, "list of topics"),
            ({"topics": []}, "list of topics"),
            ({"topics": ["a b"]}, "no name of a topic"),
            ({"group_id": ""}, "group_id"),
            ({"name": "Analytics"}, "lower-case"),
        ],
    )
    def test_wrong_ones_are_refused_with_a_reason(self, options, says):
        with pytest.raises((ValueError, TypeError), match=says):
            Consumer(**{"name": "never", "group_id": "g", **options})
        Consumer("never", "g")  # nothing was registered
        from events_outbox import handlers

        handlers._consumers.pop("never")

    @pytest.mark.parametrize(
        "values",
        [
            {"max_retries": -1},
            {"max_retries": 1.5},
            {"max_retries": True},
            {"initial_delay_seconds": -0.1},
            {"initial_delay_seconds": float("nan")},
            {"initial_delay_seconds": "0.1"},
            {"multiplier": 0.5},
            {"multiplier": float("inf")},
            {"max_delay_seconds": -1},
            {"jitter": -0.1},
            {"jitter": 1.1},
            {"jitter": None},
        ],
    )
    def test_retry_policies_out_of_range(self, values):
        with pytest.raises(ValueError, match=next(iter(values))):
            RetryPolicy(**values)

    @pytest.mark.parametrize(
        "values",
        [{"max_failed_share": 1}, {"max_failed_share": -0.1}, {"window_events": 0}, {"window_events": 1.0}],
    )
    def test_guards_out_of_range(self, values):
        with pytest.raises(ValueError, match=next(iter(values))):
            FailureGuard(**values)

    def test_delays_are_capped_however_many_there_are(self):
        delays = RetryPolicy(max_retries=5000, max_delay_seconds=1).delays_seconds()
        assert delays[:5] == [0.1, 0.2, 0.4, 0.8, 1] and delays[-1] == 1

    def test_jitter_takes_up_to_its_share_off(self):
        policy = RetryPolicy(max_retries=1000, multiplier=1, initial_delay_seconds=1, jitter=0.25)
        delays = policy.delays_seconds()
        assert 0.75 <= min(delays) < 0.76 and 0.99 < max(delays) <= 1
        assert delays != policy.delays_seconds()


class TestRoutes:
    @pytest.mark.parametrize(
        ("registered", "routes"),
        [
            ([None], {"v1": (None, "v3"), "v2": (None, "v3"), "v3": (None, "v3")}),
            (["v2"], {"v1": ("v2", "v2"), "v2": ("v2", "v2"), "v3": None}),
            (["v1", None], {"v1": ("v1", "v1"), "v2": (None, "v3"), "v3": (None, "v3")}),
            (["v2", "v3"], {"v1": ("v2", "v2"), "v2": ("v2", "v2"), "v3": ("v3", "v3")}),
            (["v3", "v1"], {"v1": ("v1", "v1"), "v2": ("v3", "v3"), "v4": None}),
            (["v4", None], {"v1": (None, "v3"), "v4": ("v4", "v4"), "v9": (None, "v9")}),
        ],
    )
    def test_the_first_version_that_a_handler_names_else_the_last(self, make_consumer, versions, registered, routes):
        consumer, functions = make_consumer(), {}
        for version in registered:
            functions[version] = consumer.handles(SHOP, version=version)(lambda event: None)
        for version, expected in routes.items():
            route = consumer.route(SHOP, version)
            found = route and (route.handler.function, route.version)
            assert found == (expected and (functions[expected[0]], expected[1])), version

    def test_the_most_specific_pattern_wins_within_a_version(self, make_consumer, versions):
        consumer = make_consumer()
        exact = consumer.handles(SHOP)(lambda event: None)
        domain = consumer.handles("shop.*", version="v2")(lambda event: None)
        every = consumer.handles("*", version="v2")(lambda event: None)
        assert consumer.route(SHOP, "v1").handler.function is domain
        assert consumer.route(SHOP, "v3").handler.function is exact
        assert consumer.route("other.thing.done", "v2").handler.function is every
        assert consumer.event_types == ["*", "shop.*", SHOP]
        assert len(consumer.topics) == 4

    def test_a_handler_registered_later_is_found(self, make_consumer):
        consumer = make_consumer()
        assert consumer.route("a.b.done", "v1") is None
        consumer.handles("a.*")(print)
        assert consumer.route("a.b.done", "v1").handler.function is print

    def test_made_up_types_do_not_fill_the_memory(self, make_consumer):
        consumer = make_consumer()
        consumer.handles("*")(lambda event: None)
        for number in range(5000):
            consumer.route(f"made.up{number}.done", "v1")
        assert consumer._routes.cache_info().currsize <= 1000

    def test_a_version_is_registered_once_and_looks_like_one(self, make_consumer):
        consumer = make_consumer()
        consumer.handles(SHOP, version="v1")(lambda event: None)
        consumer.handles(SHOP)(lambda event: None)
        with pytest.raises(DuplicateRegistration, match=f"two handlers of {SHOP} v1"):
            consumer.handles_batch(SHOP, version="v1")(lambda events: None)
        with pytest.raises(InvalidEventType, match="v1, v2"):
            consumer.handles(SHOP, version="2")(lambda event: None)

    def test_what_would_not_run_when_it_is_called_is_refused(self, make_consumer):
        consumer = make_consumer()

        async def asynchronous(event): ...

        def generator(event):
            yield

        for function in (asynchronous, generator, logged(asynchronous)):
            with pytest.raises(TypeError, match="neither async nor generator"):
                consumer.handles(SHOP)(function)


class TestUpcasters:
    def test_both_versions_must_be_in_the_catalog(self, versions):
        with pytest.raises(UnknownEventType, match="v9"):
            upcasts(SHOP, "v3", to="v9")
        with pytest.raises(UnknownEventType, match="v9"):
            upcasts(SHOP, "v9", to="v3")

    @pytest.mark.parametrize("to", ["v1", "v2", "v3"])
    def test_no_way_leads_back(self, versions, to):
        with pytest.raises(ValueError, match="later version"):
            upcasts(SHOP, "v3", to=to)

    def test_a_version_has_one(self, versions):
        with pytest.raises(DuplicateRegistration, match="has an upcaster already, to v2"):
            upcasts(SHOP, "v1", to="v3")(lambda old: UserRegisteredPayload())

    @pytest.mark.django_db
    @pytest.mark.parametrize("is_batch", [False, True])
    @pytest.mark.parametrize(
        ("version", "seen"),
        [
            ("v2", [("v2", MessageSentPayload(content="1>2")), ("v2", MessageSentPayload(content="2"))]),
            (None, [("v3", UserRegisteredPayload(username=name)) for name in ("1>2>3", "2>3", "3")]),
        ],
    )
    def test_handlers_see_the_version_that_they_want(self, make_consumer, versions, version, seen, is_batch):
        consumer, events = make_consumer(), []
        if is_batch:
            consumer.handles_batch(SHOP, version=version)(events.extend)
        else:
            consumer.handles(SHOP, version=version)(events.append)
        for emitted in ("v1", "v2", "v3"):
            emit_order(emitted)
        handle_now(consumer)
        assert [(event.event_version, event.payload) for event in events] == seen

    @pytest.mark.django_db
    def test_cause_and_correlation_of_what_is_emitted_on_an_upcast_event(self, make_consumer, versions):
        consumer = make_consumer()

        @consumer.handles(SHOP, version="v2")
        def on_placed(event):
            emit_event(
                "conversation.created", ConversationCreatedPayload(), aggregate_id="c1", tenant_id=event.tenant_id
            )

        cause = emit_order("v1", correlation_id="chain")
        handle_now(consumer, raise_errors=True)
        base = BaseEvent.FromString(bytes(OutboxEvent.objects.get(event_type="conversation.created").value))
        assert (base.causation_id, base.correlation_id) == (str(cause.event_id), "chain")

    @pytest.mark.django_db
    def test_one_that_returns_another_message_makes_a_dead_letter(self, make_consumer, own_catalog):
        register_event(SHOP, ConversationCreatedPayload, "v1")
        register_event(SHOP, MessageSentPayload, "v2")
        upcasts(SHOP, "v1", to="v2")(lambda old: old)
        consumer, seen = make_consumer(), []
        consumer.handles(SHOP)(seen.append)
        emit_order("v1")
        emit_order("v2")
        (letter,) = handle_now(consumer).dead_letters
        assert letter.reason == "payload_mismatch"
        assert "returned a ConversationCreatedPayload, not a MessageSentPayload" in letter.error
        assert [event.event_version for event in seen] == ["v2"]

    @pytest.mark.django_db
    @pytest.mark.parametrize(
        ("error", "reason", "calls"), [(ValueError, "failed", 5), (PermanentEventError, "permanent", 2)]
    )
    def test_one_that_raises_is_treated_like_a_handler_that_does(
        self, make_consumer, own_catalog, error, reason, calls
    ):
        register_event(SHOP, ConversationCreatedPayload, "v1")
        register_event(SHOP, MessageSentPayload, "v2")
        called = []

        @upcasts(SHOP, "v1", to="v2")
        def break_down(old):
            called.append(old)
            raise error("cannot be done")

        consumer = make_consumer(retry=QUICK)
        consumer.handles(SHOP)(lambda event: None)
        emit_order("v1")
        (letter,) = handle_now(consumer).dead_letters
        assert (letter.reason, len(called)) == (reason, calls)
        assert "break_down" in letter.traceback and "cannot be done" in letter.error
        consumer.on_failure = "stop"
        emit_order("v1")
        with pytest.raises(ConsumerStopped):
            handle_now(consumer)


class TestHandlerObjects:
    @pytest.mark.django_db
    def test_objects_and_classes_of_them(self, make_consumer):
        """Specification, EventHandler: Handle and SupportedEventTypes."""
        consumer = make_consumer()

        class Recorder:
            def __init__(self):
                self.seen = []

            def supported_event_types(self):
                return ["conversation.created", "document.*"]

            def handle(self, event):
                self.seen.append(event.event_type)

        @consumer.register
        class Batches:
            sizes = []

            def supported_event_types(self):
                return ["conversation.message.sent"]

            def handle_batch(self, events):
                self.sizes.append(len(events))

        recorder = consumer.register(Recorder())
        events = [
            make_event(name)
            for name in ("conversation.created", "document.uploaded", *["conversation.message.sent"] * 2)
        ]
        handle_now(consumer, events=events)
        assert recorder.seen == ["conversation.created", "document.uploaded"]
        assert Batches.sizes == [2]
        route = consumer.route("conversation.created", "v1")
        assert route.handler.name.endswith("Recorder.handle") and not route.handler.is_batch

    def test_of_a_version(self, make_consumer, versions):
        consumer = make_consumer()
        consumer.register(handler_object(types=[SHOP]), version="v2")
        assert consumer.route(SHOP, "v1").version == "v2"
        assert consumer.route(SHOP, "v3") is None

    def test_what_is_none_is_refused(self, make_consumer):
        consumer = make_consumer()
        for missing in ("handle", "supported_event_types"):
            with pytest.raises(TypeError, match="is no handler: it needs supported_event_types"):
                consumer.register(handler_object(without=missing))
        both = handler_object()
        both.handle_batch = lambda events: None
        with pytest.raises(TypeError, match="either"):
            consumer.register(both)
        with pytest.raises(TypeError, match="not a list"):
            consumer.register(handler_object(types="conversation.created"))
        with pytest.raises(ValueError, match="at least one"):
            consumer.register(handler_object(types=[]))
        assert consumer.event_types == []


def handler_object(types=("conversation.created",), without=None, function=lambda event: None):
    class Thing:
        pass

    thing = Thing()
    for name, value in (("supported_event_types", lambda: types), ("handle", function)):
        if name != without:
            setattr(thing, name, value)
    return thing


class TestRetrying:
    """Every attempt is made in the event's transaction: `db` is one."""

    pytestmark = pytest.mark.django_db

    def test_the_specifications_delays(self, monkeypatch):
        waits, attempts = [], []
        monkeypatch.setattr("time.sleep", waits.append)

        @retrying()
        def fail(event):
            attempts.append(event)
            raise ValueError("no")

        with pytest.raises(ValueError, match="no") as raised:
            fail(make_event("conversation.created"))
        assert (waits, len(attempts)) == ([0.1, 0.2, 0.4], 4)
        assert raised.value.__notes__ == ["failed after 3 retries"]

    def test_a_failed_attempt_leaves_no_effect(self):
        names = iter(["first", "second"])

        @retrying(QUICK)
        def create(event):
            name = next(names)
            Tenant.objects.create(name=name)
            if name == "first":
                raise ValueError

        create(make_event("conversation.created"))
        assert [tenant.name for tenant in Tenant.objects.all()] == ["second"]

    @pytest.mark.parametrize("how", ["orm", "sql", "swallowed by the orm", "swallowed sql"])
    def test_a_broken_transaction_is_restored(self, how):
        Tenant.objects.create(name="taken")
        attempts = []

        @retrying(QUICK)
        def break_first(event):
            attempts.append(event)
            Tenant.objects.create(name=f"attempt {len(attempts)}")
            if len(attempts) == 1:
                with contextlib.suppress(IntegrityError) if "swallowed" in how else contextlib.nullcontext():
                    if "orm" in how:
                        Tenant.objects.create(name="taken")
                    else:
                        insert = "INSERT INTO identity_tenant VALUES (gen_random_uuid(), 'taken', now())"
                        connection.cursor().execute(insert)

        break_first(make_event("conversation.created"))
        assert set(Tenant.objects.values_list("name", flat=True)) == {"taken", "attempt 2"}

    def test_a_permanent_error_is_not_tried_again(self):
        attempts = []

        @retrying(QUICK)
        def fail(event):
            attempts.append(event)
            raise PermanentEventError

        with pytest.raises(PermanentEventError):
            fail(make_event("conversation.created"))
        assert len(attempts) == 1

    @pytest.mark.django_db(transaction=True)
    def test_nothing_is_tried_again_once_the_connection_is_gone(self):
        """The event's transaction is lost with it: what a further attempt did would be without its mark."""
        attempts = []

        @retrying(QUICK)
        def lose(event):
            attempts.append(event)
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")

        with pytest.raises(OperationalError), transaction.atomic():
            lose(make_event("conversation.created"))
        assert len(attempts) == 1


class TestDecorators:
    def test_lines_with_type_id_and_duration(self, caplog, versions):
        caplog.set_level(logging.INFO, "events_outbox.decorators")
        event = make_event(SHOP, aggregate_id="o1")

        @logged
        def handle(given):
            if given is not event:
                raise ValueError("no good")

        handle(event)
        with pytest.raises(ValueError, match="no good"):
            handle(other := make_event(SHOP))
        success, failure = caplog.records
        assert (success.levelname, success.message) == ("INFO", "event handled")
        assert (success.event_type, success.event_id, success.aggregate_id) == (SHOP, str(event.event_id), "o1")
        assert 0 <= success.duration_ms < 1000 and success.handler.endswith("handle")
        assert (failure.levelname, failure.message, failure.event_id) == (
            "WARNING", "event failed", str(other.event_id)
        )  # fmt: skip
        assert failure.error == "ValueError: no good" and failure.duration_ms >= 0

    def test_a_batch_is_one_line(self, caplog):
        caplog.set_level(logging.INFO, "events_outbox.decorators")
        logged(lambda events: None)([make_event("conversation.created")] * 3)
        assert [record.events for record in caplog.records] == [3]

    @pytest.mark.django_db
    def test_they_compose_over_functions_classes_and_objects(self, make_consumer, caplog):
        caplog.set_level(logging.INFO, "events_outbox.decorators")
        consumer, attempts = make_consumer(), []

        def fail_once(event):
            attempts.append(event.event_type)
            if attempts.count(event.event_type) == 1:
                raise ValueError("not yet")

        @consumer.handles("conversation.created")
        @logged
        @retrying(QUICK)
        def on_created(event):
            fail_once(event)

        @consumer.register
        @retrying(QUICK)
        @logged
        class OnSent:
            def supported_event_types(self):
                return ["conversation.message.sent"]

            def handle(self, event):
                fail_once(event)

        consumer.register(logged(retrying(QUICK)(handler_object(types=["document.*"], function=fail_once))))

        names = ["conversation.created", "conversation.message.sent", "document.uploaded"]
        handle_now(consumer, events=[make_event(name) for name in names], raise_errors=True)
        assert sorted(attempts) == sorted(names * 2)
        handled = [record for record in caplog.records if record.message == "event handled"]
        assert sorted(record.event_type for record in handled) == names
        assert consumer.route(names[0], "v1").handler.name.endswith("on_created")
        assert consumer.route(names[1], "v1").handler.name.endswith("OnSent.handle")

    def test_what_is_no_handler_is_refused(self):
        for thing in (3, type("Empty", (), {})):
            with pytest.raises(TypeError, match="neither"):
                logged(thing)


def test_the_context_of_an_event_ends_with_its_handler(make_consumer):
    consumer, seen = make_consumer(), []
    event = make_event("conversation.created", tenant_id="t1", correlation_id="chain")

    @consumer.handles("conversation.created")
    def fail(given):
        seen.append((current_event.get(), context.tenant_id.get(), context.correlation_id.get()))
        raise ValueError

    with pytest.raises(ValueError):
        call_handler(consumer.name, consumer.route("conversation.created", "v1").handler, [event])
    assert seen == [(event, "t1", "chain")]
    left = (current_event.get(), context.tenant_id.get(), context.event_id.get(), context.trace_headers.get())
    assert left == (None, "", "", {})
