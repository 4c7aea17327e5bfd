"""Notifications in the admin, to look at."""

from django.contrib import admin

from events_outbox.admin import ReadOnlyAdmin

from .models import Notification


@admin.register(Notification)
class NotificationAdmin(ReadOnlyAdmin):
    list_display = ["subject", "recipient", "tenant", "kind", "created_at", "read_at"]
    list_filter = [("read_at", admin.EmptyFieldListFilter)]
    list_select_related = ["recipient", "tenant"]
    search_fields = ["=id", "=aggregate_id", "=recipient__username"]
