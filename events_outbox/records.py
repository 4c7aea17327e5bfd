"""A Kafka record of an event: what the relay writes and what a consumer reads."""

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache

from google.protobuf.message import DecodeError, Message

from .catalog import event_type_for, upcast
from .exceptions import PayloadMismatch, UnknownEventType
from .handlers import Event, Handler
from .models import DeadLetter
from .proto.base_event_pb2 import BaseEvent

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


@lru_cache(maxsize=10_000)  # a batch's: each is asked for when it is parsed, and again when it is handled
def event_id_of(text: str) -> uuid.UUID:
    """The event id. Raises ValueError for what is none."""
    return uuid.UUID(text)


class UnreadableRecord(Exception):
    """A record that is no event this process can read. `reason` is a `DeadLetter.Reason`."""

    def __init__(self, reason: DeadLetter.Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A consumed record, whole: what a dead letter keeps."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes | None]] = field(default_factory=list)
    timestamp_ms: int = -1

    def placeholder_id(self) -> uuid.UUID:
        """An id for a record that has no readable event id: the same record always gives the same one."""
        digest = hashlib.sha256(self.value or b"").hexdigest()
        return uuid.uuid5(_NO_EVENT, f"{self.topic}/{self.partition}/{self.offset}/{self.timestamp_ms}/{digest}")

    def text_headers(self) -> dict[str, str]:
        return {name: (value or b"").decode("latin-1") for name, value in self.headers}

    def envelope(self) -> BaseEvent:
        """Parse the value. Raises UnreadableRecord (unparsable) unless it is a BaseEvent with an event id."""
        if not self.value:
            raise UnreadableRecord(DeadLetter.Reason.UNPARSABLE, "the record has no value")
        try:
            base = BaseEvent.FromString(self.value)
            event_id_of(base.event_id)
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
        payload = _payload(base, entry.payload)
        if version is None or version == base.event_version:
            version = base.event_version
        else:
            payload = _upcast(base, payload, version)
        return Event(
            event_id=event_id_of(base.event_id),
            event_type=base.event_type,
            event_version=version,
            aggregate_id=base.aggregate_id,
            tenant_id=base.tenant_id,
            user_id=base.user_id,
            timestamp=_timestamp(base),
            payload=payload,
            metadata=dict(base.metadata) if base.metadata else {},
            correlation_id=base.correlation_id,
            causation_id=base.causation_id,
            headers=self.text_headers(),
            topic=self.topic,
            partition=self.partition,
            offset=self.offset,
        )


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


def _payload(base: BaseEvent, expected: type[Message]) -> Message:
    name = base.payload.type_url.rpartition("/")[2]
    if name != expected.DESCRIPTOR.full_name:
        raise UnreadableRecord(
            DeadLetter.Reason.PAYLOAD_MISMATCH,
            f"{base.event_type} {base.event_version} carries {name or 'no payload'}, "
            f"not {expected.DESCRIPTOR.full_name}",
        )
    try:
        return expected.FromString(base.payload.value)
    except DecodeError as error:
        raise UnreadableRecord(DeadLetter.Reason.PAYLOAD_MISMATCH, f"damaged {name}: {error}") from None


def _upcast(base: BaseEvent, payload: Message, version: str) -> Message:
    try:
        return upcast(base.event_type, base.event_version, payload, to=version)
    except PayloadMismatch as error:
        raise UnreadableRecord(DeadLetter.Reason.PAYLOAD_MISMATCH, str(error)) from error


@dataclass(frozen=True, slots=True)
class Delivery:
    """A record that a consumer has to do something about: handle its event, or keep it as a dead letter."""

    record: Record
    event_id: uuid.UUID
    event: Event | None = None
    handler: Handler | None = None
    unreadable: UnreadableRecord | None = None
    event_type: str = ""
    tenant_id: str = ""


def trace_carrier(headers: Mapping[str, str]) -> dict[str, str]:
    """The trace context among the headers."""
    return {name: headers[name] for name in ("traceparent", "tracestate", "baggage") if name in headers}
