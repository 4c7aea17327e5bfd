"""`emit_event()` and its kin: the only door for producers.

An event is one row in the outbox, inserted in the transaction of the business write: it exists if and only if
that write committed. Kafka is not touched, so Kafka being away never fails or slows a request.

Order: events of one aggregate are published in the order their transactions committed, provided the emit comes
*after* the write (or `select_for_update()`) that serialises the aggregate, as it does in a service function that
changes the row and then emits.
"""

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from asgiref.sync import sync_to_async
from django.db import DEFAULT_DB_ALIAS, connections
from google.protobuf.message import Message
from opentelemetry import propagate, trace
from uuid_utils.compat import uuid7

from monitoring import context

from .catalog import event_type_for
from .conf import outbox_settings
from .exceptions import EventTooLarge, InvalidEventField, NotInTransaction, PayloadMismatch
from .handlers import current_event
from .models import OutboxEvent
from .proto.base_event_pb2 import BaseEvent

_ID_MAX_CHARS = 255


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
    row = _build_row(event, _trace_carrier())
    row.save(force_insert=True)
    return row


def emit_events(events: Iterable[NewEvent]) -> list[OutboxEvent]:
    """Insert many events, in their order, in one statement. All or none. Raises as `emit_event()` does."""
    _require_transaction()
    carrier = _trace_carrier()
    rows: list[OutboxEvent] = OutboxEvent.objects.bulk_create([_build_row(event, carrier) for event in events])
    return rows


async def aemit_event(event_type: str, payload: Message, **fields: Any) -> OutboxEvent:
    """`emit_event()` for async code.

    Django's transactions belong to one thread, so the block that writes and emits is best a synchronous service
    function called through `sync_to_async`. This is for async code that has opened its transaction on Django's
    thread-sensitive executor; outside one it raises NotInTransaction, like `emit_event()`.
    """
    return await sync_to_async(emit_event, thread_sensitive=True)(event_type, payload, **fields)


def _require_transaction() -> None:
    if not connections[DEFAULT_DB_ALIAS].in_atomic_block:
        raise NotInTransaction(
            "emit_event() needs the transaction of the write it reports: call it inside `with transaction.atomic():`"
        )


def _trace_carrier() -> dict[str, str]:
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier


def _build_row(event: NewEvent, carrier: Mapping[str, str]) -> OutboxEvent:
    """Validate against the catalog, build the BaseEvent and serialise it, once."""
    entry = event_type_for(event.event_type, event.event_version)
    if not isinstance(event.payload, entry.payload):
        raise PayloadMismatch(
            f"{entry.name} {entry.version} carries a {entry.payload.__name__}, not a {type(event.payload).__name__}"
        )
    if event.timestamp is not None and event.timestamp.tzinfo is None:
        raise InvalidEventField("timestamp needs a time zone, e.g. django.utils.timezone.now()")
    event_id = event.event_id or uuid7()
    if not isinstance(event_id, uuid.UUID):
        raise InvalidEventField(f"event_id must be a uuid.UUID, not {type(event_id).__name__}")

    cause = current_event.get()
    base = BaseEvent(
        event_id=str(event_id),
        event_type=entry.name,
        event_version=entry.version,
        aggregate_id=_text("aggregate_id", event.aggregate_id, required=True),
        tenant_id=_text("tenant_id", event.tenant_id, required=True),
        user_id=_text("user_id", event.user_id),
        correlation_id=_text("correlation_id", event.correlation_id or _default_correlation_id(str(event_id))),
        causation_id=_text("causation_id", event.causation_id or (str(cause.event_id) if cause else "")),
    )
    for name, text in event.metadata.items():
        base.metadata[_text("metadata key", name, max_chars=None)] = _text(f"metadata[{name!r}]", text, max_chars=None)
    base.timestamp.FromDatetime(event.timestamp or datetime.now(UTC))
    base.payload.Pack(event.payload)

    # Deterministic: the same event always gives the same bytes (map entries have no order of their own).
    value = base.SerializeToString(deterministic=True)
    limit = outbox_settings().MAX_EVENT_BYTES
    if len(value) > limit:
        raise EventTooLarge(
            f"{entry.name} has {len(value)} bytes, more than the {limit} of MAX_EVENT_BYTES: "
            "store large content elsewhere and put a reference to it into the event"
        )
    return OutboxEvent(
        event_id=event_id,
        event_type=entry.name,
        event_version=entry.version,
        aggregate_id=base.aggregate_id,
        tenant_id=base.tenant_id,
        topic=entry.topic,
        correlation_id=base.correlation_id,
        traceparent=carrier.get("traceparent", ""),
        tracestate=carrier.get("tracestate", "")[:512],
        baggage=carrier.get("baggage", ""),
        value=value,
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
