"""The consumer `analytics`: counts conversations and messages per tenant, day and mode."""

from collections import defaultdict
from datetime import UTC
from uuid import UUID

from events_outbox import Consumer, Event, PermanentEventError
from voicehelper.conversations.events import CONVERSATION_CREATED, MESSAGE_SENT
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload, MessageSentPayload

from .services import Count, TotalKey, add_to_totals

analytics = Consumer("analytics", group_id="analytics-service")


# One handler for both types: two would go through the rows of a batch twice, and so leave the sorted order
# that keeps concurrent workers from deadlocking.
@analytics.handles_batch(CONVERSATION_CREATED, MESSAGE_SENT)
def count(events: list[Event]) -> None:
    """Add a batch of events to the daily totals, by the UTC day on which they happened."""
    counts: defaultdict[TotalKey, Count] = defaultdict(Count)
    for event in events:
        payload = event.payload
        if isinstance(payload, ConversationCreatedPayload):
            counts[_key(event, payload.mode)].conversations += 1
        elif isinstance(payload, MessageSentPayload):
            counts[_key(event, payload.mode)].messages += 1
    add_to_totals(counts=counts)


def _key(event: Event, mode: str) -> TotalKey:
    try:
        tenant_id = UUID(event.tenant_id)
    except ValueError as error:
        raise PermanentEventError(f"tenant_id {event.tenant_id!r} is not a UUID") from error
    return TotalKey(tenant_id, event.timestamp.astimezone(UTC).date(), mode)
