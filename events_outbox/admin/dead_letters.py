"""Dead letters: what happened, replay, discard."""

import time
from typing import Any

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.urls import reverse
from django.utils.html import format_html, format_html_join

from events_outbox import letter_actions
from events_outbox.conf import outbox_settings
from events_outbox.handlers import consumers
from events_outbox.letter_actions import ReplayRefused
from events_outbox.models import DeadLetter, OperatorAction, OutboxEvent

from .cells import moment, one_line
from .filters import ConsumerFilter, EventTypeFilter, FieldChoiceFilter, TenantFilter
from .read_only import EventIdAdmin
from .texts import exact_time, readable

REQUEST_SECONDS = 20.0
"""How long a request handles events. What is left over is for the next one, or for the command."""
SHOWN_ERRORS = 10
SHOWN_BYTES = 4096


class StateFilter(admin.SimpleListFilter):
    title = parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(state, state) for state in ("open", "replayed", "discarded")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        if self.value() in ("open", "replayed", "discarded"):
            return queryset.filter(resolution="" if self.value() == "open" else self.value())
        return queryset

    def keys(self) -> QuerySet[Any] | None:
        """In the order of their index: the planner might read all the closed ones to find the few that are open."""
        is_open = self.value() == "open"
        return DeadLetter.objects.open().order_by("consumer", "topic").values_list("pk", flat=True) if is_open else None


class ReasonFilter(FieldChoiceFilter):
    title = parameter_name = field = "reason"


@admin.register(DeadLetter)
class DeadLetterAdmin(EventIdAdmin):
    list_display = (
        "kept_cell",
        "consumer",
        "event_type",
        "short_reason",
        "letter_state",
        "short_error",
    )
    list_filter = (StateFilter, ConsumerFilter, ReasonFilter, EventTypeFilter, TenantFilter)
    list_defer = ("value", "headers", "history", "traceback")
    time_field = "created_at"
    export_fields = (
        "id",
        "created_at",
        "failed_at",
        "consumer",
        "event_id",
        "event_type",
        "tenant_id",
        "topic",
        "partition",
        "offset",
        "reason",
        "letter_state",
        "error",
        "attempts",
        "replays",
        "resolved_at",
        "resolved_by",
        "resolution_reason",
    )
    fields = (
        "letter_state",
        "consumer",
        "reason",
        "error",
        "attempts",
        "replays",
        "failed",
        "kept",
        "resolved",
        "event",
        "event_type",
        "tenant_id",
        "key_text",
        "place",
        "decoded",
        "header_lines",
        "formatted_traceback",
        "earlier_failures",
        "audit_trail",
        "raw_value",
    )
    actions = ("replay", "replay_by_force", "discard")

    @admin.display(description="state", ordering="resolution")
    def letter_state(self, letter: DeadLetter) -> str:
        return letter.state

    @admin.display(description="error")
    def short_error(self, letter: DeadLetter) -> str:
        return one_line(letter.error)

    @admin.display(description="reason", ordering="reason")
    def short_reason(self, letter: DeadLetter) -> str:
        return letter.reason

    @admin.display(description="kept since")
    def kept_cell(self, letter: DeadLetter) -> str:
        return moment(letter.created_at)

    @admin.display(description="failed")
    def failed(self, letter: DeadLetter) -> str:
        return f"{exact_time(letter.failed_at)}, by {letter.failed_by}"

    @admin.display(description="kept since")
    def kept(self, letter: DeadLetter) -> str:
        return exact_time(letter.created_at)

    @admin.display(description="closed")
    def resolved(self, letter: DeadLetter) -> str:
        if letter.resolved_at is None:
            return "-"
        why = f": {letter.resolution_reason}" if letter.resolution_reason else ""
        return f"{exact_time(letter.resolved_at)}, {letter.resolution} by {letter.resolved_by}{why}"

    @admin.display(description="event id")
    def event(self, letter: DeadLetter) -> str:
        emitted = OutboxEvent.objects.filter(event_id=letter.event_id).values_list("pk", flat=True).first()
        if emitted is None:
            return str(letter.event_id)
        url = reverse("admin:events_outbox_outboxevent_change", args=[emitted])
        return format_html('<a href="{}">{}</a>', url, letter.event_id)

    @admin.display(description="key")
    def key_text(self, letter: DeadLetter) -> str:
        return letter.text_key()

    @admin.display(description="topic/partition/offset")
    def place(self, letter: DeadLetter) -> str:
        return f"{letter.topic}/{letter.partition}/{letter.offset}"

    @admin.display(description="decoded event")
    def decoded(self, letter: DeadLetter) -> str:
        return readable(letter.value)

    @admin.display(description="raw value (hex)")
    def raw_value(self, letter: DeadLetter) -> str:
        if letter.value is None:
            return "no value"
        raw = bytes(letter.value)
        more = f"\n... the first {SHOWN_BYTES} of them" if len(raw) > SHOWN_BYTES else ""
        return format_html("<pre>{} bytes\n{}{}</pre>", len(raw), raw[:SHOWN_BYTES].hex(" "), more)

    @admin.display(description="headers")
    def header_lines(self, letter: DeadLetter) -> str:
        lines = [f"{name}: {value}" for name, value in letter.text_headers()]
        return format_html("<pre>{}</pre>", "\n".join(lines)) if lines else "-"

    @admin.display(description="traceback")
    def formatted_traceback(self, letter: DeadLetter) -> str:
        return format_html("<pre>{}</pre>", letter.traceback) if letter.traceback else "-"

    @admin.display(description="earlier failures")
    def earlier_failures(self, letter: DeadLetter) -> str:
        failures = [
            (f["at"], f["reason"], f["by"], f["attempts"], f["error"], f["traceback"] or "no traceback")
            for f in reversed(letter.history)
        ]
        row = "<details><summary>{} {}, by {}, attempt {}: {}</summary><pre>{}</pre></details>"
        return format_html_join("", row, failures) or "-"

    @admin.display(description="audit trail")
    def audit_trail(self, letter: DeadLetter) -> str:
        lines = [
            (exact_time(action.at), action.action, action.by, action.why())
            for action in OperatorAction.objects.about_letter(letter)
        ]
        return format_html_join("", "<div>{} {} by {} {}</div>", lines) or "-"

    @admin.action(description="Replay: handle the events again, in order", permissions=["operate"])
    def replay(self, request: HttpRequest, queryset: QuerySet[DeadLetter]) -> None:
        self._replay(request, queryset, force=False)

    @admin.action(description="Replay by force: also what was replayed in vain too often", permissions=["operate"])
    def replay_by_force(self, request: HttpRequest, queryset: QuerySet[DeadLetter]) -> None:
        self._replay(request, queryset, force=True)

    def _replay(self, request: HttpRequest, queryset: QuerySet[DeadLetter], *, force: bool) -> None:
        chosen = self.few(request, queryset, "dead_letters replay")
        if chosen is None:
            return
        letters = {letter.pk: letter for letter in chosen}
        deadline = time.monotonic() + REQUEST_SECONDS
        done, errors, waiting = 0, [], 0
        for outcome in letter_actions.replay(list(letters), by=str(request.user), force=force):
            if outcome.error:
                errors.append(f"dead letter {outcome.letter_id}: {outcome.error}")
                self.log(request, letters[outcome.letter_id], f"not replayed: {outcome.error}")
            else:
                done += 1
                self.log(request, letters[outcome.letter_id], "replayed")
            waiting += outcome.waiting
            if time.monotonic() > deadline:
                errors.append(f"stopped after {REQUEST_SECONDS:.0f} seconds: replay the rest, or use the command")
                break
        released = self._release(chosen, deadline)
        for error in errors[:SHOWN_ERRORS]:
            self.message_user(request, error, messages.ERROR)
        if len(errors) > SHOWN_ERRORS:
            self.message_user(request, f"{len(errors) - SHOWN_ERRORS} more failed", messages.ERROR)
        if any("in vain" in error for error in errors):
            hint = f"After {outbox_settings().MAX_REPLAYS} replays in vain a letter takes force: mend the cause first."
            self.message_user(request, hint, messages.WARNING)
        if waiting:
            self.message_user(request, f"{waiting} left alone behind a failed one of their key", messages.WARNING)
        if done or released:
            self.message_user(request, f"{done} dead letters replayed{_and_released(released)}")

    @admin.action(description="Discard: close without handling", permissions=["operate"])
    def discard(self, request: HttpRequest, queryset: QuerySet[DeadLetter]) -> HttpResponse | None:
        """Ask for the reason on a page of its own, then discard."""
        chosen = self.few(request, queryset, "dead_letters discard")
        if chosen is None:
            return None
        if closed := [letter for letter in chosen if letter.resolution]:
            self.message_user(
                request, f"dead letter {closed[0].pk} is closed already; nothing was changed", messages.ERROR
            )
            return None
        reason = request.POST.get("reason", "").strip()
        if "confirmed" not in request.POST or not reason:
            return self.ask_why(
                request,
                introduction="These events will not be handled. They stay visible as discarded, with your name and the "
                "reason.",
                waiting="What waits behind them in their key is handled then."
                if any(letter.key is not None and _parks(letter) for letter in chosen)
                else "",
                columns=("Id", "Consumer", "Event type", "Event id", "Key", "Reason", "Error"),
                rows=[
                    (
                        letter.pk,
                        (
                            letter.consumer,
                            letter.event_type or "-",
                            letter.event_id,
                            letter.text_key(),
                            letter.reason,
                            letter.error[:120],
                        ),
                    )
                    for letter in chosen
                ],
            )
        try:
            count = letter_actions.discard([letter.pk for letter in chosen], reason=reason, by=str(request.user))
        except ReplayRefused as error:
            self.message_user(request, str(error), messages.ERROR)
            return None
        for letter in chosen:
            self.log(request, letter, f"discarded: {reason}")
        released = self._release(chosen, time.monotonic() + REQUEST_SECONDS)
        self.message_user(request, f"{count} dead letters discarded{_and_released(released)}")
        return None

    def _release(self, chosen: list[DeadLetter], deadline: float) -> int:
        """Handle what waited behind them; what is left over at the deadline is for the consumers."""
        names = {letter.consumer for letter in chosen}
        return sum(
            letter_actions.release(consumer, lambda: time.monotonic() > deadline)
            for consumer in consumers()
            if consumer.name in names
        )


def _parks(letter: DeadLetter) -> bool:
    return any(c.on_failure == "park_key" for c in consumers() if c.name == letter.consumer)


def _and_released(count: int) -> str:
    return f"; {count} that waited behind were handled" if count else ""
