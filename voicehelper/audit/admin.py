"""The audit log in the admin, to look at."""

from django.contrib import admin

from events_outbox.admin import ReadOnlyAdmin

from .models import AuditEntry


@admin.register(AuditEntry)
class AuditEntryAdmin(ReadOnlyAdmin):
    list_display = ["event_type", "event_id", "tenant_id", "user_id", "aggregate_id", "occurred_at"]
    search_fields = ["=event_id", "=aggregate_id", "=correlation_id", "=tenant_id", "=event_type"]
