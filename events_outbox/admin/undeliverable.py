"""Undeliverable events: redrive, discard."""

from typing import Any

from django.contrib import admin, messages
from django.db.models import Q, QuerySet
from django.http import HttpRequest, HttpResponse

from events_outbox import undeliverable
from events_outbox.catalog import topics
from events_outbox.models import UndeliverableEvent

from .cells import moment, short_id
from .filters import ErrorNameFilter, TopicFilter
from .read_only import ReadOnlyAdmin
from .texts import readable


class OpenFilter(admin.SimpleListFilter):
    title = parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(state, state) for state in ("open", "discarded")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        if self.value() in ("open", "discarded"):
            return queryset.filter(discarded_at__isnull=self.value() == "open")
        return queryset

    def keys(self) -> QuerySet[Any] | None:
        if self.value() != "discarded":
            return None
        discarded = UndeliverableEvent.objects.filter(discarded_at__isnull=False)
        return discarded.order_by("-id").values_list("pk", flat=True)


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
