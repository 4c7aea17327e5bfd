"""Notifications in the admin, to look at."""

from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest

from events_outbox.admin import ReadOnlyAdmin
from events_outbox.admin.cells import moment

from .models import Notification


class ReadFilter(admin.SimpleListFilter):
    title = parameter_name = "read"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("yes", "read"), ("no", "unread")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(read_at__isnull=self.value() == "no") if self.value() in ("yes", "no") else queryset


@admin.register(Notification)
class NotificationAdmin(ReadOnlyAdmin):
    list_display = ["subject", "recipient", "tenant", "kind", "created", "read"]
    list_filter = [ReadFilter]
    list_select_related = ["recipient", "tenant"]
    time_field = "created_at"
    exact_search = ["id", "recipient__username"]
    search_fields = ["=aggregate_id"]
    search_help_text = "an id, user name or aggregate id, whole"

    @admin.display(description="created")
    def created(self, notification: Notification) -> str:
        return moment(notification.created_at)

    @admin.display(description="read")
    def read(self, notification: Notification) -> str:
        return moment(notification.read_at)
