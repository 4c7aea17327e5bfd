"""Daily totals in the admin, to look at."""

from django.contrib import admin

from events_outbox.admin import ReadOnlyAdmin

from .models import DailyTotal


@admin.register(DailyTotal)
class DailyTotalAdmin(ReadOnlyAdmin):
    list_display = ["day", "mode", "tenant_id", "conversations", "messages"]
    list_filter = ["mode"]
    search_fields = ["=tenant_id"]
    date_hierarchy = "day"
