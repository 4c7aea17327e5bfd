"""Consumers: what they have processed, which are paused, and what operators did."""

from typing import Any

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils.html import format_html
from django.utils.http import urlencode

from events_outbox import pauses
from events_outbox.handlers import consumers
from events_outbox.models import ConsumerPause, DeadLetter, OperatorAction, ProcessedEvent, Worker
from events_outbox.operators import ACTIONS
from events_outbox.status import COUNT_LIMIT

from .cells import moment, short_id
from .confirmation import INPUT, chosen_again, confirm, is_confirmed, reason_of
from .filters import ChoiceFilter, ConsumerFilter
from .read_only import EventIdAdmin, ReadOnlyAdmin, tenant_of
from .relay import worker_rows
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


class WhichForm(forms.Form):
    """Which consumer to pause, of those that are registered."""

    consumer = forms.ChoiceField(
        choices=lambda: [(c.name, c.name) for c in consumers()], widget=forms.Select({"class": INPUT})
    )


@admin.register(ConsumerPause)
class ConsumerPauseAdmin(ReadOnlyAdmin):
    tenant_field = None
    list_display = ("consumer", "paused", "paused_by", "reason")
    fields = ("consumer", "paused", "paused_by", "reason")
    ordering = ("consumer",)
    actions = ("resume",)

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view
        return [
            path("pause/", view(self.pause_view), name="events_outbox_consumer_pause"),
            path("resume/", view(self.resume_view), name="events_outbox_consumer_resume"),
            *super().get_urls(),
        ]

    def has_pause_permission(self, request: HttpRequest) -> bool:
        return self.may(request, "pause_consumer") and tenant_of(request) is None

    def list_buttons(self, request: HttpRequest) -> list[tuple[str, str, str]]:
        if not self.has_pause_permission(request):
            return []
        return [("Pause a consumer", reverse("admin:events_outbox_consumer_pause"), "pause")]

    def page_buttons(self, request: HttpRequest, obj: Any) -> list[tuple[str, str, str]]:
        if not self.has_pause_permission(request):
            return []
        address = reverse("admin:events_outbox_consumer_resume")
        return [("Resume", f"{address}?{urlencode({'consumer': obj.consumer})}", "play_arrow")]

    @admin.display(description="paused", ordering="paused_at")
    def paused(self, pause: ConsumerPause) -> str:
        return exact_time(pause.paused_at)

    def pause_view(self, request: HttpRequest) -> HttpResponse:
        """Ask which consumer, say what the pause will do, and pause it when that is confirmed."""
        if not self.has_pause_permission(request):
            raise PermissionDenied
        form = WhichForm(request.GET if "consumer" in request.GET else None, label_suffix="")
        if not form.is_valid():
            return self._ask_which(request, form)
        consumer = form.cleaned_data["consumer"]
        if (words := pauses.paused().get(consumer)) is not None:
            self.message_user(request, f"Consumer {consumer} is paused already, {words}", messages.WARNING)
        elif not is_confirmed(request, needs_reason=True):
            return self._ask(
                request,
                consumer,
                title=f"Pause {consumer}",
                introduction=f"Within about a second {consumer} handles nothing any more. Its members stay in their "
                "group, so nothing is redistributed; events wait in Kafka, and parked ones in their keys. It goes on "
                "where it stopped when it is resumed.",
                button=f"Pause {consumer}",
                needs_reason=True,
                danger=True,
            )
        elif pauses.pause(consumer, by=str(request.user), reason=reason_of(request)):
            self.log(request, ConsumerPause(consumer=consumer), f"Paused: {reason_of(request)}")
            self.message_user(request, f"Consumer {consumer} is paused: within about a second it handles nothing")
        else:
            self.message_user(request, "Somebody else has just paused it", messages.WARNING)
        return _to_list()

    def resume_view(self, request: HttpRequest) -> HttpResponse:
        """Say what the resumption will do, and resume the consumer when that is confirmed."""
        if not self.has_pause_permission(request):
            raise PermissionDenied
        consumer = request.GET.get("consumer", "").replace("\0", "")
        pause = ConsumerPause.objects.filter(consumer=consumer).first()
        if pause is None:
            self.message_user(request, f"Consumer {consumer} is not paused", messages.WARNING)
        elif not is_confirmed(request):
            return self._ask(
                request,
                consumer,
                title=f"Resume {consumer}",
                introduction=f"Paused {pauses.in_words(pause)}. It goes on within about a second, where it stopped.",
                button=f"Resume {consumer}",
            )
        else:
            self._resume(request, [pause])
        return _to_list()

    @admin.action(description="Resume: let the consumer go on", permissions=["pause"])
    def resume(self, request: HttpRequest, queryset: QuerySet[ConsumerPause]) -> HttpResponse | None:
        chosen = list(queryset.order_by("consumer"))
        if not chosen:
            self.message_user(request, "None of them is paused any more", messages.WARNING)
        elif is_confirmed(request):
            self._resume(request, chosen)
        else:
            return confirm(
                self,
                request,
                title="Resume consumers",
                introduction="They go on within about a second, where they stopped.",
                columns=("Consumer", "Paused", "By", "Reason"),
                rows=[(p.consumer, exact_time(p.paused_at), p.paused_by, p.reason) for p in chosen],
                action="resume",
                fields=chosen_again(chosen),
                button="Resume",
            )
        return None

    def _resume(self, request: HttpRequest, chosen: list[ConsumerPause]) -> None:
        resumed = []
        for pause in chosen:
            if pauses.resume(pause.consumer, by=str(request.user)):
                resumed.append(pause.consumer)
                self.log(request, pause, "Resumed")
        if resumed:
            self.message_user(request, f"Going on within about a second: {', '.join(resumed)}")

    def _ask_which(self, request: HttpRequest, form: WhichForm) -> HttpResponse:
        context = {
            **self.admin_site.each_context(request),
            "title": "Pause a consumer",
            "opts": self.opts,
            "introduction": "A paused consumer stays in its group and handles nothing until it is resumed.",
            "form": form,
            "button": "Preview",
            "back": reverse("admin:events_outbox_consumerpause_changelist"),
        }
        return TemplateResponse(request, "admin/events_outbox/question.html", context)

    def _ask(self, request: HttpRequest, consumer: str, **options: Any) -> HttpResponse:
        members = list(Worker.objects.alive().filter(kind=Worker.Kind.CONSUMER, name=consumer).order_by("started_at"))
        letters = DeadLetter.objects.open().filter(consumer=consumer).order_by()[: COUNT_LIMIT + 1].count()
        return confirm(
            self,
            request,
            warnings=() if members else ["No member is running, as far as is known: nothing is handled anyway."],
            facts=[("Members", len(members)), ("Open dead letters", _up_to(letters, COUNT_LIMIT))],
            columns=("Member", "State", "Started", "Events a second"),
            rows=worker_rows(members),
            **options,
        )


def _up_to(count: int, limit: int) -> str:
    return f"{limit} or more" if count > limit else str(count)


def _to_list() -> HttpResponse:
    return HttpResponseRedirect(reverse("admin:events_outbox_consumerpause_changelist"))


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
