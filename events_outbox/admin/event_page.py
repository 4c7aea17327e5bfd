"""An event's page: what it is, where it is on its way, who has handled it."""

from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html, format_html_join

from events_outbox.handlers import consumers
from events_outbox.models import DeadLetter, OutboxEvent, ProcessedEvent, RelayCursor

from .read_only import ReadOnlyAdmin
from .texts import exact_time


class EventPage(ReadOnlyAdmin):
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
        return self.payload_on_page(event, event.value, subject=f"event {event.event_id}")

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
