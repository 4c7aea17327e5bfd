"""The outbox: events, the relay's cursor, undeliverable events."""

import contextlib
import uuid
from typing import Any

from django.contrib import admin, messages
from django.db import models
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.urls import reverse
from django.utils.html import format_html, format_html_join

from events_outbox import undeliverable
from events_outbox.handlers import consumers
from events_outbox.models import DeadLetter, OutboxEvent, ProcessedEvent, RelayCursor, UndeliverableEvent
from events_outbox.status import COUNT_LIMIT, count_pending

from .lists import EventTypeFilter, ReadOnlyAdmin, TenantFilter, TopicFilter, exact_time, readable


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
class OutboxEventAdmin(ReadOnlyAdmin):
    list_display = ("created", "event_type", "status", "aggregate_id", "tenant_id", "topic", "event_id")
    list_display_links = ("created", "event_id")
    list_filter = (StatusFilter, EventTypeFilter, TopicFilter, TenantFilter)
    list_select_related = ("undeliverable",)
    search_fields = ("event_id",)
    search_help_text = "an event id, aggregate id or correlation id, whole"
    fields = (
        "status",
        "event_id",
        "event_type",
        "event_version",
        "aggregate_id",
        "tenant_id",
        "topic",
        "correlation_id",
        "created",
        "handled_by",
        "decoded",
        "size_bytes",
        "traceparent",
        "tracestate",
        "baggage",
        "id",
        "transaction_id",
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        # Read once for the page, not for each row. Another thread may put its own, as fresh one here.
        self._cursor = RelayCursor.read()
        return super().get_queryset(request)

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        if not (term := search_term.strip()):
            return queryset, False
        found = models.Q(aggregate_id=term) | models.Q(correlation_id=term)
        with contextlib.suppress(ValueError):
            found |= models.Q(event_id=uuid.UUID(term))
        return queryset.filter(found), False

    @admin.display(description="created", ordering="id")
    def created(self, event: OutboxEvent) -> str:
        return exact_time(event.created_at)

    @admin.display(description="status")
    def status(self, event: OutboxEvent) -> str:
        if hasattr(event, "undeliverable"):
            return "undeliverable" if event.undeliverable.discarded_at is None else "discarded"
        return "published" if self._cursor.has_published(event) else "pending"

    @admin.display(description="event")
    def decoded(self, event: OutboxEvent) -> str:
        return readable(event.value)

    @admin.display(description="size (bytes)")
    def size_bytes(self, event: OutboxEvent) -> int:
        return len(event.value)

    @admin.display(description="handled by")
    def handled_by(self, event: OutboxEvent) -> str:
        marks = ProcessedEvent.objects.filter(
            event_id=event.event_id, consumer__in=[consumer.name for consumer in consumers()]
        ).order_by("id")
        letters = dict(DeadLetter.objects.filter(event_id=event.event_id).values_list("consumer", "pk"))
        lines = [
            (
                mark.consumer,
                exact_time(mark.processed_at),
                _dead_letter_link(letters.get(mark.consumer)),
            )
            for mark in marks
        ]
        return format_html_join("", "<div>{} {} {}</div>", lines) or "-"


def _dead_letter_link(letter_id: int | None) -> str:
    if letter_id is None:
        return ""
    return format_html(
        '<a href="{}">dead letter</a>', reverse("admin:events_outbox_deadletter_change", args=[letter_id])
    )


@admin.register(RelayCursor)
class RelayCursorAdmin(ReadOnlyAdmin):
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


class OpenFilter(admin.SimpleListFilter):
    title = parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(state, state) for state in ("open", "discarded")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        if self.value() in ("open", "discarded"):
            return queryset.filter(discarded_at__isnull=self.value() == "open")
        return queryset


@admin.register(UndeliverableEvent)
class UndeliverableEventAdmin(ReadOnlyAdmin):
    list_display = ("id", "state", "reason", "event", "aggregate_id", "topic", "parked")
    list_filter = (OpenFilter, TopicFilter, "reason")
    search_fields = ("aggregate_id__exact",)
    search_help_text = "an aggregate id, whole"
    fields = (
        "event",
        "topic",
        "aggregate_id",
        "state",
        "reason",
        "error",
        "parked_at",
        "redrive_requested_at",
        "discarded_at",
        "discarded_by",
        "discard_reason",
        "decoded",
    )
    list_select_related = ("event",)
    actions = ("redrive", "discard")

    @admin.display(description="parked", ordering="parked_at")
    def parked(self, parked: UndeliverableEvent) -> str:
        return exact_time(parked.parked_at)

    @admin.display(description="state")
    def state(self, parked: UndeliverableEvent) -> str:
        if parked.discarded_at is not None:
            return "discarded"
        return "open" if parked.redrive_requested_at is None else "to be redriven"

    @admin.display(description="event")
    def decoded(self, parked: UndeliverableEvent) -> str:
        return readable(parked.event.value)

    @admin.action(description="Redrive with all events of the same key, in order", permissions=["operate"])
    def redrive(self, request: HttpRequest, queryset: QuerySet[UndeliverableEvent]) -> None:
        chosen = list(queryset)
        try:
            redriven = undeliverable.redrive(
                undeliverable.with_ids([parked.pk for parked in chosen]), by=str(request.user)
            )
        except undeliverable.ActionRefused as error:
            self.message_user(request, f"{error}; nothing was changed", messages.ERROR)
            return
        for parked in chosen:
            self.log(request, parked, "redrive requested")
        self.message_user(
            request, f"{redriven.events} events of {redriven.keys} keys: the relay publishes them within seconds"
        )

    @admin.action(description="Discard: give up, and let what waits behind go on", permissions=["operate"])
    def discard(self, request: HttpRequest, queryset: QuerySet[UndeliverableEvent]) -> HttpResponse | None:
        """Ask for the reason on a page of its own, then discard."""
        chosen = self.few(request, queryset, "undeliverable discard")
        if chosen is None:
            return None
        ids = [parked.pk for parked in chosen]
        reason = request.POST.get("reason", "")
        try:
            if "confirmed" in request.POST and reason.strip():
                discarded = undeliverable.discard(ids, reason=reason, by=str(request.user))
            else:
                preview = undeliverable.discard(ids, reason="preview", by="", dry_run=True)
                return self._ask_why(request, chosen, preview)
        except undeliverable.ActionRefused as error:
            self.message_user(request, f"{error}; nothing was changed", messages.ERROR)
            return None
        for parked in chosen:
            self.log(request, parked, f"discarded: {reason.strip()}")
        freed = discarded.redriven
        more = f"; {freed.events} events of {freed.keys} keys waited for them and are redriven" if freed.events else ""
        self.message_user(request, f"{discarded.events} undeliverable events discarded{more}")
        return None

    def _ask_why(
        self, request: HttpRequest, chosen: list[UndeliverableEvent], preview: undeliverable.Discarded
    ) -> HttpResponse:
        freed = preview.redriven
        return self.ask_why(
            request,
            introduction="These events will never be published. They stay visible as discarded, with your name and "
            "the reason.",
            waiting=f"{freed.events} events of {freed.keys} keys wait for them: the relay publishes those."
            if freed.events
            else "",
            columns=("Id", "Event", "Topic", "Aggregate", "Refused for"),
            rows=[(p.pk, (p.event, p.topic, p.aggregate_id, p.reason)) for p in chosen],
        )
