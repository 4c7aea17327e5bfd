"""The operator's view of events, cursor, undeliverable events, processed marks and dead letters.

Lists are read-only; what an operator does is an action, and is logged. No list counts a big table to its end.
"""

import contextlib
import json
import uuid
from collections.abc import Callable
from datetime import datetime
from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.core.paginator import Paginator
from django.db import models
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils import timezone
from django.utils.functional import cached_property
from django.utils.html import format_html, format_html_join
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError

from . import dead_letters, undeliverable
from .catalog import event_types, topics
from .handlers import consumers
from .models import DeadLetter, OutboxEvent, ProcessedEvent, RelayCursor, UndeliverableEvent
from .proto.base_event_pb2 import BaseEvent
from .status import COUNT_LIMIT, count_pending

PAGED_ROWS = 10_000
DISCARD_AT_ONCE = 500
"""Django takes at most a thousand fields of a form, and a person reads fewer."""


class BoundedPaginator(Paginator):  # type: ignore[type-arg]
    """Pages through the first PAGED_ROWS rows; further rows are found by filter and search."""

    @cached_property
    def count(self) -> int:
        rows: QuerySet[Any] = self.object_list  # type: ignore[assignment]
        return rows.order_by()[:PAGED_ROWS].count()


class ReadOnlyAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """Rows can be looked at; the declared actions are for those who may change the model."""

    paginator = BoundedPaginator
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER  # they count the table once for each choice
    list_per_page = 50

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_operate_permission(self, request: HttpRequest) -> bool:
        """Whether the user may run this model's actions: Django's "change" permission of the model."""
        return bool(request.user.has_perm(f"{self.opts.app_label}.change_{self.opts.model_name}"))

    def log(self, request: HttpRequest, obj: models.Model, text: str) -> None:
        user_id = str(request.user.pk)
        LogEntry.objects.log_actions(user_id, [obj], CHANGE, change_message=text, single_object=True)


class ChoiceFilter(admin.SimpleListFilter):
    """A filter whose choices are known beforehand, so that no DISTINCT has to read the table."""

    field = ""
    choices_of: Callable[[], list[str]] = staticmethod(list)

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(value, value) for value in type(self).choices_of()]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(**{self.field: self.value()}) if self.value() else queryset


class EventTypeFilter(ChoiceFilter):
    title, parameter_name, field = "event type", "event_type", "event_type"
    choices_of = staticmethod(lambda: sorted({entry.name for entry in event_types()}))


class TopicFilter(ChoiceFilter):
    title = parameter_name = field = "topic"
    choices_of = staticmethod(topics)


class ConsumerFilter(ChoiceFilter):
    title = parameter_name = field = "consumer"
    choices_of = staticmethod(lambda: [consumer.name for consumer in consumers()])


class TenantFilter(admin.SimpleListFilter):
    """A text box: there are too many tenants for a list of links."""

    title, parameter_name = "tenant", "tenant_id"
    template = "admin/events_outbox/text_filter.html"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        self.other_parameters = [(name, value) for name, value in request.GET.items() if name != "tenant_id"]
        return [("", "")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(tenant_id=self.value()) if self.value() else queryset


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


def readable(value: bytes | memoryview | None) -> str:
    """A BaseEvent's bytes as JSON with the specification's field names, or as hex when they are none."""
    raw = bytes(value or b"")
    try:
        base = BaseEvent.FromString(raw)
        decoded = MessageToDict(base, preserving_proto_field_name=True)
    except (DecodeError, TypeError, ValueError) as error:
        return format_html("<pre>not decodable: {}\n{}</pre>", str(error), raw.hex(" "))
    return format_html("<pre>{}</pre>", json.dumps(decoded, indent=2, ensure_ascii=False))


def exact_time(moment: datetime) -> str:
    """A time to the millisecond, with its offset from UTC."""
    return timezone.localtime(moment).isoformat(sep=" ", timespec="milliseconds")


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
        chosen = list(queryset.order_by("id")[: DISCARD_AT_ONCE + 1])
        if len(chosen) > DISCARD_AT_ONCE:
            hint = "use `manage.py undeliverable discard`"
            self.message_user(request, f"select at most {DISCARD_AT_ONCE}, or {hint}", messages.ERROR)
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
        context = {
            **self.admin_site.each_context(request),
            "title": "Discard undeliverable events",
            "opts": self.opts,
            "chosen": chosen,
            "freed": preview.redriven,
            "reason_is_missing": "confirmed" in request.POST,
        }
        return TemplateResponse(request, "admin/events_outbox/discard_undeliverable.html", context)


@admin.register(ProcessedEvent)
class ProcessedEventAdmin(ReadOnlyAdmin):
    list_display = ("event_id", "consumer", "processed_at")
    list_filter = (ConsumerFilter,)
    search_fields = ("event_id",)
    search_help_text = "an event id, whole"

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        if not search_term.strip():
            return queryset, False
        try:
            event_id = uuid.UUID(search_term.strip())
        except ValueError:
            return queryset.none(), False
        # The index begins with the consumer.
        names = [consumer.name for consumer in consumers()]
        return queryset.filter(event_id=event_id, consumer__in=names), False


@admin.register(DeadLetter)
class DeadLetterAdmin(ReadOnlyAdmin):
    list_display = ("id", "consumer", "event_type", "reason", "short_error", "attempts", "created_at", "state")
    list_filter = (ConsumerFilter, "reason", "resolution")
    search_fields = ("event_id",)
    search_help_text = "an event id, whole"
    fields = (
        "consumer",
        "state",
        "reason",
        "error",
        "attempts",
        "created_at",
        "resolved_at",
        "event_id",
        "event_type",
        "tenant_id",
        "place",
        "decoded",
        "raw_value",
        "header_lines",
        "formatted_traceback",
    )
    actions = ("replay", "discard")
    get_search_results = ProcessedEventAdmin.get_search_results

    @admin.display(description="state", ordering="resolution")
    def state(self, letter: DeadLetter) -> str:
        return str(letter.get_resolution_display())

    @admin.display(description="error")
    def short_error(self, letter: DeadLetter) -> str:
        return letter.error[:120]

    @admin.display(description="topic/partition/offset")
    def place(self, letter: DeadLetter) -> str:
        return f"{letter.topic}/{letter.partition}/{letter.offset}"

    @admin.display(description="event")
    def decoded(self, letter: DeadLetter) -> str:
        return readable(letter.value)

    @admin.display(description="raw value (hex)")
    def raw_value(self, letter: DeadLetter) -> str:
        if letter.value is None:
            return "no value"
        raw = bytes(letter.value)
        return format_html("<pre>{} bytes\n{}</pre>", len(raw), raw[:4096].hex(" "))

    @admin.display(description="headers")
    def header_lines(self, letter: DeadLetter) -> str:
        return format_html("<pre>{}</pre>", "\n".join(f"{name}: {value}" for name, value in letter.text_headers()))

    @admin.display(description="traceback")
    def formatted_traceback(self, letter: DeadLetter) -> str:
        return format_html("<pre>{}</pre>", letter.traceback or "-")

    @admin.action(description="Replay: handle the event again", permissions=["operate"])
    def replay(self, request: HttpRequest, queryset: QuerySet[DeadLetter]) -> None:
        self._each(request, queryset, dead_letters.replay, "replayed")

    @admin.action(description="Discard: close without handling", permissions=["operate"])
    def discard(self, request: HttpRequest, queryset: QuerySet[DeadLetter]) -> None:
        self._each(request, queryset, dead_letters.discard, "discarded")

    def _each(
        self, request: HttpRequest, queryset: QuerySet[DeadLetter], act: Callable[[int], None], done: str
    ) -> None:
        """Act on each letter in the order they came, so that a key's events stay in order."""
        count = 0
        for letter in queryset.order_by("id"):
            try:
                act(letter.pk)
            except Exception as error:
                self.message_user(request, f"dead letter {letter.pk}: {error}", messages.ERROR)
                self.log(request, letter, f"not {done}: {error}")
            else:
                self.log(request, letter, done)
                count += 1
        if count:
            self.message_user(request, f"{count} dead letters {done}")
