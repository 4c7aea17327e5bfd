"""Consumers: effectively once, in order, retries, dead letters, parking, rebalance, stop."""

import contextlib
import random
import time
import uuid

import pytest
from django.db import IntegrityError, connection, transaction

from events_outbox import Consumer, PermanentEventError, RetryPolicy, emit_event, pauses
from events_outbox.consumer import ConsumerPaused, ConsumerProcess, ConsumerStopped
from events_outbox.models import DeadLetter, OutboxEvent, ProcessedEvent
from events_outbox.policies import FailureGuard
from events_outbox.proto.base_event_pb2 import BaseEvent
from events_outbox.records import Record
from tests.events_outbox.conftest import counted
from voicehelper.identity.models import Tenant
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload
from voicehelper.proto.identity_pb2 import UserRegisteredPayload

pytestmark = pytest.mark.django_db(transaction=True)


def record_of(row, offset=0):
    return Record(topic=row.topic, partition=0, offset=offset, key=row.aggregate_id.encode(), value=bytes(row.value))


def handle(consumer, records):
    ConsumerProcess(consumer).handle_batch(records)


def test_effects_happen_once_however_often_a_record_comes(make_consumer, emit):
    consumer, calls = make_consumer(), []

    @consumer.handles("conversation.created")
    def on_created(event):
        calls.append(event)
        Tenant.objects.create(name=event.aggregate_id)

    records = [record_of(emit(f"c{n}"), n) for n in range(3)]
    handle(consumer, [*records, records[0]])
    handle(consumer, records)
    assert [event.aggregate_id for event in calls] == ["c0", "c1", "c2"]
    assert Tenant.objects.count() == 3
    assert ProcessedEvent.objects.filter(consumer=consumer.name).count() == 3
    assert counted("consumer_events_duplicate_total", consumer=consumer.name) == 4
    assert counted("consumer_events_handled_total", consumer=consumer.name, event_type="conversation.created") == 3


def test_a_handler_sees_the_typed_event(make_consumer, emit):
    consumer, seen = make_consumer(), []
    consumer.handles("conversation.created")(seen.append)
    row = emit("c1", correlation_id="corr", user_id="u1")
    handle(consumer, [record_of(row, 7)])
    (event,) = seen
    assert event.event_id == row.event_id
    assert isinstance(event.payload, ConversationCreatedPayload) and event.payload.title == "hello"
    assert (event.tenant_id, event.user_id, event.correlation_id) == ("t1", "u1", "corr")
    assert (event.topic, event.partition, event.offset) == ("conversation.events", 0, 7)


def test_a_failing_event_costs_only_itself_and_is_retried(make_consumer, emit):
    consumer, attempts = make_consumer(), []

    @consumer.handles("conversation.created")
    def on_created(event):
        Tenant.objects.create(name=event.aggregate_id)
        if event.aggregate_id == "bad":
            attempts.append(event)
            raise ValueError("no good")

    rows = [emit(name) for name in ("c0", "bad", "c2")]
    handle(consumer, [record_of(row, n) for n, row in enumerate(rows)])
    assert set(Tenant.objects.values_list("name", flat=True)) == {"c0", "c2"}
    assert len(attempts) == 5  # once in the batch, then once and three retries alone
    letter = DeadLetter.objects.get()
    assert (letter.consumer, letter.reason, letter.attempts) == (consumer.name, "failed", 4)
    assert letter.event_id == rows[1].event_id and bytes(letter.value) == bytes(rows[1].value)
    assert letter.error == "ValueError: no good" and "on_created" in letter.traceback
    assert counted("consumer_event_retries_total", consumer=consumer.name) == 3
    assert ProcessedEvent.objects.filter(consumer=consumer.name).count() == 3


def test_the_specifications_delays_are_the_default():
    assert RetryPolicy().delays_seconds() == [0.1, 0.2, 0.4]


def test_a_passing_fault_is_overcome_by_retries(make_consumer, emit):
    consumer, attempts = make_consumer(), []

    @consumer.handles("conversation.created")
    def on_created(event):
        attempts.append(event)
        if len(attempts) < 3:
            raise ConnectionError("network timeout")

    handle(consumer, [record_of(emit("c1"))])
    assert len(attempts) == 3
    assert not DeadLetter.objects.exists()


def test_a_permanent_error_is_not_retried(make_consumer, emit):
    consumer, attempts = make_consumer(), []

    @consumer.handles("conversation.created")
    def on_created(event):
        attempts.append(event)
        raise PermanentEventError("such a conversation cannot be")

    handle(consumer, [record_of(emit("c1"))])
    assert len(attempts) == 2  # in the batch, and alone
    assert DeadLetter.objects.get().reason == "permanent"


def test_poison_becomes_dead_letters_with_its_raw_bytes_and_the_rest_is_handled(make_consumer, emit):
    consumer, seen = make_consumer(), []
    consumer.handles("*")(seen.append)
    good = emit("c1")
    unknown = BaseEvent(event_id=str(uuid.uuid4()), event_type="weather.changed", tenant_id="a\x00b")
    other = BaseEvent(event_id=str(uuid.uuid4()), event_type="conversation.created", event_version="v1")
    other.payload.Pack(UserRegisteredPayload(user_id="u"))
    no_id = BaseEvent(event_type="conversation.created")
    damaged = BaseEvent(event_id=str(uuid.uuid4()), event_type="conversation.created", event_version="v1")
    damaged.payload.Pack(ConversationCreatedPayload())
    damaged.payload.value = b"\xff\xff\xff"
    values = [
        b"\x00\xff random",
        unknown.SerializeToString(),
        other.SerializeToString(),
        b"",
        None,
        no_id.SerializeToString(),
        damaged.SerializeToString(),
    ]
    poison = [
        Record(topic="t", partition=0, offset=n, key=b"k\xff", value=value, headers=[("h", b"\x00\xff")])
        for n, value in enumerate(values)
    ]
    handle(consumer, [*poison, record_of(good, 9)])
    handle(consumer, poison)  # delivered again: kept once
    assert [event.event_id for event in seen] == [good.event_id]
    letters = DeadLetter.objects.order_by("offset")
    assert [letter.reason for letter in letters] == [
        "unparsable",
        "unknown_type",
        "payload_mismatch",
        "unparsable",
        "unparsable",
        "unparsable",
        "payload_mismatch",
    ]
    assert [letter.value and bytes(letter.value) for letter in letters] == values
    assert bytes(letters[0].key) == b"k\xff" and letters[0].text_headers() == [("h", "\x00\\xff")]
    assert counted("consumer_events_dead_lettered_total", consumer=consumer.name, reason="unparsable") == 4


def test_poison_with_a_huge_key_is_kept_too(make_consumer):
    consumer = make_consumer(on_failure="park_key")
    key = random.Random(1).randbytes(6000)
    handle(consumer, [Record(topic="t", partition=0, offset=n, key=key, value=b"junk") for n in range(2)])
    assert [bytes(letter.key) for letter in DeadLetter.objects.all()] == [key, key]


@pytest.mark.parametrize("swallow", ["orm", "sql"])
@pytest.mark.parametrize("is_batch", [False, True])
def test_a_handler_that_swallows_a_database_error_costs_nobody_elses_effects(make_consumer, emit, swallow, is_batch):
    """Its transaction is broken, and the commit would be a silent rollback."""
    consumer = make_consumer(retry=RetryPolicy(max_retries=0))
    Tenant.objects.create(name="taken")

    def create(event):
        if event.aggregate_id != "taken":
            Tenant.objects.create(name=event.aggregate_id)
            return
        with contextlib.suppress(IntegrityError):
            if swallow == "orm":
                Tenant.objects.create(name="taken")
            else:
                connection.cursor().execute("INSERT INTO identity_tenant VALUES (gen_random_uuid(), 'taken', now())")

    if is_batch:
        consumer.handles_batch("conversation.created")(lambda events: [create(event) for event in events])
    else:
        consumer.handles("conversation.created")(create)
    handle(consumer, [record_of(emit(name), n) for n, name in enumerate(("g1", "g2", "taken"))])
    assert set(Tenant.objects.values_list("name", flat=True)) == {"taken", "g1", "g2"}
    assert DeadLetter.objects.get().reason == "failed"
    assert ProcessedEvent.objects.count() == 3


def test_types_without_a_handler_are_skipped_and_counted(make_consumer, emit):
    consumer = make_consumer()
    consumer.handles("document.uploaded")(lambda event: None)
    handle(consumer, [record_of(emit("c1"))])
    assert counted("consumer_events_skipped_total", consumer=consumer.name) == 1
    assert not ProcessedEvent.objects.exists() and not DeadLetter.objects.exists()


def test_the_most_specific_handler_runs(make_consumer):
    consumer = make_consumer()
    functions = {}
    for pattern in ("*", "conversation.*", "conversation.message.*", "conversation.message.sent"):
        functions[pattern] = consumer.handles(pattern)(lambda event: None)
    for event_type, pattern in [
        ("conversation.message.sent", "conversation.message.sent"),
        ("conversation.message.edited", "conversation.message.*"),
        ("conversation.created", "conversation.*"),
        ("conversational.created", "*"),
    ]:
        assert consumer.route(event_type, "v1").handler.function is functions[pattern]


def test_topics_come_from_the_handlers(make_consumer):
    consumer = make_consumer()
    consumer.handles("conversation.*", "identity.user.registered")(lambda event: None)
    assert consumer.topics == ["conversation.events", "identity.events"]
    consumer.handles("*")(lambda event: None)
    assert len(consumer.topics) == 4


def test_registering_wrongly_raises(make_consumer):
    consumer = make_consumer()
    consumer.handles("conversation.created")(lambda event: None)
    with pytest.raises(ValueError, match="two handlers of conversation"):
        consumer.handles_batch("conversation.created")(lambda events: None)
    with pytest.raises(ValueError, match="registered twice"):
        Consumer(consumer.name, "g")
    with pytest.raises(ValueError, match="neither an event type nor a pattern"):
        consumer.handles("Conversation *")(lambda event: None)
    with pytest.raises(ValueError, match="on_failure"):
        Consumer("other", "g", on_failure="explode")


def test_a_batch_handler_gets_its_events_together_and_falls_back_to_one_by_one(make_consumer, emit):
    consumer, sizes = make_consumer(), []

    @consumer.handles_batch("conversation.created")
    def on_created(events):
        sizes.append(len(events))
        if any(event.aggregate_id == "bad" for event in events):
            raise PermanentEventError("bad")
        Tenant.objects.bulk_create([Tenant(name=event.aggregate_id) for event in events])

    handle(consumer, [record_of(emit(f"c{n}"), n) for n in range(3)])
    assert sizes == [3]
    handle(consumer, [record_of(emit(name), n) for n, name in enumerate(("c3", "bad", "c4"))])
    assert sizes == [3, 3, 1, 1, 1]
    assert Tenant.objects.count() == 5
    assert DeadLetter.objects.count() == 1


def test_order_within_a_key_holds_across_handlers_and_batches(make_consumer, emit):
    consumer, seen = make_consumer(), []
    consumer.handles_batch("conversation.created")(lambda events: seen.append([(e.aggregate_id, 1) for e in events]))

    @consumer.handles("identity.user.registered")
    def on_registered(event):
        seen.append([(event.aggregate_id, 2)])

    def registered(key):
        with transaction.atomic():
            return emit_event("identity.user.registered", UserRegisteredPayload(), aggregate_id=key, tenant_id="t")

    def as_one_topic(row, n):
        record = record_of(row, n)
        return Record(topic="t", partition=0, offset=n, key=record.key, value=record.value)

    rows = [emit("a"), emit("b"), registered("a"), emit("a"), emit("b"), registered("b"), emit("c")]
    handle(consumer, [as_one_topic(row, n) for n, row in enumerate(rows)])
    assert seen[0] == [("a", 1), ("b", 1), ("b", 1), ("c", 1)]  # as large as order allows
    assert seen[1:] == [[("a", 2)], [("b", 2)], [("a", 1)]]


def test_events_emitted_by_a_handler_share_its_transaction(make_consumer, emit):
    consumer = make_consumer()

    @consumer.handles("conversation.created")
    def on_created(event):
        emit_event(
            "conversation.created",
            ConversationCreatedPayload(),
            aggregate_id=f"from-{event.aggregate_id}",
            tenant_id="t",
        )
        if event.aggregate_id == "bad":
            raise PermanentEventError("bad")

    cause = emit("good", correlation_id="chain")
    handle(consumer, [record_of(cause), record_of(emit("bad"), 1)])
    emitted = OutboxEvent.objects.get(aggregate_id__startswith="from-")
    base = BaseEvent.FromString(bytes(emitted.value))
    assert emitted.aggregate_id == "from-good"
    assert (base.causation_id, base.correlation_id) == (str(cause.event_id), "chain")


def test_park_key_holds_the_keys_later_events(make_consumer, emit):
    consumer, seen = make_consumer(on_failure="park_key"), []
    broken = True

    @consumer.handles("conversation.created")
    def on_created(event):
        if broken and event.metadata["number"] == "0" and event.aggregate_id == "a":
            raise PermanentEventError("not yet")
        seen.append((event.aggregate_id, event.metadata["number"]))

    handle(consumer, [record_of(emit("a", n), n) for n in range(2)])
    handle(consumer, [record_of(emit("a", 2), 2), record_of(emit("b", 0), 3)])
    assert seen == [("b", "0")]
    letters = list(DeadLetter.objects.order_by("id"))
    assert [letter.reason for letter in letters] == ["permanent", "behind", "behind"]


def test_stop_ends_the_process_with_the_event_unhandled(make_consumer, emit):
    consumer = make_consumer(on_failure="stop")

    @consumer.handles("conversation.created")
    def on_created(event):
        raise ValueError("cannot")

    with pytest.raises(ConsumerStopped, match="cannot"):
        handle(consumer, [record_of(emit("c1"))])
    assert not ProcessedEvent.objects.exists() and not DeadLetter.objects.exists()


def test_a_lost_database_is_waited_out_and_costs_no_retries(make_consumer, emit, monkeypatch):
    monkeypatch.setattr("events_outbox.consumer.DISTURBED_SECONDS", 0.001)
    consumer, attempts = make_consumer(), []

    @consumer.handles("conversation.created")
    def on_created(event):
        attempts.append(event)
        with connection.cursor() as cursor:
            if len(attempts) <= 8:  # more often than there are retries
                cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        Tenant.objects.create(name=event.aggregate_id)

    handle(consumer, [record_of(emit("c1"))])
    assert len(attempts) == 9 and Tenant.objects.count() == 1
    assert not DeadLetter.objects.exists()


def test_a_database_that_takes_no_connections_is_waited_for(make_consumer, emit, monkeypatch):
    monkeypatch.setattr("events_outbox.consumer.RECONNECT_SECONDS", 0.01)
    consumer, seen, ticks = make_consumer(retry=RetryPolicy(max_retries=0)), [], []
    consumer.handles("conversation.created")(seen.append)
    record = record_of(emit("c1"))
    there = connection.settings_dict["HOST"]

    def database_comes_back():
        ticks.append(None)
        if len(ticks) == 5:
            connection.settings_dict["HOST"] = there

    connection.close()
    monkeypatch.setitem(connection.settings_dict, "HOST", "/nowhere")
    ConsumerProcess(consumer, on_tick=database_comes_back).handle_batch([record])
    assert len(seen) == 1 and len(ticks) >= 5
    assert not DeadLetter.objects.exists()


def test_an_event_that_always_ends_the_connection_becomes_a_dead_letter(make_consumer, emit, monkeypatch):
    monkeypatch.setattr("events_outbox.consumer.DISTURBED_SECONDS", 0)
    consumer = make_consumer(retry=RetryPolicy(max_retries=0))

    @consumer.handles("conversation.created")
    def on_created(event):
        if event.aggregate_id == "bad":
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        Tenant.objects.create(name=event.aggregate_id)

    handle(consumer, [record_of(emit("bad"), 0), record_of(emit("good"), 1)])
    assert DeadLetter.objects.get().reason == "failed"
    assert Tenant.objects.get().name == "good"


@pytest.mark.parametrize("state", ["40001", "40P01"])
def test_conflicts_between_transactions_cost_no_retries(make_consumer, emit, monkeypatch, state):
    monkeypatch.setattr("events_outbox.consumer.DISTURBED_SECONDS", 0.001)
    consumer, attempts = make_consumer(retry=RetryPolicy(max_retries=0)), []

    @consumer.handles("conversation.created")
    def on_created(event):
        attempts.append(event)
        if len(attempts) < 5:
            with connection.cursor() as cursor:
                cursor.execute(f"DO $$ BEGIN RAISE EXCEPTION 'conflict' USING ERRCODE = '{state}'; END $$")

    handle(consumer, [record_of(emit("c1"))])
    assert len(attempts) == 5 and not DeadLetter.objects.exists()


def test_functions_given_to_on_commit_run_after_it_and_cost_each_other_nothing(make_consumer, emit):
    consumer, ran = make_consumer(), []

    @consumer.handles("conversation.created")
    def on_created(event):
        def hook():
            ran.append((event.aggregate_id, Tenant.objects.count(), connection.in_atomic_block))
            if event.aggregate_id == "c1":
                raise ConnectionError("the mail server is away")

        Tenant.objects.create(name=event.aggregate_id)
        transaction.on_commit(hook)
        if event.aggregate_id == "bad":
            raise PermanentEventError("no")
        with contextlib.suppress(ValueError), transaction.atomic():
            transaction.on_commit(lambda: ran.append("of a savepoint that was rolled back"))
            raise ValueError

    handle(consumer, [record_of(emit(f"c{n}"), n) for n in range(3)])
    assert ran == [("c0", 3, False), ("c1", 3, False), ("c2", 3, False)]
    assert counted("consumer_commit_hook_failures_total", consumer=consumer.name) == 1
    assert ProcessedEvent.objects.count() == 3 and not DeadLetter.objects.exists()
    handle(consumer, [record_of(emit("bad"), 3)])
    assert len(ran) == 3, "a hook ran of an event that was rolled back"


def test_a_member_that_stands_still_in_a_transaction_is_ended_and_the_event_handled_again(
    make_consumer, emit, settings, monkeypatch
):
    """As when its process is frozen: the marks it holds would keep the partition's new owner waiting for ever."""
    monkeypatch.setattr("events_outbox.consumer.DISTURBED_SECONDS", 0)
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "BATCH_TIMEOUT_SECONDS": 1}
    connection.close()  # the bound is set when a session begins
    consumer, attempts = make_consumer(retry=RetryPolicy(max_retries=0)), []

    @consumer.handles("conversation.created")
    def stand_still(event):
        attempts.append(event)
        Tenant.objects.create(name=event.aggregate_id)
        if len(attempts) == 1:
            time.sleep(1.5)

    handle(consumer, [record_of(emit("c1"))])
    assert len(attempts) == 2 and Tenant.objects.count() == 1 and not DeadLetter.objects.exists()
    connection.close()


def test_of_a_batch_with_too_many_failures_the_guard_stops_at_the_right_one(make_consumer, emit):
    consumer, seen = make_consumer(guard=FailureGuard(max_failed_share=0.5, window_events=4)), []
    consumer.handles("conversation.created")(seen.append)
    poison = [Record("conversation.events", 0, n, b"k", b"junk") for n in range(5)]
    process = ConsumerProcess(consumer)
    with pytest.raises(ConsumerPaused, match="3 of the last 3 events failed"):
        process.handle_batch([*poison, record_of(emit("c1"), 5)])
    assert DeadLetter.objects.count() == 3 and not seen and pauses.is_paused(consumer.name)
    process.handle_batch([*poison[3:], record_of(emit("c2"), 6)])  # resumed: it counts anew
    assert DeadLetter.objects.count() == 5 and len(seen) == 1


def test_without_a_guard_all_failures_become_dead_letters(make_consumer):
    consumer = make_consumer(guard=None)
    consumer.handles("conversation.created")(print)
    handle(consumer, [Record("conversation.events", 0, n, b"k", b"junk") for n in range(300)])
    assert DeadLetter.objects.count() == 300


def test_a_batch_that_was_handled_before_is_looked_up_and_not_inserted(make_consumer, emit, django_assert_num_queries):
    consumer, seen = make_consumer(), []
    consumer.handles("conversation.created")(seen.append)
    records = [record_of(emit(f"c{n}"), n) for n in range(10)]
    process = ConsumerProcess(consumer)
    process.handle_batch(records)
    process.handle_batch(records)  # found out by inserting
    with connection.cursor() as cursor:
        cursor.execute("SELECT last_value FROM events_outbox_processedevent_id_seq")
        before = cursor.fetchone()
        process.handle_batch(records)
        process.handle_batch([*records[:6], record_of(emit("c11"), 11)])
        cursor.execute("SELECT last_value - %s FROM events_outbox_processedevent_id_seq", before)
        assert cursor.fetchone() == (1,)
    assert len(seen) == 11
    assert counted("consumer_events_duplicate_total", consumer=consumer.name) == 26


def test_an_event_id_in_another_spelling_is_the_same_event(make_consumer, emit):
    consumer, seen = make_consumer(), []
    consumer.handles("conversation.created")(seen.append)
    row = emit("c1")
    base = BaseEvent.FromString(bytes(row.value))
    base.event_id = base.event_id.upper()
    other = Record("conversation.events", 0, 1, b"c1", base.SerializeToString())
    handle(consumer, [other, record_of(row)])
    assert len(seen) == 1 and seen[0].event_id == row.event_id
