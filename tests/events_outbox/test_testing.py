"""The test kit that users import, and its pytest fixtures."""

import uuid
from datetime import UTC, datetime

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import ProgrammingError, connection, transaction
from django.test import TestCase, TransactionTestCase

from events_outbox import (
    NewEvent,
    PermanentEventError,
    RetryPolicy,
    aemit_event,
    emit_event,
    emit_events,
    register_event,
    upcasts,
)
from events_outbox.conf import outbox_settings
from events_outbox.consumer import ConsumerProcess, ConsumerStopped
from events_outbox.embedded_broker import EmbeddedBroker, EmbeddedBrokerError
from events_outbox.exceptions import InvalidEventField, PayloadMismatch, UnknownEventType
from events_outbox.handlers import consumers
from events_outbox.models import DeadLetter, OutboxEvent, ProcessedEvent, RelayCursor
from events_outbox.relay import Relay
from events_outbox.testing import capture_events, handle_now, make_event, make_record
from voicehelper.identity.models import Tenant
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload, MessageSentPayload
from voicehelper.proto.identity_pb2 import UserRegisteredPayload

CREATED, SENT = "conversation.created", "conversation.message.sent"


def new(number=0, event_type=CREATED):
    payloads = {CREATED: ConversationCreatedPayload(title=str(number)), SENT: MessageSentPayload(content=str(number))}
    return {
        "event_type": event_type, "payload": payloads[event_type], "aggregate_id": f"c{number}", "tenant_id": "t1"
    }  # fmt: skip


def emit(number=0, event_type=CREATED):
    with transaction.atomic():
        return emit_event(**new(number, event_type))


class TestCaptureInATestCase(TestCase):
    """Within the transaction of a TestCase, and without pytest's fixtures."""

    def test_what_the_block_emits_typed_and_in_order(self):
        emit(0)
        with capture_events() as events:
            assert list(events) == []
            emit(1)
            assert [event.payload.title for event in events] == ["1"]
            emit_events([NewEvent(**new(2, SENT)), NewEvent(**new(3))])
            async_to_sync(aemit_event)(**new(4))
        emit(5)
        assert [event.event_type for event in events] == [CREATED, SENT, CREATED, CREATED]
        assert [event.payload.title for event in events.of(CREATED)] == ["1", "3", "4"]
        assert events.of(SENT)[0].payload == MessageSentPayload(content="2")
        assert (events[0].aggregate_id, events[0].topic, len(events), len(events[1:])) == (
            "c1", "conversation.events", 4, 3
        )  # fmt: skip
        assert repr(events) == f"<emitted: {CREATED}, {SENT}, {CREATED}, {CREATED}>"

    def test_what_was_rolled_back_was_not_emitted(self):
        with capture_events() as events:
            emit(1)
            with self.assertRaises(ZeroDivisionError), transaction.atomic():
                emit(2)
                raise ZeroDivisionError
        assert [event.payload.title for event in events] == ["1"]
        with self.assertRaisesMessage(UnknownEventType, "did you mean"):
            events.of("conversation.create")

    def test_a_block_that_fails_says_why(self):
        with self.assertRaises(ZeroDivisionError), transaction.atomic(), capture_events():
            with self.assertRaises(ProgrammingError), connection.cursor() as cursor:
                cursor.execute("SELECT nonsense")
            raise ZeroDivisionError

    def test_handle_now(self):
        emit(1)
        handled = handle_now("audit")
        assert [event.payload.title for event in handled.events["audit"]] == ["1"]
        assert handled.dead_letters == []


class TestCaptureInAsyncCode(TransactionTestCase):
    async def test_with_async(self):
        async with capture_events() as events:
            await sync_to_async(emit)(1)
        assert [event.payload.title for event in events] == ["1"]


def test_the_fixtures(captured_events, handle_now, make_consumer):
    consumer, seen = make_consumer(), []
    consumer.handles(CREATED)(seen.append)
    emit(1)
    assert captured_events[0].payload.title == "1"
    assert handle_now(consumer.name).events == {consumer.name: seen}


@pytest.mark.django_db
class TestHandleNow:
    def test_each_event_once_also_when_called_again(self, make_consumer):
        consumer, seen = make_consumer(), []
        consumer.handles(CREATED)(lambda event: seen.append(event.payload.title))
        emit(1)
        assert [event.payload.title for event in handle_now(consumer).events[consumer.name]] == ["1"]
        emit(2)
        emit(3, SENT)  # no handler
        assert [event.payload.title for event in handle_now(consumer).events[consumer.name]] == ["2"]
        assert handle_now(consumer).events == {consumer.name: []}
        assert seen == ["1", "2"]
        assert ProcessedEvent.objects.filter(consumer=consumer.name).count() == 2

    def test_all_consumers_when_none_is_named(self):
        emit(1)
        handled = handle_now(events=[])
        assert handled.events == {}
        assert set(handle_now().events) == {consumer.name for consumer in consumers()}

    def test_only_the_given_events_and_duplicates_as_kafka_may_deliver_them(self, make_consumer):
        consumer, seen = make_consumer(), []
        consumer.handles(CREATED)(seen.append)
        emit(1)
        made = make_event(CREATED, ConversationCreatedPayload(title="made"), correlation_id="chain")
        handled = handle_now(consumer, events=[made, made])
        assert [event.payload.title for event in seen] == ["made"]
        assert seen == handled.events[consumer.name] == [made]

    def test_what_handlers_emit_is_handled_too(self, make_consumer):
        first, second, seen = make_consumer(), make_consumer(), []

        @first.handles(CREATED)
        def on_created(event):
            emit_event(**new(7, SENT))

        second.handles(SENT)(seen.append)
        cause = emit(1)
        handled = handle_now(first, second)
        assert [event.payload.content for event in seen] == ["7"]
        assert seen[0].causation_id == str(cause.event_id)
        assert {name: len(events) for name, events in handled.events.items()} == {first.name: 1, second.name: 1}

    def test_emitting_without_end_is_an_error(self, make_consumer):
        consumer = make_consumer()
        consumer.handles(CREATED)(lambda event: emit_event(**new(1)))
        emit(1)
        with pytest.raises(RuntimeError, match=f"still emit events: {CREATED}"):
            handle_now(consumer)

    def test_failures_are_retried_at_once_and_become_dead_letters(self, make_consumer):
        consumer, attempts = make_consumer(retry=RetryPolicy(max_retries=2, initial_delay_seconds=3600)), []

        @consumer.handles(CREATED)
        def fail_on_two(event):
            Tenant.objects.create(name=event.aggregate_id)
            if event.payload.title == "2":
                attempts.append(event)
                raise ValueError("no good")

        for number in (1, 2, 3):
            emit(number)
        handled = handle_now(consumer)
        assert [event.payload.title for event in handled.events[consumer.name]] == ["1", "3"]
        (letter,) = handled.dead_letters
        assert (letter.error, letter.attempts, len(attempts)) == ("ValueError: no good", 3, 4)
        assert set(Tenant.objects.values_list("name", flat=True)) == {"c1", "c3"}
        assert consumer.retry.initial_delay_seconds == 3600

    def test_or_are_raised(self, make_consumer):
        consumer, attempts = make_consumer(), []

        @consumer.handles(CREATED)
        def fail(event):
            attempts.append(event)
            raise PermanentEventError("no good")

        emit(1)
        with pytest.raises(PermanentEventError, match="no good"):
            handle_now(consumer, raise_errors=True)
        assert len(attempts) == 2  # in the batch, and alone
        assert not DeadLetter.objects.exists()
        assert len(handle_now(consumer).dead_letters) == 1  # nothing was marked

    def test_a_consumer_that_stops_says_so(self, make_consumer):
        consumer = make_consumer(on_failure="stop", retry=RetryPolicy(max_retries=0))
        consumer.handles(CREATED)(lambda event: 1 / 0)
        emit(1)
        with pytest.raises(ConsumerStopped):
            handle_now(consumer)

    def test_a_consumer_gets_what_its_topics_have(self, make_consumer):
        consumer, seen = make_consumer(topics=["document.events"]), []
        consumer.handles("*")(seen.append)
        emit(1)
        handle_now(consumer)
        assert seen == []


class TestMakeEvent:
    def test_any_type_of_the_catalog(self):
        event = make_event("identity.user.registered")
        assert event.payload == UserRegisteredPayload()
        assert uuid.UUID(event.aggregate_id) and uuid.UUID(event.tenant_id) and event.correlation_id
        assert (event.event_version, event.topic, event.partition) == ("v1", "identity.events", 0)
        assert event.headers["event_type"] == "identity.user.registered"
        assert make_event("identity.user.registered").event_id != event.event_id

    def test_given_fields(self):
        given = {
            "aggregate_id": "a", "tenant_id": "t", "user_id": "u", "metadata": {"k": "v"}, "correlation_id": "corr",
            "causation_id": "cause", "event_id": uuid.UUID(int=7), "timestamp": datetime(2026, 1, 31, tzinfo=UTC),
        }  # fmt: skip
        event = make_event(CREATED, ConversationCreatedPayload(title="x"), **given)
        assert {name: getattr(event, name) for name in given} == given
        assert event.payload.title == "x"

    def test_the_version_is_the_payloads_or_the_newest(self, own_catalog):
        for version, payload in (("v1", ConversationCreatedPayload), ("v2", MessageSentPayload)):
            register_event("shop.order.placed", payload, version)
        register_event("shop.order.placed", MessageSentPayload, "v10")
        upcasts("shop.order.placed", "v1", to="v2")(lambda old: MessageSentPayload())
        assert make_event("shop.order.placed").event_version == "v10"
        assert make_event("shop.order.placed", ConversationCreatedPayload()).event_version == "v1"
        assert make_event("shop.order.placed", event_version="v2").payload == MessageSentPayload()

    def test_mistakes_are_those_of_emit_event(self):
        with pytest.raises(UnknownEventType, match="did you mean"):
            make_event("conversation.create")
        with pytest.raises(UnknownEventType, match="v7"):
            make_event(CREATED, event_version="v7")
        with pytest.raises(PayloadMismatch):
            make_event(CREATED, MessageSentPayload())
        with pytest.raises(InvalidEventField, match="tenant_id"):
            make_event(CREATED, tenant_id="")

    @pytest.mark.django_db
    def test_its_record_is_the_one_that_is_published(self):
        with capture_events() as events, transaction.atomic():
            row = emit_event(**new(1), timestamp=datetime(2026, 1, 31, 12, 30, 5, 123456, tzinfo=UTC))
        record = make_record(events[0])
        assert (record.topic, record.key, record.value) == (row.topic, b"c1", bytes(row.value))
        assert record.event(record.envelope()) == events[0]


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("run", [1, 2])
def test_the_embedded_broker_is_this_tests_own(embedded_kafka, make_consumer, run):
    assert outbox_settings().KAFKA["bootstrap.servers"] == embedded_kafka.bootstrap_servers
    consumer, seen = make_consumer(), []
    process = ConsumerProcess(consumer)

    @consumer.handles("*")
    def see(event):
        seen.append(event.payload.title)
        process.stop()

    emit(run)
    Relay().run(until_empty=True)
    assert RelayCursor.read().has_published(OutboxEvent.objects.get())
    process.run(until_idle_seconds=30)
    assert seen == [str(run)]


def test_an_embedded_broker_that_does_not_start():
    with pytest.raises(EmbeddedBrokerError), EmbeddedBroker(["a.events"], partitions=-1):
        pass
