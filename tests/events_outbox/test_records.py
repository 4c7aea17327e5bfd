"""Reading records: whatever the bytes are, an event or a reason why not, never another error."""

import uuid
from datetime import UTC

from hypothesis import given
from hypothesis import strategies as st

from events_outbox import Event
from events_outbox.proto.base_event_pb2 import BaseEvent
from events_outbox.records import Record, UnreadableRecord
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload


def valid_bytes():
    base = BaseEvent(
        event_id=str(uuid.UUID(int=7)),
        event_type="conversation.created",
        event_version="v1",
        aggregate_id="c1",
        tenant_id="t1",
        metadata={"k": "v"},
    )
    base.timestamp.seconds = 1_800_000_000
    base.payload.Pack(ConversationCreatedPayload(title="hello"))
    return base.SerializeToString()


def record(value, headers=()):
    return Record(topic="t", partition=0, offset=0, key=None, value=value, headers=list(headers))


def read(value, headers=()):
    """The event or the reason why there is none. Any other error fails the test."""
    one = record(value, headers)
    try:
        return one.event(one.envelope())
    except UnreadableRecord as error:
        return error.reason


@given(st.binary(max_size=200))
def test_random_bytes(value):
    assert read(value) is not None


@given(st.data())
def test_damaged_events(data):
    value = bytearray(valid_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        value[data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(0, 255))
    assert read(bytes(value)) is not None


@given(st.integers(min_value=-(2**63), max_value=2**63 - 1), st.integers(min_value=-(2**31), max_value=2**31 - 1))
def test_timestamps_out_of_range(seconds, nanos):
    base = BaseEvent.FromString(valid_bytes())
    base.timestamp.seconds, base.timestamp.nanos = seconds, nanos
    result = read(base.SerializeToString())
    try:
        expected = base.timestamp.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        assert result == "unparsable"
    else:
        assert result.timestamp == expected


@given(st.datetimes(timezones=st.just(UTC)))
def test_timestamps_in_range(given):
    base = BaseEvent.FromString(valid_bytes())
    base.timestamp.FromDatetime(given)
    assert read(base.SerializeToString()).timestamp == given


@given(st.lists(st.tuples(st.text(max_size=5), st.one_of(st.none(), st.binary(max_size=20)))))
def test_any_headers(headers):
    assert isinstance(read(valid_bytes(), headers), Event)


def test_the_same_record_always_gets_the_same_placeholder_id_and_another_one_another():
    assert record(b"x").placeholder_id() == record(b"x").placeholder_id()
    others = [record(b"y"), Record(topic="t", partition=0, offset=1, key=None, value=b"x")]
    assert len({one.placeholder_id() for one in [record(b"x"), *others]}) == 3
