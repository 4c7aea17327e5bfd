"""The consumer `audit`: records every event."""

from events_outbox import Consumer, Event

from .services import append_entries

audit = Consumer("audit", group_id="audit-service")


@audit.handles_batch("*")
def record(events: list[Event]) -> None:
    """Append a batch of events to the log."""
    append_entries(events=events)
