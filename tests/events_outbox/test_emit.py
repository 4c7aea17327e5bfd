"""emit_event(): atomic, validated, one INSERT, and complete."""

import asyncio
import uuid
from datetime import UTC, datetime

import pytest
from asgiref.sync import sync_to_async
from django.db import IntegrityError, connection, transaction
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from events_outbox import EventContractError, NewEvent, NotInTransaction, aemit_event, emit_event, emit_events
from events_outbox.exceptions import (
    EventTooLarge,
    InvalidEventField,
    PayloadMismatch,
    UnknownEventType,
)
from events_outbox.handlers import handling
from events_outbox.models import OutboxEvent
from events_outbox.proto.base_event_pb2 import BaseEvent
from events_outbox.records import Record
from monitoring import context
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload, MessageSentPayload

pytestmark = pytest.mark.django_db

PAYLOAD = ConversationCreatedPayload(conversation_id="c1", title="hello", mode="chat")
FIELDS = {"aggregate_id": "c1", "tenant_id": "t1"}


def emit(**fields):
    return emit_event("conversation.created", PAYLOAD, **{**FIELDS, **fields})


def envelope(row):
    return BaseEvent.FromString(bytes(OutboxEvent.objects.get(pk=row.pk).value))


def test_an_event_is_one_insert_with_the_specifications_fields():
    when = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    with CaptureQueriesContext(connection) as queries:
        row = emit(
            user_id="u1",
            timestamp=when,
            metadata={"source": "test"},
            correlation_id="corr",
            causation_id="cause",
        )
    assert len(queries) == 1 and queries[0]["sql"].startswith("INSERT INTO")
    base = envelope(row)
    assert uuid.UUID(base.event_id) == row.event_id and row.event_id.version == 7
    assert (base.event_type, base.event_version) == ("conversation.created", "v1")
    assert (base.aggregate_id, base.tenant_id, base.user_id) == ("c1", "t1", "u1")
    assert base.timestamp.ToDatetime(tzinfo=UTC) == when
    payload = ConversationCreatedPayload()
    assert base.payload.Unpack(payload) and payload == PAYLOAD
    assert dict(base.metadata) == {"source": "test"}
    assert (base.correlation_id, base.causation_id) == ("corr", "cause")
    assert row.topic == "conversation.events"


def test_base_event_has_exactly_the_eleven_fields_of_the_specification():
    assert [field.name for field in BaseEvent.DESCRIPTOR.fields] == [
        "event_id",
        "event_type",
        "event_version",
        "aggregate_id",
        "tenant_id",
        "user_id",
        "timestamp",
        "payload",
        "metadata",
        "correlation_id",
        "causation_id",
    ]


def test_defaults_are_filled_in():
    before = datetime.now(UTC)
    row = emit()
    base = envelope(row)
    assert base.event_version == "v1"
    assert before <= base.timestamp.ToDatetime(tzinfo=UTC) <= datetime.now(UTC)
    assert base.correlation_id == base.event_id  # the first of its chain
    assert base.causation_id == ""
    assert row.transaction_id > 0


def test_correlation_is_that_of_the_request():
    token = context.correlation_id.set("request-7")
    try:
        assert envelope(emit()).correlation_id == "request-7"
    finally:
        context.correlation_id.reset(token)


def test_trace_context_is_kept_and_is_the_correlation_without_a_request():
    tracer = TracerProvider().get_tracer("test")
    with tracer.start_as_current_span("request") as span:
        row = emit()
    trace_id = trace.format_trace_id(span.get_span_context().trace_id)
    assert row.traceparent.split("-")[1] == trace_id
    assert row.correlation_id == trace_id


def test_inside_a_handler_cause_and_correlation_are_the_handled_events():
    cause = emit(correlation_id="chain")
    value = bytes(cause.value)
    record = Record(topic="conversation.events", partition=0, offset=0, key=b"c1", value=value)
    with handling(record.event(record.envelope())):
        base = envelope(emit())
    assert base.causation_id == str(cause.event_id)
    assert base.correlation_id == "chain"


@pytest.mark.django_db(transaction=True)
def test_outside_a_transaction_it_raises_and_writes_nothing():
    with pytest.raises(NotInTransaction, match=r"transaction\.atomic"):
        emit()
    with pytest.raises(NotInTransaction):
        emit_events([])
    assert not OutboxEvent.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_a_rollback_takes_the_event_with_it():
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        emit()
        raise ZeroDivisionError
    assert not OutboxEvent.objects.exists()


@pytest.mark.parametrize(
    ("event_type", "payload", "fields", "error", "says"),
    [
        ("billing.paid", PAYLOAD, {}, UnknownEventType, "register it"),
        ("conversation.creatd", PAYLOAD, {}, UnknownEventType, "did you mean conversation.created v1"),
        ("conversation.created", PAYLOAD, {"event_version": "v9"}, UnknownEventType, "v9"),
        ("conversation.created", MessageSentPayload(), {}, PayloadMismatch, "ConversationCreatedPayload"),
        ("conversation.created", {"title": "x"}, {}, PayloadMismatch, "dict"),
        ("conversation.created", PAYLOAD, {"aggregate_id": ""}, InvalidEventField, "aggregate_id must not be empty"),
        ("conversation.created", PAYLOAD, {"tenant_id": ""}, InvalidEventField, "tenant_id must not be empty"),
        ("conversation.created", PAYLOAD, {"aggregate_id": 7}, InvalidEventField, "text or a UUID"),
        ("conversation.created", PAYLOAD, {"aggregate_id": "x" * 256}, InvalidEventField, "at most 255"),
        ("conversation.created", PAYLOAD, {"tenant_id": "a\x00b"}, InvalidEventField, "NUL"),
        ("conversation.created", PAYLOAD, {"user_id": "\ud800"}, InvalidEventField, "surrogate"),
        ("conversation.created", PAYLOAD, {"metadata": {"k": "\x00"}}, InvalidEventField, "metadata"),
        ("conversation.created", PAYLOAD, {"metadata": {"k": 1}}, InvalidEventField, "metadata"),
        ("conversation.created", PAYLOAD, {"timestamp": datetime(2026, 1, 1)}, InvalidEventField, "time zone"),
        ("conversation.created", PAYLOAD, {"event_id": "x"}, InvalidEventField, "uuid.UUID"),
        ("conversation.created", PAYLOAD, {"metadata": {"k": "x" * 1_000_000}}, EventTooLarge, "MAX_EVENT_BYTES"),
    ],
)
def test_each_misuse_is_a_clear_typed_error_and_writes_nothing(event_type, payload, fields, error, says):
    with pytest.raises(error, match=says) as raised:
        emit_event(event_type, payload, **{**FIELDS, **fields})
    assert isinstance(raised.value, EventContractError)
    assert not OutboxEvent.objects.exists()


def test_text_that_looks_like_sql_is_text():
    hostile = "x'; DROP TABLE events_outbox_outboxevent; --"
    row = emit(aggregate_id=hostile, tenant_id=hostile, user_id=hostile, metadata={hostile: hostile})
    base = envelope(row)
    assert (base.aggregate_id, base.tenant_id, base.user_id, base.metadata[hostile]) == (hostile,) * 4


def test_many_metadata_entries_always_give_the_same_bytes():
    metadata = {f"key{n}": "value" for n in range(10_000)}
    fixed = {"event_id": uuid.uuid4(), "timestamp": datetime(2026, 1, 1, tzinfo=UTC), "correlation_id": "c"}
    first = emit(metadata=metadata, **fixed)
    assert dict(envelope(first).metadata) == metadata
    OutboxEvent.objects.all().delete()
    again = emit(metadata=dict(reversed(metadata.items())), **fixed)
    assert first.value == again.value


def test_many_events_are_one_statement_in_their_order():
    events = [
        NewEvent(event_type="conversation.created", payload=PAYLOAD, aggregate_id=f"c{n}", tenant_id="t1")
        for n in range(1000)
    ]
    with CaptureQueriesContext(connection) as queries:
        event_ids = emit_events(events)
    assert len(queries) == 1
    stored = list(OutboxEvent.objects.order_by("id"))
    assert [row.aggregate_id for row in stored] == [f"c{n}" for n in range(1000)]
    assert [row.event_id for row in stored] == event_ids


def test_one_of_many_is_stored_as_one_alone():
    fields = {
        "payload": PAYLOAD,
        "aggregate_id": "ünï",
        "tenant_id": "t1",
        "user_id": "u",
        "correlation_id": "c\\N\t",
        "event_id": uuid.uuid4(),
        "timestamp": timezone.now(),
        "metadata": {"a": "b"},
    }
    one = emit_event("conversation.created", **fields)
    stored = OutboxEvent.objects.get()
    assert {f.attname: getattr(one, f.attname) for f in OutboxEvent._meta.fields} == {
        f.attname: getattr(stored, f.attname) for f in OutboxEvent._meta.fields
    }
    stored.delete()
    emit_events([NewEvent(event_type="conversation.created", **fields)])
    many = OutboxEvent.objects.get()
    for field in OutboxEvent._meta.fields:
        if field.attname not in ("id", "created_at"):
            assert getattr(many, field.attname) == getattr(stored, field.attname), field


def test_an_event_id_that_is_there_already_is_an_integrity_error():
    event = NewEvent(event_type="conversation.created", payload=PAYLOAD, event_id=uuid.uuid4(), **FIELDS)
    emit_events([event])
    with pytest.raises(IntegrityError), transaction.atomic():
        emit_events([event])
    with pytest.raises(IntegrityError), transaction.atomic():
        emit_event("conversation.created", PAYLOAD, event_id=event.event_id, **FIELDS)


def test_one_wrong_event_among_many_writes_none():
    good = NewEvent(event_type="conversation.created", payload=PAYLOAD, **FIELDS)
    bad = NewEvent(event_type="conversation.created", payload=PAYLOAD, aggregate_id="", tenant_id="t1")
    with pytest.raises(InvalidEventField):
        emit_events([good, bad])
    assert not OutboxEvent.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_async_code_emits_within_its_transaction_and_not_outside():
    async def run():
        with pytest.raises(NotInTransaction):
            await aemit_event("conversation.created", PAYLOAD, **FIELDS)
        atomic = transaction.atomic()
        await sync_to_async(atomic.__enter__)()
        await aemit_event("conversation.created", PAYLOAD, **FIELDS)
        await sync_to_async(atomic.__exit__)(None, None, None)
        await sync_to_async(lambda: connection.close())()

    asyncio.run(run())
    assert OutboxEvent.objects.count() == 1
