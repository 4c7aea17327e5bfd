"""What an event adds to which total: the same for the consumer and for a rebuild."""

import math
from bisect import bisect_left
from dataclasses import dataclass
from datetime import UTC, date
from decimal import Decimal
from uuid import UUID

from events_outbox import Event, PermanentEventError
from voicehelper.proto.conversation_pb2 import (
    ConversationCompletedPayload,
    ConversationCreatedPayload,
    ConversationFailedPayload,
    MessageSentPayload,
)

from .models import COST_PLACES, LATENCY_BUCKETS, LATENCY_PLACES, MEASURES, DailyTotal

COST_STEP = Decimal(1).scaleb(-COST_PLACES)
LATENCY_STEP = Decimal(1).scaleb(-LATENCY_PLACES)
LARGEST_AMOUNT = 1e9
"""Of dollars or seconds in one event: more is an error of whoever emitted it."""
MODE_MAX_CHARS = DailyTotal._meta.get_field("mode").max_length or 0
MODEL_MAX_CHARS = DailyTotal._meta.get_field("model").max_length or 0
_BOUNDS = [seconds for _, seconds in LATENCY_BUCKETS]

Count = dict[str, int | Decimal]
"""MEASURES and what is to be added to each."""


@dataclass(order=True, frozen=True)
class TotalKey:
    tenant_id: UUID
    day: date
    mode: str
    model: str = ""


class Counts(dict[TotalKey, Count]):
    """What events add to the daily totals, by the UTC day on which they happened."""

    def __missing__(self, key: TotalKey) -> Count:
        count = self[key] = dict.fromkeys(MEASURES, 0)
        return count

    def add(self, event: Event) -> TotalKey:
        """Count one more event; return the total that it belongs to.

        Raises PermanentEventError for one that is no event of a conversation or carries what nobody can have counted.
        """
        payload = event.payload
        if isinstance(payload, MessageSentPayload):
            key = _key(event, payload.mode, payload.model)
            # Before anything is added: what is refused has added nothing.
            used = _usage(payload) if payload.model else {}
            count = self[key]
            count["messages"] += 1
            for name, value in used.items():
                count[name] += value
            return key
        if isinstance(payload, ConversationCreatedPayload):
            name = "conversations"
        elif isinstance(payload, ConversationCompletedPayload):
            name = "completed"
        elif isinstance(payload, ConversationFailedPayload):
            name = "failed"
        else:
            raise PermanentEventError(f"{event.event_type} is not counted")
        key = _key(event, payload.mode)
        self[key][name] += 1
        return key


def _key(event: Event, mode: str, model: str = "") -> TotalKey:
    try:
        tenant_id = UUID(event.tenant_id)
    except ValueError as error:
        raise PermanentEventError(f"tenant_id {event.tenant_id!r} is not a UUID") from error
    for name, text, max_chars in (("mode", mode, MODE_MAX_CHARS), ("model", model, MODEL_MAX_CHARS)):
        if len(text) > max_chars or "\0" in text:
            raise PermanentEventError(f"{name} {text[:max_chars]!r} is too long (over {max_chars}) or holds a NUL")
    return TotalKey(tenant_id, event.timestamp.astimezone(UTC).date(), mode, model)


def _usage(payload: MessageSentPayload) -> Count:
    """What a reply of a model adds beside the message."""
    if payload.input_tokens < 0 or payload.output_tokens < 0:
        raise PermanentEventError(f"{payload.input_tokens} input and {payload.output_tokens} output tokens")
    latency = _amount("latency_seconds", payload.latency_seconds, LATENCY_STEP)
    return {
        "replies": 1,
        "input_tokens": payload.input_tokens,
        "output_tokens": payload.output_tokens,
        "cost_dollars": _amount("cost_dollars", payload.cost_dollars, COST_STEP),
        "latency_seconds": latency,
        LATENCY_BUCKETS[bisect_left(_BOUNDS, float(latency))][0]: 1,
    }


def _amount(name: str, value: float, step: Decimal) -> Decimal:
    """The number that the double stands for, in whole steps. Added up, doubles would depend on the order."""
    if not math.isfinite(value) or not 0 <= value < LARGEST_AMOUNT:
        raise PermanentEventError(f"{name} is {value}")
    return Decimal(repr(value)).quantize(step)
