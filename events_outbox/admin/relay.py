"""The relay: its cursor."""

from django.contrib import admin

from events_outbox.models import RelayCursor
from events_outbox.status import COUNT_LIMIT, count_pending

from .read_only import ReadOnlyAdmin


@admin.register(RelayCursor)
class RelayCursorAdmin(ReadOnlyAdmin):
    tenant_field = None
    list_display = ("__str__", "leader", "leader_since", "heartbeat_at", "pending", "events_per_second", "last_error")
    fields = (
        "leader",
        "leader_since",
        "heartbeat_at",
        "last_error",
        "pending",
        "events_per_second",
        "published",
        "window",
        "window_last_id",
        "system_identifier",
    )

    @admin.display(description="pending events")
    def pending(self, cursor: RelayCursor) -> str:
        count, _ = count_pending(cursor, COUNT_LIMIT)
        return f"{count} or more" if count == COUNT_LIMIT else str(count)
