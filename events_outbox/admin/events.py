"""The list of events."""

from typing import Any

from django.contrib import admin
from django.db.models import OuterRef, QuerySet, Subquery
from django.http import HttpRequest

from events_outbox.models import OutboxEvent, RelayCursor, UndeliverableEvent

from .cells import moment, short_id
from .event_page import EventPage
from .filters import EventTypeFilter, TenantFilter, TopicFilter
from .replay import ReplayPages


class StatusFilter(admin.SimpleListFilter):
    title = parameter_name = "status"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(status, status) for status in ("pending", "published", "undeliverable", "discarded")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        events: Any = queryset
        match self.value():
            case "pending":
                events = events.pending(RelayCursor.read())
            case "published":
                events = events.past(RelayCursor.read()).alias(parked=_parked()).filter(parked__isnull=True)
            case "undeliverable":
                events = events.alias(parked=_parked(discarded_at__isnull=True)).filter(parked__isnull=False)
            case "discarded":
                events = events.alias(parked=_parked(discarded_at__isnull=False)).filter(parked__isnull=False)
        return events  # type: ignore[no-any-return]

    def keys(self) -> QuerySet[Any] | None:
        """In the order of the index, which keeps the planner from reading the table until it comes to the first one."""
        parked = UndeliverableEvent.objects.order_by("-id").values_list("event_id", flat=True)
        rows: QuerySet[Any] | None = None
        if self.value() == "pending":
            rows = OutboxEvent.objects.pending(RelayCursor.read()).order_by("transaction_id", "id")
            rows = rows.values_list("pk", flat=True)
        elif self.value() == "undeliverable":
            rows = parked.filter(discarded_at__isnull=True)
        elif self.value() == "discarded":
            rows = parked.filter(discarded_at__isnull=False)
        return rows


def _parked(**conditions: bool) -> Subquery:
    """Looked up for each event, by index: a join may read all that was ever parked."""
    return Subquery(UndeliverableEvent.objects.filter(event=OuterRef("pk"), **conditions).values("pk")[:1])


@admin.register(OutboxEvent)
class OutboxEventAdmin(ReplayPages, EventPage):
    list_display = ("created_cell", "event_type", "status", "aggregate", "tenant", "topic", "event")
    list_display_links = ("created_cell", "event")
    list_filter = (StatusFilter, EventTypeFilter, TopicFilter, TenantFilter)
    list_prefetch = ("undeliverable",)
    list_defer = ("value", "baggage")
    time_field = "created_at"
    exact_search = ("event_id", "aggregate_id", "correlation_id")
    search_help_text = "an event id, aggregate id or correlation id, whole"
    export_fields = (
        "id",
        "created_at",
        "event_id",
        "event_type",
        "event_version",
        "status",
        "aggregate_id",
        "tenant_id",
        "topic",
        "correlation_id",
        "traceparent",
    )

    @admin.display(description="created")
    def created_cell(self, event: OutboxEvent) -> str:
        return moment(event.created_at)

    @admin.display(description="aggregate")
    def aggregate(self, event: OutboxEvent) -> str:
        return short_id(event.aggregate_id)

    @admin.display(description="tenant")
    def tenant(self, event: OutboxEvent) -> str:
        return short_id(event.tenant_id)

    @admin.display(description="event id")
    def event(self, event: OutboxEvent) -> str:
        return short_id(event.event_id)
