"""A Kafka record of an event: what the relay writes and what a consumer reads."""

import hashlib
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from google.protobuf.message import DecodeError, Message

from .catalog import EventType, event_type_for, upcast
from .exceptions import PayloadMismatch, UnknownEventType
from .handlers import Event, Route
from .models import DeadLetter
from .proto.base_event_pb2 import BaseEvent

Headers = Sequence[tuple[str, bytes | None]]

CONTENT_TYPE = f"application/x-protobuf; messageType={BaseEvent.DESCRIPTOR.full_name}"
_CONTENT_TYPE_BYTES = CONTENT_TYPE.encode()
HEADER_FIELDS = (
    "event_type",
    "tenant_id",
    "correlation_id",
    "event_id",
    "event_version",
    "traceparent",
    "tracestate",
    "baggage",
)
"""Columns of the outbox that become headers of the same name."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_CANONICAL_UUID = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}").fullmatch
_NO_EVENT = uuid.UUID("5b6a1a04-3f0c-5d52-9d7e-0d1c7f2a9d11")


def headers_for(fields: Sequence[bytes]) -> dict[str, str | bytes | None]:
    """The record's headers, from the values of HEADER_FIELDS (specification, Publish: headers; plus ours).

    Of the trace context, what is empty is left out. Written out, since the relay comes by here for each event; and a
    dict, which the client takes faster than a list of pairs.
    """
    event_type, tenant_id, correlation_id, event_id, event_version, traceparent, tracestate, baggage = fields
    headers: dict[str, str | bytes | None] = {
        "event_type": event_type,
        "tenant_id": tenant_id,
        "correlation_id": correlation_id,
        "event_id": event_id,
        "event_version": event_version,
        "content-type": _CONTENT_TYPE_BYTES,
    }
    if traceparent:
        headers["traceparent"] = traceparent
    if tracestate:
        headers["tracestate"] = tracestate
    if baggage:
        headers["baggage"] = baggage
    return headers


class UnreadableRecord(Exception):
    """A record that is no event this process can read. `reason` is a `DeadLetter.Reason`."""

    def __init__(self, reason: DeadLetter.Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Record:
    """A consumed record, whole: what a dead letter keeps.

    `headers`: pairs of name and value, or a function that returns them, called when somebody asks: for most records
    nobody does, and to take them out of the client is what costs most.
    """

    __slots__ = ("_headers", "key", "offset", "partition", "timestamp_ms", "topic", "value")

    def __init__(
        self,
        topic: str,
        partition: int,
        offset: int,
        key: bytes | None,
        value: bytes | None,
        headers: Headers | Callable[[], Headers] = (),
        timestamp_ms: int = -1,
    ) -> None:
        self.topic = topic
        self.partition = partition
        self.offset = offset
        self.key = key
        self.value = value
        self._headers = headers
        self.timestamp_ms = timestamp_ms

    def __repr__(self) -> str:
        return f"Record({self.topic}/{self.partition}/{self.offset})"

    @property
    def headers(self) -> Headers:
        if callable(self._headers):
            self._headers = self._headers()
        return self._headers

    def placeholder_id(self) -> uuid.UUID:
        """An id for a record that has no readable event id: the same record always gives the same one."""
        digest = hashlib.sha256(self.value or b"").hexdigest()
        return uuid.uuid5(_NO_EVENT, f"{self.topic}/{self.partition}/{self.offset}/{self.timestamp_ms}/{digest}")

    def text_headers(self) -> dict[str, str]:
        return {name: (value or b"").decode("latin-1") for name, value in self.headers}

    def envelope(self) -> BaseEvent:
        """Parse the value; the event id comes in its canonical form.

        Raises UnreadableRecord (unparsable) unless it is a BaseEvent with an event id.
        """
        if not self.value:
            raise UnreadableRecord(DeadLetter.Reason.UNPARSABLE, "the record has no value")
        try:
            base = BaseEvent.FromString(self.value)
            if not _CANONICAL_UUID(base.event_id):
                base.event_id = str(uuid.UUID(base.event_id))
        except (DecodeError, ValueError) as error:
            raise UnreadableRecord(DeadLetter.Reason.UNPARSABLE, f"not a BaseEvent: {error}") from None
        return base

    def event(self, base: BaseEvent, version: str | None = None) -> Event:
        """The event with its typed payload, upcast to `version`; None leaves it as it was emitted.

        Raises UnreadableRecord when the catalog has no such type (unknown_type), or when the payload, or what an
        upcaster made of it, is another message or damaged (payload_mismatch); and what an upcaster raises.
        """
        try:
            entry = event_type_for(base.event_type, base.event_version)
        except UnknownEventType as error:
            raise UnreadableRecord(DeadLetter.Reason.UNKNOWN_TYPE, str(error)) from None
        payload, metadata = _payload(base, entry), base.metadata
        if version is None or version == base.event_version:
            version = base.event_version
        else:
            payload = _upcast(base, payload, version)
        return Event(
            event_id=uuid.UUID(base.event_id),
            event_type=base.event_type,
            event_version=version,
            aggregate_id=base.aggregate_id,
            tenant_id=base.tenant_id,
            user_id=base.user_id,
            timestamp=_timestamp(base),
            payload=payload,
            metadata={name: metadata[name] for name in metadata},  # dict() takes twice as long
            correlation_id=base.correlation_id,
            causation_id=base.causation_id,
            headers=_TextHeaders(self),
            topic=self.topic,
            partition=self.partition,
            offset=self.offset,
        )


class _TextHeaders(Mapping[str, str]):
    """A record's headers as text, made when somebody asks."""

    __slots__ = ("_record", "_text")

    def __init__(self, record: Record) -> None:
        self._record = record
        self._text: dict[str, str] | None = None

    def _read(self) -> dict[str, str]:
        if self._text is None:
            self._text = self._record.text_headers()
        return self._text

    def __getitem__(self, name: str) -> str:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __repr__(self) -> str:
        return repr(self._read())


def _timestamp(base: BaseEvent) -> datetime:
    """In UTC, to the microsecond. Message.ToDatetime() takes twice as long."""
    given = base.timestamp
    seconds, nanos = given.seconds, given.nanos
    try:
        if 0 <= nanos < 1_000_000_000:
            return _EPOCH + timedelta(0, seconds, nanos // 1000)
    except OverflowError:
        pass
    raise UnreadableRecord(DeadLetter.Reason.UNPARSABLE, f"timestamp out of range: {seconds} s, {nanos} ns")


def _payload(base: BaseEvent, entry: EventType) -> Message:
    carried, expected = base.payload, entry.payload
    # The usual URL first: a message's name takes long to ask for.
    if (url := carried.type_url) != entry.type_url and (
        (name := url.rpartition("/")[2]) != expected.DESCRIPTOR.full_name
    ):
        raise UnreadableRecord(
            DeadLetter.Reason.PAYLOAD_MISMATCH,
            f"{base.event_type} {base.event_version} carries {name or 'no payload'}, "
            f"not {expected.DESCRIPTOR.full_name}",
        )
    try:
        return expected.FromString(carried.value)
    except DecodeError as error:
        raise UnreadableRecord(
            DeadLetter.Reason.PAYLOAD_MISMATCH, f"damaged {expected.DESCRIPTOR.full_name}: {error}"
        ) from None


def _upcast(base: BaseEvent, payload: Message, version: str) -> Message:
    try:
        return upcast(base.event_type, base.event_version, payload, to=version)
    except PayloadMismatch as error:
        raise UnreadableRecord(DeadLetter.Reason.PAYLOAD_MISMATCH, str(error)) from error


@dataclass(frozen=True, slots=True)
class Delivery:
    """A record that a consumer has to do something about: handle its event, or keep it as a dead letter.

    `event_id`: in its canonical text form. `base` and `route` are None where the record is no event to be read.
    """

    record: Record
    event_id: str
    base: BaseEvent | None = None
    route: Route | None = None
    unreadable: UnreadableRecord | None = None

    @property
    def event_type(self) -> str:
        return self.base.event_type if self.base is not None else ""

    @property
    def tenant_id(self) -> str:
        return self.base.tenant_id if self.base is not None else ""
