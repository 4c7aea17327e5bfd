"""Consumers: what they have processed, which are paused, and what operators did."""

from typing import Any

from django import forms
from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html

from events_outbox import pauses
from events_outbox.handlers import consumers
from events_outbox.models import ConsumerPause, OperatorAction, ProcessedEvent
from events_outbox.operators import ACTIONS

from .cells import moment, short_id
from .filters import ChoiceFilter, ConsumerFilter
from .read_only import EventIdAdmin, ReadOnlyAdmin
from .texts import exact_time


@admin.register(ProcessedEvent)
class ProcessedEventAdmin(EventIdAdmin):
    tenant_field = None
    list_display = ("processed", "consumer", "event")
    list_filter = (ConsumerFilter,)
    time_field = "processed_at"
    export_fields = ("id", "processed_at", "consumer", "event_id")

    @admin.display(description="processed")
    def processed(self, mark: ProcessedEvent) -> str:
        return moment(mark.processed_at)

    @admin.display(description="event id")
    def event(self, mark: ProcessedEvent) -> str:
        return short_id(mark.event_id)


class PauseForm(forms.ModelForm):  # type: ignore[type-arg]
    """Which consumer to pause, of those that are registered, and why."""

    consumer = forms.ChoiceField(choices=lambda: [(c.name, c.name) for c in consumers()])

    class Meta:
        model = ConsumerPause
        fields = ("consumer", "reason")


@admin.register(ConsumerPause)
class ConsumerPauseAdmin(ReadOnlyAdmin):
    tenant_field = None
    list_display = ("consumer", "paused", "paused_by", "reason")
    ordering = ("consumer",)
    form = PauseForm
    actions = ("resume",)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return self.has_operate_permission(request)

    def get_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        return ("consumer", "reason") if obj is None else ("consumer", "paused", "paused_by", "reason")

    @admin.display(description="paused", ordering="paused_at")
    def paused(self, pause: ConsumerPause) -> str:
        return exact_time(pause.paused_at)

    def save_model(self, request: HttpRequest, obj: ConsumerPause, form: Any, change: bool) -> None:
        if not pauses.pause(obj.consumer, by=str(request.user), reason=obj.reason):
            self.message_user(request, "It had just been paused by somebody else.", messages.WARNING)

    @admin.action(description="Resume: let the consumer go on", permissions=["operate"])
    def resume(self, request: HttpRequest, queryset: QuerySet[ConsumerPause]) -> None:
        resumed = []
        for pause in queryset:
            if pauses.resume(pause.consumer, by=str(request.user)):
                resumed.append(pause.consumer)
                self.log(request, pause, "resumed")
        if resumed:
            self.message_user(request, f"{', '.join(resumed)}: goes on within about a second")


class ActionFilter(ChoiceFilter):
    title = parameter_name = field = "action"
    choices_of = staticmethod(lambda: list(ACTIONS))


@admin.register(OperatorAction)
class OperatorActionAdmin(ReadOnlyAdmin):
    tenant_field = None
    list_display = ("happened", "action", "consumer", "linked_subject", "by", "why")
    list_filter = (ConsumerFilter, ActionFilter)
    time_field = "at"
    exact_search = ("subject",)
    search_help_text = "what it was done to, whole"
    export_fields = ("id", "at", "action", "consumer", "subject", "by", "reason")
    fields = ("happened", "action", "consumer", "linked_subject", "by", "reason", "detail")

    @admin.display(description="at", ordering="id")
    def happened(self, action: OperatorAction) -> str:
        return exact_time(action.at)

    @admin.display(description="subject")
    def linked_subject(self, action: OperatorAction) -> str:
        if not action.action.startswith("dead_letter."):
            return action.subject
        url = reverse("admin:events_outbox_deadletter_change", args=[action.subject])
        return format_html('<a href="{}">dead letter {}</a>', url, action.subject)
