"""Daily totals in the admin, to look at."""

from django.contrib import admin

from events_outbox.admin import ReadOnlyAdmin
from events_outbox.admin.filters import TextFilter

from .models import DailyTotal


class ModeFilter(TextFilter):
    title = parameter_name = field = "mode"


@admin.register(DailyTotal)
class DailyTotalAdmin(ReadOnlyAdmin):
    list_display = ["day", "mode", "tenant_id", "conversations", "messages"]
    list_filter = [ModeFilter]
    exact_search = ["tenant_id"]
    search_help_text = "a tenant id, whole"
    date_hierarchy = "day"
