"""Text that was never meant well: a clear error, or an event that comes back from Kafka exactly as it was emitted."""

import asyncio
import time
import uuid
from contextlib import contextmanager

import pytest
from asgiref.sync import sync_to_async
from django.db import connection, transaction
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from opentelemetry import baggage, context, propagate

from events_outbox import EventContractError, NewEvent, aemit_event, emit_event, emit_events
from events_outbox.exceptions import EventTooLarge, InvalidEventField, UnknownEventType
from events_outbox.models import OutboxEvent, UndeliverableEvent
from events_outbox.proto.base_event_pb2 import BaseEvent
from events_outbox.relay import Relay
from events_outbox.status import read_status
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload

pytestmark = pytest.mark.django_db(transaction=True)

TYPE = "conversation.created"
PAYLOAD = ConversationCreatedPayload(conversation_id="c1", title="hello", mode="chat")
ID_FIELDS = ("aggregate_id", "tenant_id", "user_id", "correlation_id", "causation_id")
REQUIRED = ("aggregate_id", "tenant_id")

TEXTS = [
    "'; DROP TABLE events_outbox_outboxevent; --",
    "' OR '1'='1",
    "1); DELETE FROM events_outbox_outboxevent; SELECT (1",
    "$$; SELECT pg_sleep(9); $$",
    "%s %(id)s %% %",
    "{} {0} {name!r} ${x}",
    '{a,b} {"a","b"} {} NULL null',
    "\"quoted\" 'single' `back`",
    "back\\slash \\\\ \\x41 \\101 \\u0041",
    "\\N",
    "\\.",
    "a\tb\nc\rd\r\n\\.\n",
    "\x01\x02\x1b[31m\x7f\x80\x9f",
    " leading and trailing ",
    "\u200b\u200f\u202ereversed\u202c\u2066",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\u65e5\u672c\u8a9e \u4e2d\u6587 \ud55c\uad6d\uc5b4",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1e9\U0001f1ea \U0001f3f3\ufe0f\u200d\U0001f308",
    "Z" + "\u0335\u0353" * 100,
    "\ufffe\uffff\U0010ffff\ufeff",
    "\xdf \u1e9e \u0130 \u0131 \u017f \u212a \u212b \ufb01",
    "\xe9 is not e\u0301",
    "../../etc/passwd",
    "<script>alert(1)</script>&amp;",
    "a" * 255,
    "\U0001f600" * 255,
]
REFUSED = ["\x00", "a\x00b", "\ud800", "a\udfffb", "\udc80", "x" * 256, "x" * 1_000_000]

any_text = st.text(st.characters(exclude_categories=()), max_size=300)


def can_be_stored(text, max_chars=255):
    """What the contract says of a text, in other words than those of the code."""
    return "\x00" not in text and not any(0xD800 <= ord(c) <= 0xDFFF for c in text) and len(text) <= max_chars


class Emitted:
    """Emits in every way, and remembers what each accepted event must be."""

    def __init__(self):
        self.expected = {}

    def emit(self, way, *events):
        """Emit events, each given by its fields, in a transaction. Raises what emitting raises."""
        events = [{"aggregate_id": "c1", "tenant_id": "t1", "event_id": uuid.uuid4(), **fields} for fields in events]
        with transaction.atomic():
            WAYS[way](events)
        for fields in events:
            self.expected[str(fields["event_id"])] = fields

    def assert_published(self, reader):
        """All of it comes back: byte for byte the row, and field for field what was given."""
        Relay().run(until_empty=True)
        assert read_status().pending == 0 and not UndeliverableEvent.objects.exists()
        rows = {str(row.event_id): row for row in OutboxEvent.objects.all()}
        assert rows.keys() == self.expected.keys()
        for message in reader.read(len(rows)):
            base = BaseEvent.FromString(message.value())
            row, given = rows.pop(base.event_id), self.expected[base.event_id]
            assert message.value() == bytes(row.value)
            assert message.key() == given["aggregate_id"].encode()
            headers = dict(message.headers())
            assert headers["tenant_id"] == given["tenant_id"].encode()
            assert headers["correlation_id"] == row.correlation_id.encode() == base.correlation_id.encode()
            for name in ID_FIELDS:
                if given.get(name):
                    assert getattr(base, name) == given[name]
            for name in ("aggregate_id", "tenant_id", "correlation_id"):
                assert getattr(row, name) == getattr(base, name)
            assert dict(base.metadata) == given.get("metadata", {})
            payload = ConversationCreatedPayload()
            assert base.payload.Unpack(payload) and payload == given.get("payload", PAYLOAD)
            for name in ("traceparent", "tracestate", "baggage"):
                assert headers.get(name, b"").decode() == getattr(row, name)
        assert not rows


def emit_one_by_one(events):
    for fields in events:
        emit_event(TYPE, fields.get("payload", PAYLOAD), **without_payload(fields))


def emit_many(events):
    emit_events(
        NewEvent(event_type=TYPE, payload=fields.get("payload", PAYLOAD), **without_payload(fields))
        for fields in events
    )


def without_payload(fields):
    return {name: value for name, value in fields.items() if name != "payload"}


WAYS = {"emit_event": emit_one_by_one, "emit_events": emit_many}


@pytest.fixture
def emitted():
    return Emitted()


@contextmanager
def writes_nothing():
    count = OutboxEvent.objects.count()
    yield
    assert OutboxEvent.objects.count() == count


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("field", [*ID_FIELDS, "metadata key", "metadata value", "payload"])
def test_hostile_text_in_each_field_is_just_text(emitted, topic_reader, field, way):
    def fields(text):
        if field == "payload":
            return {"payload": ConversationCreatedPayload(title=text)}
        if field.startswith("metadata"):
            return {"metadata": {text: "x"} if field.endswith("key") else {"x": text}}
        return {field: text}

    emitted.emit(way, *(fields(text) for text in TEXTS))
    emitted.assert_published(topic_reader)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("field", ID_FIELDS)
def test_what_cannot_be_stored_is_refused_by_name_and_takes_its_company_with_it(emitted, field, way):
    for text in [*REFUSED, *([""] if field in REQUIRED else [])]:
        with writes_nothing(), pytest.raises(InvalidEventField, match=field) as raised:
            emitted.emit(way, {}, {field: text}, {})
        assert len(str(raised.value)) < 300  # a message for people, not the megabyte


@pytest.mark.parametrize("way", WAYS)
def test_metadata_that_cannot_be_stored_is_refused(emitted, way):
    for text in ("\x00", "\ud800"):
        for metadata in ({text: "x"}, {"x": text}, {f"k{n}": "v" for n in range(10_000)} | {"x": text}):
            with writes_nothing(), pytest.raises(InvalidEventField, match="metadata") as raised:
                emitted.emit(way, {"metadata": metadata})
            assert len(str(raised.value)) < 300
    for metadata in ({"x": 1}, {1: "x"}, {"x": None}, {"x": b"bytes"}, {b"x": "y"}, {"x": ["y"]}):
        with writes_nothing(), pytest.raises(InvalidEventField, match="metadata"):
            emitted.emit(way, {"metadata": metadata})


@pytest.mark.parametrize("way", WAYS)
def test_a_megabyte_is_refused_and_what_is_just_below_the_limit_arrives(emitted, topic_reader, way):
    for large in (
        {"metadata": {"x": "x" * 1_000_000}},
        {"metadata": {"x" * 1_000_000: "x"}},
        {"payload": ConversationCreatedPayload(title="x" * 1_000_000)},
        {"metadata": {f"key{n}": "v" * 100 for n in range(10_000)}},
    ):
        with writes_nothing(), pytest.raises(EventTooLarge, match="MAX_EVENT_BYTES") as raised:
            emitted.emit(way, {}, large)
        assert len(str(raised.value)) < 300
    emitted.emit(
        way,
        {"metadata": {"x": "\U0001f600" * 220_000}},
        {"metadata": {f"key{n}": "'\\.\t%s{}" for n in range(10_000)}},
        {"payload": ConversationCreatedPayload(title="\x00" * 880_000)},
    )
    emitted.assert_published(topic_reader)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("field", ["event_type", "event_version"])
def test_a_hostile_type_or_version_is_unknown(way, field):
    for text in [*TEXTS, *REFUSED, ""]:
        event = {"event_type": TYPE, "event_version": "v1", field: text, "aggregate_id": "c1", "tenant_id": "t1"}
        started = time.monotonic()
        with writes_nothing(), transaction.atomic(), pytest.raises(UnknownEventType) as raised:
            if way == "emit_event":
                emit_event(payload=PAYLOAD, **event)
            else:
                emit_events([NewEvent(payload=PAYLOAD, **event)])
        assert time.monotonic() - started < 2, "looking for near misses took too long"
        assert len(str(raised.value)) < 600


def test_random_text_is_stored_exactly_or_refused(emitted, topic_reader):
    """Hypothesis thinks of the texts; whether each is accepted is known beforehand."""

    @hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        way=st.sampled_from(sorted(WAYS)),
        ids=st.fixed_dictionaries({}, optional=dict.fromkeys(ID_FIELDS, any_text)),
        metadata=st.dictionaries(any_text, any_text, max_size=5),
    )
    def check(way, ids, metadata):
        is_good = (
            all(can_be_stored(text) for text in ids.values())
            and all(ids.get(name) != "" for name in REQUIRED)
            and all(can_be_stored(text, 10**9) for entry in metadata.items() for text in entry)
        )
        before = OutboxEvent.objects.count()
        try:
            emitted.emit(way, {**ids, "metadata": metadata})
        except EventContractError:
            assert not is_good
            assert OutboxEvent.objects.count() == before
        else:
            assert is_good

    check()
    assert emitted.expected, "no text was accepted"
    emitted.assert_published(topic_reader)


@pytest.mark.parametrize("way", WAYS)
def test_a_hostile_trace_context_does_no_harm(emitted, topic_reader, way):
    """Headers of a request, as the tracing middleware reads them: bytes taken for Latin-1."""
    trace_id, count = uuid.uuid4().hex, 0
    for text in [*TEXTS, *REFUSED, "k=v", "vendor=" + "x" * 600, "%00%ed%a0%80", "a=%00,b=%F0%9F%98%80"]:
        text = text.encode(errors="surrogatepass").decode("latin-1")
        for headers in (
            {"traceparent": text},
            {"traceparent": f"00-{trace_id}-{'1' * 16}-01", "tracestate": text, "baggage": f"k={text}"},
            {"traceparent": f"00-{trace_id}-{'1' * 16}-01", "tracestate": f"v={text}", "baggage": text},
        ):
            token = context.attach(propagate.extract(headers))
            try:
                emitted.emit(way, {"correlation_id": str(count)})
            finally:
                context.detach(token)
            count += 1
    emitted.assert_published(topic_reader)
    assert OutboxEvent.objects.filter(traceparent__contains=trace_id).count() > count / 2
    assert OutboxEvent.objects.exclude(baggage="").exists()


def test_baggage_set_in_the_process_is_published_or_refused(emitted, topic_reader):
    """OpenTelemetry leaves out what is longer than a header may be."""

    def emit_with_baggage(text):
        token = context.attach(baggage.set_baggage("key", text))
        try:
            emitted.emit("emit_event", {})
        finally:
            context.detach(token)

    for text in [*TEXTS, "x" * 1_000_000]:
        emit_with_baggage(text)
    with writes_nothing(), pytest.raises(EventContractError, match="surrogate"):
        emit_with_baggage("\ud800")
    emitted.assert_published(topic_reader)


def test_async_code_is_refused_and_accepted_alike(emitted, topic_reader):
    async def run():
        atomic = transaction.atomic()
        await sync_to_async(atomic.__enter__)()
        for text in TEXTS:
            fields = {"aggregate_id": text, "tenant_id": text, "event_id": uuid.uuid4(), "metadata": {text: text}}
            await aemit_event(TYPE, PAYLOAD, **fields)
            emitted.expected[str(fields["event_id"])] = fields
        for text in REFUSED:
            with pytest.raises(InvalidEventField, match="tenant_id"):
                await aemit_event(TYPE, PAYLOAD, aggregate_id="c1", tenant_id=text)
        await sync_to_async(atomic.__exit__)(None, None, None)
        await sync_to_async(lambda: connection.close())()

    asyncio.run(run())
    emitted.assert_published(topic_reader)
