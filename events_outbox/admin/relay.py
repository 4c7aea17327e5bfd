"""The relay: its cursor, and its pause."""

from typing import Any

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import URLPattern, path, reverse

from events_outbox import pauses
from events_outbox.models import RelayCursor, Worker
from events_outbox.status import COUNT_LIMIT, count_pending

from .cells import moment, one_line
from .confirmation import confirm, is_confirmed, reason_of
from .read_only import ReadOnlyAdmin, tenant_of
from .texts import exact_time


@admin.register(RelayCursor)
class RelayCursorAdmin(ReadOnlyAdmin):
    tenant_field = None
    list_display = ("leads", "since", "seen", "pending", "rate", "paused", "error")
    fields = (
        "paused",
        "leader",
        "leader_since",
        "heartbeat_at",
        "last_error",
        "pending",
        "rate",
        "published",
        "window",
        "window_last_id",
        "system_identifier",
    )

    @admin.display(description="leader")
    def leads(self, cursor: RelayCursor) -> str:
        return cursor.leader or "none so far"

    @admin.display(description="leads since")
    def since(self, cursor: RelayCursor) -> str:
        return moment(cursor.leader_since)

    @admin.display(description="last seen")
    def seen(self, cursor: RelayCursor) -> str:
        return moment(cursor.heartbeat_at)

    @admin.display(description="events/s")
    def rate(self, cursor: RelayCursor) -> str:
        return f"{cursor.events_per_second:.1f}"

    @admin.display(description="last error")
    def error(self, cursor: RelayCursor) -> str:
        return one_line(cursor.last_error)

    @admin.display(description="pending events")
    def pending(self, cursor: RelayCursor) -> str:
        return pending_in_words(cursor)

    @admin.display(description="paused")
    def paused(self, cursor: RelayCursor) -> str:
        pause = pauses.relay_pause()
        return "no" if pause is None else pauses.in_words(pause)

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view
        return [
            path("pause/", view(self.pause_view), name="events_outbox_relay_pause"),
            path("resume/", view(self.resume_view), name="events_outbox_relay_resume"),
            *super().get_urls(),
        ]

    def has_pause_permission(self, request: HttpRequest) -> bool:
        return self.may(request, "pause_relay") and tenant_of(request) is None

    def list_buttons(self, request: HttpRequest) -> list[tuple[str, str, str]]:
        if not self.has_pause_permission(request):
            return []
        if pauses.relay_pause() is None:
            return [("Pause the relay", reverse("admin:events_outbox_relay_pause"), "pause")]
        return [("Resume the relay", reverse("admin:events_outbox_relay_resume"), "play_arrow")]

    def page_buttons(self, request: HttpRequest, obj: Any) -> list[tuple[str, str, str]]:
        return self.list_buttons(request)

    def pause_view(self, request: HttpRequest) -> HttpResponse:
        if not self.has_pause_permission(request):
            raise PermissionDenied
        if (pause := pauses.relay_pause()) is not None:
            self.message_user(request, f"The relay is paused already, {pauses.in_words(pause)}", messages.WARNING)
        elif not is_confirmed(request, needs_reason=True):
            return self._ask(
                request,
                title="Pause the relay",
                introduction="Within about a second nothing is published any more. Events go on being emitted, and "
                "wait; whoever leads goes on leading, also a relay that takes the lead meanwhile. After the "
                "resumption all of them are published, in order. A replay that somebody runs is not held back.",
                button="Pause the relay",
                needs_reason=True,
                danger=True,
            )
        elif pauses.pause_relay(by=str(request.user), reason=reason_of(request)):
            self.log(request, RelayCursor.read(), f"Paused: {reason_of(request)}")
            self.message_user(request, "The relay is paused: within about a second it publishes nothing any more")
        else:
            self.message_user(request, "Somebody else has just paused it", messages.WARNING)
        return _to_list()

    def resume_view(self, request: HttpRequest) -> HttpResponse:
        if not self.has_pause_permission(request):
            raise PermissionDenied
        pause = pauses.relay_pause()
        if pause is None:
            self.message_user(request, "The relay is not paused", messages.WARNING)
        elif not is_confirmed(request):
            return self._ask(
                request,
                title="Resume the relay",
                introduction=f"Paused {pauses.in_words(pause)}. The relay goes on within about a second, and publishes "
                "what waits, in order.",
                button="Resume the relay",
            )
        elif pauses.resume_relay(by=str(request.user)):
            self.log(request, RelayCursor.read(), "Resumed")
            self.message_user(request, "The relay goes on within about a second")
        return _to_list()

    def _ask(self, request: HttpRequest, **options: Any) -> HttpResponse:
        workers = list(Worker.objects.alive().filter(kind=Worker.Kind.RELAY).order_by("started_at"))
        return confirm(
            self,
            request,
            warnings=() if workers else ["No relay is running, as far as is known: nothing is published anyway."],
            facts=[("Pending events", pending_in_words(RelayCursor.read())), ("Relays", len(workers))],
            columns=("Relay", "State", "Started", "Events a second"),
            rows=worker_rows(workers),
            **options,
        )


def worker_rows(workers: list[Worker]) -> list[tuple[object, ...]]:
    """Rows of a preview: each worker, what it does, since when it runs, how fast."""
    return [(f"{w.host}:{w.pid}", w.state, exact_time(w.started_at), f"{w.events_per_second:.1f}") for w in workers]


def pending_in_words(cursor: RelayCursor) -> str:
    count, _ = count_pending(cursor, COUNT_LIMIT)
    return f"{count} or more" if count == COUNT_LIMIT else str(count)


def _to_list() -> HttpResponse:
    return HttpResponseRedirect(reverse("admin:events_outbox_relaycursor_changelist"))
