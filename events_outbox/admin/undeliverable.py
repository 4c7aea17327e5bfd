"""Undeliverable events: redrive, discard."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote_plus

from django.contrib import admin, messages
from django.contrib.admin.options import IncorrectLookupParameters
from django.core.exceptions import PermissionDenied
from django.db.models import Q, QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import URLPattern, path, reverse
from django.utils.html import format_html

from events_outbox import pauses, undeliverable
from events_outbox.catalog import topics
from events_outbox.models import UndeliverableEvent

from .cells import moment, short_id
from .confirmation import SHOWN_ROWS, chosen_again, confirm, is_confirmed, reason_of, shown_before
from .filters import ErrorNameFilter, TopicFilter
from .read_only import ReadOnlyAdmin
from .texts import exact_time

NOTED_IDS = 20
"""Chosen ids that the audit trail lists."""


class OpenFilter(admin.SimpleListFilter):
    title = parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(state, state) for state in ("open", "discarded")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        if self.value() in ("open", "discarded"):
            return queryset.filter(discarded_at__isnull=self.value() == "open")
        return queryset

    def keys(self) -> QuerySet[Any] | None:
        if self.value() not in ("open", "discarded"):
            return None
        return (
            UndeliverableEvent.objects.filter(discarded_at__isnull=self.value() == "open")
            .order_by("-id")
            .values_list("pk", flat=True)
        )


@admin.register(UndeliverableEvent)
class UndeliverableEventAdmin(ReadOnlyAdmin):
    tenant_field = "event__tenant_id"
    list_display = ("parked", "state", "reason", "event_type", "event_id_cell", "aggregate", "topic")
    list_filter = (OpenFilter, TopicFilter, ErrorNameFilter)
    list_defer = ("event__value", "event__baggage")
    time_field = "parked_at"
    exact_search = ("aggregate_id", "event__event_id")
    search_help_text = "an aggregate id or event id, whole"
    export_fields = (
        "id",
        "parked_at",
        "state",
        "reason",
        "error",
        "event_type",
        "event_uuid",
        "aggregate_id",
        "tenant",
        "topic",
        "discarded_at",
        "discarded_by",
        "discard_reason",
    )
    fieldsets = (
        ("What happened", {"fields": ("state", "reason", "error", "parked_at", "redrive_requested_at", "closed")}),
        ("The event", {"fields": ("linked_event", "topic", "aggregate_id", "decoded")}),
    )
    list_select_related = ("event",)
    actions = ("redrive", "discard")

    def exact_conditions(self, term: str) -> list[Q]:
        # The index of aggregates begins with the topic.
        by_aggregate, *by_event = super().exact_conditions(term)
        return [by_aggregate & Q(topic__in=topics()), *by_event]

    @admin.display(description="parked")
    def parked(self, parked: UndeliverableEvent) -> str:
        return moment(parked.parked_at)

    @admin.display(description="event type")
    def event_type(self, parked: UndeliverableEvent) -> str:
        return parked.event.event_type

    @admin.display(description="event id")
    def event_id_cell(self, parked: UndeliverableEvent) -> str:
        return short_id(parked.event.event_id)

    @admin.display(description="aggregate")
    def aggregate(self, parked: UndeliverableEvent) -> str:
        return short_id(parked.aggregate_id)

    def event_uuid(self, parked: UndeliverableEvent) -> str:
        return str(parked.event.event_id)

    def tenant(self, parked: UndeliverableEvent) -> str:
        return parked.event.tenant_id

    @admin.display(description="state")
    def state(self, parked: UndeliverableEvent) -> str:
        if parked.discarded_at is not None:
            return "discarded"
        return "open" if parked.redrive_requested_at is None else "to be redriven"

    @admin.display(description="event")
    def linked_event(self, parked: UndeliverableEvent) -> str:
        url = reverse("admin:events_outbox_outboxevent_change", args=[parked.event_id])
        return format_html('<a class="text-link" href="{}">{}</a>', url, parked.event)

    @admin.display(description="discarded")
    def closed(self, parked: UndeliverableEvent) -> str:
        if parked.discarded_at is None:
            return "-"
        return f"{exact_time(parked.discarded_at)}, by {parked.discarded_by}: {parked.discard_reason}"

    @admin.display(description="decoded")
    def decoded(self, parked: UndeliverableEvent) -> str:
        return self.payload_on_page(parked, parked.event.value, subject=f"event {parked.event.event_id}")

    def get_urls(self) -> list[URLPattern]:
        redrive = path("redrive/", self.admin_site.admin_view(self.redrive_view), name="events_outbox_redrive")
        return [redrive, *super().get_urls()]

    def list_buttons(self, request: HttpRequest) -> list[tuple[str, str, str]]:
        if not self.has_redrive_permission(request):
            return []
        query = request.GET.urlencode()
        address = reverse("admin:events_outbox_redrive")
        return [("Redrive by filter", f"{address}?{query}" if query else address, "redo")]

    def page_buttons(self, request: HttpRequest, obj: UndeliverableEvent) -> list[tuple[str, str, str]]:
        return [] if obj.discarded_at is not None else super().page_buttons(request, obj)

    def has_redrive_permission(self, request: HttpRequest) -> bool:
        return self.may(request, "redrive_undeliverableevent")

    def has_discard_permission(self, request: HttpRequest) -> bool:
        return self.may(request, "discard_undeliverableevent")

    def redrive_view(self, request: HttpRequest) -> HttpResponse:
        """Redrive all that the list's filter shows, when that is confirmed."""
        if not (self.has_view_permission(request) and self.has_redrive_permission(request)):
            raise PermissionDenied
        to_list = reverse("admin:events_outbox_undeliverableevent_changelist")
        try:
            changelist: Any = self.get_changelist_instance(request)
        except IncorrectLookupParameters:
            return HttpResponseRedirect(f"{to_list}?e=1")
        query = request.GET.urlencode()
        back = f"{to_list}?{query}" if query else to_list
        chosen_by = f"filter {unquote_plus(query) or 'none'}"
        answer = self._redrive(request, changelist.queryset, chosen_by=chosen_by, by_filter=True, back=back)
        return answer or HttpResponseRedirect(back)

    @admin.action(description="Redrive with all events of the same key, in order", permissions=["redrive"])
    def redrive(self, request: HttpRequest, queryset: QuerySet[UndeliverableEvent]) -> HttpResponse | None:
        chosen = self.few(request, queryset, "undeliverable redrive", button="Redrive by filter")
        if chosen is None:
            return None
        ids = [parked.pk for parked in chosen]
        chosen_by = f"undeliverable {', '.join(map(str, ids[:NOTED_IDS]))}{' ...' if len(ids) > NOTED_IDS else ''}"
        return self._redrive(
            request,
            queryset.filter(pk__in=ids),
            chosen_by=chosen_by,
            action="redrive",
            fields=chosen_again(chosen),
            back=request.get_full_path(),
        )

    def _redrive(
        self,
        request: HttpRequest,
        queryset: Any,
        *,
        chosen_by: str,
        fields: Mapping[str, object] | None = None,
        by_filter: bool = False,
        **options: Any,
    ) -> HttpResponse | None:
        """Redrive when that is confirmed. `by_filter`: more may match by now than were shown; then it asks again."""
        by = str(request.user)
        preview = undeliverable.redrive(queryset, by=by, dry_run=True)
        warnings = []
        has_more = by_filter and is_confirmed(request) and preview.events > shown_before(request)
        if has_more:
            warnings.append(f"By now {preview.events} events are meant, more than confirmed: nothing was redriven yet.")
        if is_confirmed(request) and not has_more:
            redriven = undeliverable.redrive(queryset, by=by, chosen_by=chosen_by)
            if not redriven.events:
                self.message_user(request, "Nothing is to be redriven: none of them is open any more", messages.ERROR)
                return None
            self.log_many(request, redriven.events, f"Redrive requested: {chosen_by}")
            done = f"{redriven.events} events of {redriven.keys} keys: the relay publishes them within seconds"
            self.message_user(request, done)
            return None
        total, is_open = queryset.count(), queryset.filter(discarded_at__isnull=True).count()
        if total > is_open:
            warnings.append(f"Not redriven: {total - is_open} that are discarded already.")
        if preview.events > is_open:
            waiting = preview.events - is_open
            warnings.append(f"Redriven as well: {waiting} more of the same keys, as a key is published in order.")
        if preview.events and pauses.relay_pause() is not None:
            warnings.append("The relay is paused: they are published after its resumption.")
        return confirm(
            self,
            request,
            title="Redrive undeliverable events",
            introduction="The relay publishes these events within seconds, each key whole and in order. What the "
            "broker refuses again is undeliverable again."
            if preview.events
            else "There is nothing to redrive.",
            warnings=warnings,
            facts=[("Events", preview.events), ("Keys", preview.keys)],
            columns=("Id", "Event", "Topic", "Aggregate", "Refused for", "What happens"),
            rows=[
                (p.pk, p.event, p.topic, p.aggregate_id, p.reason, _outlook(p))
                for p in queryset.select_related("event").defer("event__value").order_by("id")[:SHOWN_ROWS]
            ],
            total=total,
            fields={**(fields or {}), "shown": preview.events},
            button=f"Redrive {preview.events}" if preview.events else "",
            **options,
        )

    @admin.action(description="Discard: give up, and let what waits behind go on", permissions=["discard"])
    def discard(self, request: HttpRequest, queryset: QuerySet[UndeliverableEvent]) -> HttpResponse | None:
        """Say what goes on without them, ask for the reason, then discard."""
        chosen = self.few(request, queryset, "undeliverable discard")
        if chosen is None:
            return None
        ids = [parked.pk for parked in chosen]
        reason = reason_of(request)
        try:
            if not is_confirmed(request, needs_reason=True):
                return self._ask_why(request, chosen, undeliverable.discard(ids, reason="preview", by="", dry_run=True))
            discarded = undeliverable.discard(ids, reason=reason, by=str(request.user))
        except undeliverable.ActionRefused as error:
            self.message_user(request, f"{_capitalised(error)}; nothing was changed", messages.ERROR)
            return None
        for parked in chosen:
            self.log(request, parked, f"discarded: {reason}")
        freed = discarded.redriven
        more = f"; {freed.events} events of {freed.keys} keys waited for them and are redriven" if freed.events else ""
        self.message_user(request, f"{discarded.events} undeliverable events discarded{more}")
        return None

    def _ask_why(
        self, request: HttpRequest, chosen: list[UndeliverableEvent], preview: undeliverable.Discarded
    ) -> HttpResponse:
        freed = preview.redriven
        waiting = f"{freed.events} events of {freed.keys} keys wait for them: the relay publishes those."
        return confirm(
            self,
            request,
            title="Discard undeliverable events",
            introduction="These events will never be published. They stay visible as discarded, with your name and "
            "the reason.",
            warnings=[waiting] if freed.events else [],
            facts=[("Discarded", preview.events), ("Published instead of waiting", freed.events)],
            columns=("Id", "Event", "Topic", "Aggregate", "Refused for"),
            rows=[(p.pk, p.event, p.topic, p.aggregate_id, p.reason) for p in chosen],
            action="discard",
            fields=chosen_again(chosen),
            button=f"Discard {len(chosen)}",
            needs_reason=True,
            danger=True,
            back=request.get_full_path(),
        )


def _outlook(parked: UndeliverableEvent) -> str:
    if parked.discarded_at is not None:
        return f"stays discarded, by {parked.discarded_by}"
    return "redriven" if parked.redrive_requested_at is None else "redriven; that is requested already"


def _capitalised(error: Exception) -> str:
    text = str(error)
    return text[:1].upper() + text[1:]
