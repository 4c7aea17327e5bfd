"""Whatever a topic holds, the consumer gets past it: each record is handled, skipped or kept as a dead letter."""

import itertools
import uuid
from collections import Counter

import pytest
from django.db import connection
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from events_outbox import Consumer, RetryPolicy, handlers
from events_outbox.consumer import ConsumerProcess
from events_outbox.models import DeadLetter, ProcessedEvent
from events_outbox.proto.base_event_pb2 import BaseEvent
from events_outbox.records import Record
from tests.events_outbox.test_records import valid_bytes
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload, MessageSentPayload
from voicehelper.proto.identity_pb2 import UserRegisteredPayload

pytestmark = pytest.mark.django_db(transaction=True)

PAYLOADS = [
    ConversationCreatedPayload(title="hello"),
    ConversationCreatedPayload(title="nul \x00 in it"),  # PostgreSQL refuses it: the handler fails
    ConversationCreatedPayload(title="\N{OGHAM SPACE MARK}" * 50_000),
    MessageSentPayload(),
    UserRegisteredPayload(user_id="u"),
]
POOL = [str(uuid.UUID(int=n)) for n in range(1, 6)]  # few, so that ids meet again
TYPES = ["conversation.created", "conversation.message.sent", "identity.user.registered", "weather.changed", ""]
TEXT = st.text(max_size=20)

ids = st.one_of(
    st.sampled_from(POOL),
    st.sampled_from([POOL[0].upper(), f"{{{POOL[1]}}}", f"urn:uuid:{POOL[2]}", POOL[3].replace("-", "")]),
    st.uuids().map(str),
    TEXT,
)
types = st.one_of(st.sampled_from(TYPES), TEXT)
versions = st.one_of(st.sampled_from(["v1", "v1", "v2", "v0", "V1", "1", ""]), TEXT)


@st.composite
def events(draw):
    base = BaseEvent(
        event_id=draw(ids),
        event_type=draw(types),
        event_version=draw(versions),
        aggregate_id=draw(TEXT),
        tenant_id=draw(TEXT),
        user_id=draw(TEXT),
        correlation_id=draw(TEXT),
        causation_id=draw(TEXT),
        metadata=draw(st.dictionaries(TEXT, TEXT, max_size=2)),
    )
    base.timestamp.seconds = draw(st.sampled_from([0, 1_800_000_000, 2**62, -(2**62)]))
    base.payload.Pack(draw(st.sampled_from(PAYLOADS)))
    if draw(st.booleans()):
        base.payload.type_url = draw(st.one_of(st.just(base.payload.type_url), TEXT))
        base.payload.value += draw(st.binary(max_size=5))
    return base.SerializeToString()


@st.composite
def damaged(draw):
    value = bytearray(draw(st.one_of(st.just(valid_bytes()), events())))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(value)))
        value[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(value)


values = st.one_of(
    st.none(), st.just(b""), st.binary(max_size=200), events(), events(), damaged(), st.just(b"\x0a" * 1_000_000)
)
keys = st.one_of(st.none(), st.sampled_from([b"a", b"b", b"", b"k" * 100_000]), st.binary(max_size=20))
headers_ = st.lists(st.tuples(st.text(max_size=5), st.one_of(st.none(), st.binary(max_size=20))), max_size=3)
messages = st.lists(st.tuples(keys, values, headers_), min_size=1, max_size=8)


@pytest.fixture
def effects():
    """The table the handlers write to; returns what is in it, in order."""
    with connection.cursor() as cursor:
        cursor.execute("CREATE TABLE test_effect (id bigserial, event_id uuid, tenant_id text, content text)")
    yield lambda: _rows("SELECT event_id, tenant_id, length(content) FROM test_effect ORDER BY id")
    with connection.cursor() as cursor:
        cursor.execute("DROP TABLE test_effect")


def _rows(sql):
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchall()


def write(event):
    with connection.cursor() as cursor:
        values = [event.event_id, event.tenant_id, str(event.payload)]
        cursor.execute("INSERT INTO test_effect (event_id, tenant_id, content) VALUES (%s, %s, %s)", values)
        cursor.execute("SELECT %s::text", [getattr(event.payload, "title", "")])  # fails with a NUL in it


def _skip():
    consumer = Consumer("fuzz-skip", "fuzz-skip", on_failure="skip", retry=RetryPolicy(max_retries=0))
    consumer.handles("conversation.*", "weather.changed")(write)
    return consumer


def _park():
    consumer = Consumer("fuzz-park", "fuzz-park", on_failure="park_key", retry=RetryPolicy(max_retries=0))
    consumer.handles_batch("*")(lambda events: [write(event) for event in events])
    return consumer


@pytest.fixture(params=[_skip, _park])
def consumer(request):
    consumer = request.param()
    yield consumer
    handlers._consumers.pop(consumer.name)


offsets = itertools.count()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages)
def test_any_records_are_handled_skipped_or_kept(consumer, effects, messages):
    records = [
        Record(topic="t", partition=0, offset=next(offsets), key=key, value=value, headers=headers)
        for key, value, headers in messages
    ]
    wanted = {event_id for record in records if (event_id := id_of(consumer, record)) is not None}
    marked = ProcessedEvent.objects.filter(consumer=consumer.name, event_id__in=wanted)
    marked_before = set(marked.values_list("event_id", flat=True))
    before = len(effects())
    process = ConsumerProcess(consumer)
    process.handle_batch(records)

    assert set(marked.values_list("event_id", flat=True)) == wanted
    letters = DeadLetter.objects.filter(consumer=consumer.name, offset__gte=records[0].offset)
    by_offset = {record.offset: record for record in records}
    for letter in letters:
        record = by_offset[letter.offset]
        assert (letter.key, letter.value) == (record.key, record.value)
        assert len(letter.headers) == len(record.headers)
    handled = [row[0] for row in effects()[before:]]
    kept = list(letters.values_list("event_id", flat=True))
    assert Counter(handled + kept) == Counter(wanted - marked_before), "each handled or kept, once, and not both"

    after = effects(), letters.count()
    process.handle_batch(records)  # delivered again
    assert (effects(), letters.count()) == after


def id_of(consumer, record):
    """The id under which the record must be marked; None: of a type that nobody handles."""
    try:
        base = BaseEvent.FromString(record.value or b"?")
        event_id = uuid.UUID(base.event_id)
    except Exception:
        return record.placeholder_id()
    return event_id if consumer.route(base.event_type, base.event_version) else None
