"""Events of conversations on given days."""

from datetime import UTC, date, datetime, time, timedelta

from django.db import transaction

from events_outbox import Event, NewEvent, emit_events
from events_outbox.testing import make_event
from voicehelper.proto.conversation_pb2 import ConversationCompletedPayload, MessageSentPayload

DAY = date(2026, 3, 31)


def at(day: date) -> datetime:
    return datetime.combine(day, time(12), UTC)


def reply(
    tenant_id,
    day: date = DAY,
    *,
    cost: float = 0.0,
    tokens: tuple[int, int] = (0, 0),
    latency: float = 0.4,
    model: str = "small",
    mode: str = "chat",
) -> Event:
    """An assistant's message."""
    payload = MessageSentPayload(
        role="assistant",
        mode=mode,
        model=model,
        input_tokens=tokens[0],
        output_tokens=tokens[1],
        cost_dollars=cost,
        latency_seconds=latency,
    )
    return make_event("conversation.message.sent", payload, tenant_id=tenant_id, timestamp=at(day))


def history(tenant_id, days: int = 3, **usage) -> list[Event]:
    """A reply on each of the days before DAY."""
    return [reply(tenant_id, DAY - timedelta(days=number + 1), **usage) for number in range(days)]


def emit(*events: Event) -> None:
    """Emit made events, so that they are in the outbox as others are."""
    names = ("event_type", "payload", "aggregate_id", "tenant_id", "event_id", "timestamp", "correlation_id")
    with transaction.atomic():
        emit_events([NewEvent(**{name: getattr(event, name) for name in names}) for event in events])


def completed(tenant_id, day: date = DAY, mode: str = "chat") -> Event:
    payload = ConversationCompletedPayload(mode=mode)
    return make_event("conversation.completed", payload, tenant_id=tenant_id, timestamp=at(day))
