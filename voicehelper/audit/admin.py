"""The audit log in the admin, to look at."""

from django.contrib import admin

from events_outbox.admin import ReadOnlyAdmin
from events_outbox.admin.cells import moment, short_id
from events_outbox.admin.filters import EventTypeFilter, TenantFilter

from .models import AuditEntry


@admin.register(AuditEntry)
class AuditEntryAdmin(ReadOnlyAdmin):
    payload_fields = ["payload"]
    list_display = ["occurred", "event_type", "tenant", "position", "user", "aggregate", "event", "chained"]
    list_filter = [EventTypeFilter, TenantFilter]
    list_defer = ["payload", "metadata"]
    time_field = "recorded_at"
    exact_search = ["id", "event_id", "aggregate_id", "correlation_id"]
    search_help_text = "an event id, aggregate id or correlation id, whole"

    @admin.display(description="occurred")
    def occurred(self, entry: AuditEntry) -> str:
        return moment(entry.occurred_at)

    @admin.display(description="tenant")
    def tenant(self, entry: AuditEntry) -> str:
        return short_id(entry.tenant_id)

    @admin.display(description="user")
    def user(self, entry: AuditEntry) -> str:
        return short_id(entry.user_id) if entry.user_id else "-"

    @admin.display(description="aggregate")
    def aggregate(self, entry: AuditEntry) -> str:
        return short_id(entry.aggregate_id)

    @admin.display(description="event id")
    def event(self, entry: AuditEntry) -> str:
        return short_id(entry.event_id)

    @admin.display(description="hash")
    def chained(self, entry: AuditEntry) -> str:
        return short_id(entry.hash)
