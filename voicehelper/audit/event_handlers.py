"""The consumer `audit`: records every event."""

from google.protobuf.json_format import MessageToDict

from events_outbox import Consumer, Event

from .models import AuditEntry

audit = Consumer("audit", group_id="audit-service")


@audit.handles_batch("*")
def record(events: list[Event]) -> None:
    """Append a batch of events to the log, in one statement."""
    AuditEntry.objects.bulk_create(
        [
            AuditEntry(
                event_id=event.event_id,
                event_type=event.event_type,
                event_version=event.event_version,
                tenant_id=event.tenant_id,
                user_id=event.user_id,
                aggregate_id=event.aggregate_id,
                occurred_at=event.timestamp,
                correlation_id=event.correlation_id,
                causation_id=event.causation_id,
                payload=MessageToDict(
                    event.payload, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
                ),
                metadata=dict(event.metadata),
            )
            for event in events
        ],
        # An event replayed after its processed mark was pruned is in the log already.
        ignore_conflicts=True,
    )
