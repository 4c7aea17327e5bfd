"""A Kafka record of an event: what the relay writes and what a consumer reads."""

import hashlib
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC

from google.protobuf.message import DecodeError, Message

from .catalog import event_type_for
from .exceptions import UnknownEventType
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
        """The event with its typed payload.

        Raises UnreadableRecord when the catalog has no such type (unknown_type), or when the payload is another
        message or damaged (payload_mismatch).
        """
        try:
            entry = event_type_for(base.event_type, base.event_version)
        except UnknownEventType as error:
            raise UnreadableRecord(DeadLetter.Reason.UNKNOWN_TYPE, str(error)) from None
        try:
            timestamp = base.timestamp.ToDatetime(tzinfo=UTC)
        except (ValueError, OverflowError) as error:
            raise UnreadableRecord(DeadLetter.Reason.UNPARSABLE, f"timestamp out of range: {error}") from None
        return Event(
            event_id=uuid.UUID(base.event_id),
            event_type=base.event_type,
            event_version=base.event_version,
            aggregate_id=base.aggregate_id,
            tenant_id=base.tenant_id,
            user_id=base.user_id,
            timestamp=timestamp,
            payload=_payload(base, entry.payload),
            metadata=dict(base.metadata),
            correlation_id=base.correlation_id,
            causation_id=base.causation_id,
            headers=self.text_headers(),
            topic=self.topic,
            partition=self.partition,
            offset=self.offset,
        )


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


def trace_carrier(headers: Mapping[str, str]) -> dict[str, str]:
    """The trace context among the headers."""
    return {name: headers[name] for name in ("traceparent", "tracestate", "baggage") if name in headers}
