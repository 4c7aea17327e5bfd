"""`emit_event()` and its kin: the only door for producers.

An event is one row in the outbox, inserted in the transaction of the business write: it exists if and only if
that write committed. Kafka is not touched, so Kafka being away never fails or slows a request.

Order: events of one aggregate are published in the order their transactions committed, provided the emit comes
*after* the write (or `select_for_update()`) that serialises the aggregate, as it does in a service function that
changes the row and then emits.
"""

import struct
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from asgiref.sync import sync_to_async
from django.db import connection
from google.protobuf.message import Message
from opentelemetry import trace
from uuid_utils import uuid7

from monitoring import context
from monitoring.database import timed

from .catalog import event_type_for
from .conf import outbox_settings
from .exceptions import EventTooLarge, InvalidEventField, NotInTransaction, PayloadMismatch
from .handlers import current_event
from .models import OutboxEvent
from .proto.base_event_pb2 import BaseEvent
from .trace_context import W3C

TraceFields = tuple[str, str, str]
"""traceparent, tracestate, baggage."""
Columns = tuple[uuid.UUID, str, str, str, str, str, str, str, str, str, bytes]
"""The values of COLUMNS."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ID_MAX_CHARS = 255
COLUMNS = (
    "event_id",
    "event_type",
    "event_version",
    "aggregate_id",
    "tenant_id",
    "topic",
    "correlation_id",
    "traceparent",
    "tracestate",
    "baggage",
    "value",
)
_FIELDS = ("id", "transaction_id", *COLUMNS[:-1], "created_at", "value")
_TARGET = f"events_outbox_outboxevent ({', '.join(COLUMNS)})"
_INSERT_SQL = (
    f"INSERT INTO {_TARGET} VALUES ({', '.join(['%s'] * len(COLUMNS))}) RETURNING id, transaction_id::text, created_at"
)
_COPY_SQL = f"COPY {_TARGET} FROM STDIN (FORMAT binary)"
_LENGTH = struct.Struct(">i").pack
_COPY_HEADER = b"PGCOPY\n\xff\r\n\x00" + bytes(8)
_COPY_ROW = struct.pack(">hi", len(COLUMNS), 16)  # the first field, a UUID, has 16 bytes
_COPY_TRAILER = struct.pack(">h", -1)


@dataclass(frozen=True, kw_only=True)
class NewEvent:
    """An event to emit. Ids may be given as text or UUID.

    `aggregate_id`: what the event happened to; it is the Kafka key, and order is kept per aggregate.
    `timestamp`: when it happened, with time zone; None means now. `event_id`: None means a new UUIDv7.
    `correlation_id`: None means that of the event being handled, else of the request, else the trace id, else the
    event's own id. `causation_id`: None means the event being handled, if any.
    """

    event_type: str
    payload: Message
    aggregate_id: str | uuid.UUID
    tenant_id: str | uuid.UUID
    user_id: str | uuid.UUID = ""
    event_version: str = "v1"
    metadata: Mapping[str, str] = field(default_factory=dict)
    correlation_id: str | None = None
    causation_id: str | None = None
    event_id: uuid.UUID | None = None
    timestamp: datetime | None = None


def emit_event(
    event_type: str,
    payload: Message,
    *,
    aggregate_id: str | uuid.UUID,
    tenant_id: str | uuid.UUID,
    user_id: str | uuid.UUID = "",
    event_version: str = "v1",
    metadata: Mapping[str, str] | None = None,
    correlation_id: str | None = None,
    causation_id: str | None = None,
    event_id: uuid.UUID | None = None,
    timestamp: datetime | None = None,
) -> OutboxEvent:
    """Insert one event into the outbox, in the current transaction, and return its row.

    The arguments are those of `NewEvent` (specification, BaseEvent).

    Raises NotInTransaction outside `transaction.atomic()`, and an EventContractError for each misuse:
    UnknownEventType, PayloadMismatch, InvalidEventField, EventTooLarge. Nothing was written then.
    """
    event = NewEvent(
        event_type=event_type,
        payload=payload,
        aggregate_id=aggregate_id,
        tenant_id=tenant_id,
        user_id=user_id,
        event_version=event_version,
        metadata=metadata or {},
        correlation_id=correlation_id,
        causation_id=causation_id,
        event_id=event_id,
        timestamp=timestamp,
    )
    _require_transaction()
    columns = columns_of(event, _trace_fields())
    with connection.cursor() as cursor:
        cursor.execute(_INSERT_SQL, columns)
        outbox_id, transaction_id, created_at = cursor.fetchone()
    values = (outbox_id, int(transaction_id), *columns[:-1], created_at, columns[-1])
    row: OutboxEvent = OutboxEvent.from_db(connection.alias, _FIELDS, values)
    return row


def emit_events(events: Iterable[NewEvent]) -> list[uuid.UUID]:
    """Insert many events, in their order, in one statement, and return their event ids.

    All or none. Raises as `emit_event()` does.
    """
    _require_transaction()
    trace_fields = _trace_fields()
    rows = [columns_of(event, trace_fields) for event in events]
    if rows:
        _copy(rows)
    return [row[0] for row in rows]


async def aemit_event(event_type: str, payload: Message, **fields: Any) -> OutboxEvent:
    """`emit_event()` for async code.

    Django's transactions belong to one thread, so the block that writes and emits is best a synchronous service
    function called through `sync_to_async`. This is for async code that has opened its transaction on Django's
    thread-sensitive executor; outside one it raises NotInTransaction, like `emit_event()`.
    """
    return await sync_to_async(emit_event, thread_sensitive=True)(event_type, payload, **fields)


def _require_transaction() -> None:
    if not connection.in_atomic_block:
        raise NotInTransaction(
            "emit_event() needs the transaction of the write it reports: call it inside `with transaction.atomic():`"
        )


def _copy(rows: Sequence[Columns]) -> None:
    """Insert the rows by COPY: several times faster than INSERT, for the client and for the server."""
    with connection.cursor() as cursor:
        connection.validate_no_broken_transaction()
        data = _COPY_HEADER + b"".join([_copy_row(row) for row in rows]) + _COPY_TRAILER
        with timed(connection, _COPY_SQL), connection.wrap_database_errors, cursor.copy(_COPY_SQL) as copy:
            copy.write(data)


def _copy_row(columns: Columns) -> bytes:
    """A row in COPY's binary format: the number of fields, then each field with its length before it."""
    event_id, *texts, value = columns
    parts = [_COPY_ROW, event_id.bytes]
    for text in texts:
        encoded = text.encode()
        parts += (_LENGTH(len(encoded)), encoded)
    parts += (_LENGTH(len(value)), value)
    return b"".join(parts)


def _trace_fields() -> TraceFields:
    carrier: dict[str, str] = {}
    cause = current_event.get()
    # A handler of which no span is made is part of the event's trace all the same.
    parent = W3C.extract(cause.headers) if cause and trace.get_current_span() is trace.INVALID_SPAN else None
    try:
        W3C.inject(carrier, context=parent)
    except UnicodeEncodeError:
        raise InvalidEventField("the trace's baggage contains an unpaired surrogate, which is no valid text") from None
    return carrier.get("traceparent", ""), carrier.get("tracestate", "")[:512], carrier.get("baggage", "")


def columns_of(event: NewEvent, trace_fields: TraceFields) -> Columns:
    """The event's row: validated against the catalog, its BaseEvent built and serialised, once."""
    entry = event_type_for(event.event_type, event.event_version)
    if not isinstance(event.payload, entry.payload):
        raise PayloadMismatch(
            f"{entry.name} {entry.version} carries a {entry.payload.__name__}, not a {type(event.payload).__name__}"
        )
    event_id = event.event_id
    if event_id is None:
        new_id = uuid7()
        event_id, id_text = uuid.UUID(bytes=new_id.bytes), str(new_id)
    elif isinstance(event_id, uuid.UUID):
        id_text = str(event_id)
    else:
        raise InvalidEventField(f"event_id must be a uuid.UUID, not {type(event_id).__name__}")
    cause = current_event.get()
    aggregate_id = _text("aggregate_id", event.aggregate_id, required=True)
    tenant_id = _text("tenant_id", event.tenant_id, required=True)
    correlation_id = _text("correlation_id", event.correlation_id or _default_correlation_id(id_text))
    base = BaseEvent(
        event_id=id_text,
        event_type=entry.name,
        event_version=entry.version,
        aggregate_id=aggregate_id,
        tenant_id=tenant_id,
        user_id=_text("user_id", event.user_id),
        correlation_id=correlation_id,
        causation_id=_text("causation_id", event.causation_id or (str(cause.event_id) if cause else "")),
    )
    if event.metadata:
        metadata = base.metadata
        for name, text in event.metadata.items():
            key = _text("metadata key", name, max_chars=None)
            metadata[key] = _text(f"metadata[{name!r}]", text, max_chars=None)
    timestamp = base.timestamp
    if event.timestamp is None:
        timestamp.seconds, timestamp.nanos = divmod(time.time_ns(), 1_000_000_000)
    elif event.timestamp.tzinfo is None:
        raise InvalidEventField("timestamp needs a time zone, e.g. django.utils.timezone.now()")
    else:
        since = event.timestamp - _EPOCH  # as Timestamp.FromDatetime() does it, in a fifth of the time
        timestamp.seconds, timestamp.nanos = since.days * 86_400 + since.seconds, since.microseconds * 1000

    # Deterministic: the same event always gives the same bytes (map entries have no order of their own).
    payload = base.payload
    payload.type_url = entry.type_url
    payload.value = event.payload.SerializeToString(deterministic=True)
    value = base.SerializeToString(deterministic=True)
    limit = outbox_settings().MAX_EVENT_BYTES
    if len(value) > limit:
        raise EventTooLarge(
            f"{entry.name} has {len(value)} bytes, more than the {limit} of MAX_EVENT_BYTES: "
            "store large content elsewhere and put a reference to it into the event"
        )
    return (
        event_id,
        entry.name,
        entry.version,
        aggregate_id,
        tenant_id,
        entry.topic,
        correlation_id,
        *trace_fields,
        value,
    )


def _default_correlation_id(event_id: str) -> str:
    cause = current_event.get()
    if cause is not None and cause.correlation_id:
        return cause.correlation_id
    if requested := context.correlation_id.get():
        return requested
    span = trace.get_current_span().get_span_context()
    return trace.format_trace_id(span.trace_id) if span.is_valid else event_id


def _text(name: str, given: Any, *, required: bool = False, max_chars: int | None = _ID_MAX_CHARS) -> str:
    if type(given) is str and given.isascii() and 0 < len(given) <= (max_chars or len(given)) and "\x00" not in given:
        return given  # nearly always
    if isinstance(given, uuid.UUID):
        return str(given)
    if not isinstance(given, str):
        raise InvalidEventField(f"{name} must be text or a UUID, not {type(given).__name__}")
    if required and not given:
        raise InvalidEventField(f"{name} must not be empty")
    if max_chars is not None and len(given) > max_chars:
        raise InvalidEventField(f"{name} has {len(given)} characters; at most {max_chars} are allowed")
    if "\x00" in given:
        raise InvalidEventField(f"{name} contains a NUL character, which PostgreSQL text cannot hold")
    try:
        given.encode()
    except UnicodeEncodeError:
        raise InvalidEventField(f"{name} contains an unpaired surrogate, which is not valid Unicode text") from None
    return given
