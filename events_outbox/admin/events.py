"""The list of events."""

import contextlib
import uuid
from typing import Any

from django.contrib import admin
from django.db import models
from django.db.models import QuerySet
from django.http import HttpRequest

from events_outbox.models import OutboxEvent, RelayCursor

from .event_page import EventPage
from .filters import EventTypeFilter, TenantFilter, TopicFilter


class StatusFilter(admin.SimpleListFilter):
    title = parameter_name = "status"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(status, status) for status in ("pending", "published", "undeliverable", "discarded")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        if self.value() == "pending":
            return queryset.pending(RelayCursor.read())  # type: ignore[attr-defined, no-any-return]
        if self.value() == "published":
            return queryset.past(RelayCursor.read()).filter(undeliverable__isnull=True)  # type: ignore[attr-defined, no-any-return]
        if self.value() == "undeliverable":
            return queryset.filter(undeliverable__isnull=False, undeliverable__discarded_at__isnull=True)
        if self.value() == "discarded":
            return queryset.filter(undeliverable__discarded_at__isnull=False)
        return queryset


@admin.register(OutboxEvent)
class OutboxEventAdmin(EventPage):
    list_display = ("created", "event_type", "status", "aggregate_id", "tenant_id", "topic", "event_id")
    list_display_links = ("created", "event_id")
    list_filter = (StatusFilter, EventTypeFilter, TopicFilter, TenantFilter)
    list_select_related = ("undeliverable",)
    search_fields = ("event_id",)
    search_help_text = "an event id, aggregate id or correlation id, whole"

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        if not (term := search_term.strip()):
            return queryset, False
        found = models.Q(aggregate_id=term) | models.Q(correlation_id=term)
        with contextlib.suppress(ValueError):
            found |= models.Q(event_id=uuid.UUID(term))
        return queryset.filter(found), False
