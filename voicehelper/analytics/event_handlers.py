"""The consumer `analytics`: counts what happens in conversations per tenant, day, mode and model."""

from events_outbox import Consumer, Event
from voicehelper.conversations.events import (
    CONVERSATION_COMPLETED,
    CONVERSATION_CREATED,
    CONVERSATION_FAILED,
    MESSAGE_SENT,
)

from .services import count_events

analytics = Consumer("analytics", group_id="analytics-service")


# One handler for all types: several would go through the rows of a batch more than once, and so leave the sorted order
# that keeps concurrent workers from deadlocking.
@analytics.handles_batch(CONVERSATION_CREATED, MESSAGE_SENT, CONVERSATION_COMPLETED, CONVERSATION_FAILED)
def count(events: list[Event]) -> None:
    """Add a batch of events to the daily totals, by the UTC day on which they happened."""
    count_events(events=events)
