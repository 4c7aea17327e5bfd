"""Dead letters: what happened, replay, discard."""

import time
from collections.abc import Collection
from typing import Any

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.urls import reverse
from django.utils.html import format_html, format_html_join

from events_outbox import letter_actions, pauses
from events_outbox.conf import outbox_settings
from events_outbox.handlers import consumers
from events_outbox.letter_actions import AlreadyClosed, ReplayRefused
from events_outbox.models import DeadLetter, OperatorAction, OutboxEvent

from . import payload
from .cells import moment, one_line
from .confirmation import chosen_again, confirm, is_confirmed, reason_of
from .filters import ConsumerFilter, EventTypeFilter, FieldChoiceFilter, TenantFilter
from .read_only import EventIdAdmin
from .texts import exact_time

REQUEST_SECONDS = 20.0
"""How long a request handles events. What is left over is for the next one, or for the command."""
SHOWN_ERRORS = 10
SHOWN_BYTES = 4096
COUNTED_WAITING = 10_000


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
    fieldsets = (
        (
            "What happened",
            {
                "fields": (
                    "letter_state",
                    "consumer",
                    "reason_in_words",
                    "whole_error",
                    "attempts",
                    "replays",
                    "failed",
                    "kept",
                    "resolved",
                )
            },
        ),
        (
            "The event",
            {
                "fields": (
                    "event",
                    "event_type",
                    "tenant_id",
                    "key_text",
                    "place",
                    "header_lines",
                    "decoded",
                    "raw_value",
                )
            },
        ),
        ("Traceback", {"fields": ("formatted_traceback",)}),
        ("History", {"fields": ("earlier_failures",)}),
        ("Audit", {"fields": ("audit_trail",)}),
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

    @admin.display(description="reason")
    def reason_in_words(self, letter: DeadLetter) -> str:
        return f"{letter.reason}: {letter.get_reason_display()}"

    @admin.display(description="error")
    def whole_error(self, letter: DeadLetter) -> str:
        return _block(letter.error, "error")

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
        return format_html('<a class="text-link" href="{}">{}</a>', url, letter.event_id)

    @admin.display(description="key")
    def key_text(self, letter: DeadLetter) -> str:
        return letter.text_key()

    @admin.display(description="topic/partition/offset")
    def place(self, letter: DeadLetter) -> str:
        return f"{letter.topic}/{letter.partition}/{letter.offset}"

    @admin.display(description="decoded event")
    def decoded(self, letter: DeadLetter) -> str:
        return self.payload_on_page(letter, letter.value, subject=f"dead letter {letter.pk}")

    @admin.display(description="raw value (hex)")
    def raw_value(self, letter: DeadLetter) -> str:
        if letter.value is None:
            return "no value"
        raw = bytes(letter.value)
        if not payload.may_view(letter.page_request):  # type: ignore[attr-defined]
            return f"{len(raw)} bytes; {payload.NOT_SHOWN}"
        more = f"\n... the first {SHOWN_BYTES} of them" if len(raw) > SHOWN_BYTES else ""
        return _block(f"{len(raw)} bytes\n{raw[:SHOWN_BYTES].hex(' ')}{more}", "raw value")

    @admin.display(description="headers")
    def header_lines(self, letter: DeadLetter) -> str:
        lines = [f"{name}: {value}" for name, value in letter.text_headers()]
        return _block("\n".join(lines), "headers")

    @admin.display(description="traceback")
    def formatted_traceback(self, letter: DeadLetter) -> str:
        return _block(letter.traceback, "traceback")

    @admin.display(description="earlier failures")
    def earlier_failures(self, letter: DeadLetter) -> str:
        failures = [
            (f["at"], f["reason"], f["by"], f["attempts"], f["error"], f["traceback"] or "no traceback")
            for f in reversed(letter.history)
        ]
        row = '<details><summary>{} {}, by {}, attempt {}: {}</summary><pre class="operate-pre">{}</pre></details>'
        rows = format_html_join("", row, failures)
        return format_html('<div class="operate-history">{}</div>', rows) if rows else "-"

    @admin.display(description="audit trail")
    def audit_trail(self, letter: DeadLetter) -> str:
        lines = [
            (exact_time(action.at), action.action, action.by, action.why())
            for action in OperatorAction.objects.about_letter(letter)
        ]
        return format_html_join("", "<div>{} {} by {} {}</div>", lines) or "-"

    def page_buttons(self, request: HttpRequest, obj: DeadLetter) -> list[tuple[str, str, str]]:
        return [] if obj.resolution else super().page_buttons(request, obj)

    def has_replay_permission(self, request: HttpRequest) -> bool:
        return self.may(request, "replay_deadletter")

    def has_discard_permission(self, request: HttpRequest) -> bool:
        return self.may(request, "discard_deadletter")

    @admin.action(description="Replay: handle the events again, in order", permissions=["replay"])
    def replay(self, request: HttpRequest, queryset: QuerySet[DeadLetter]) -> HttpResponse | None:
        return self._replay(request, queryset, force=False)

    @admin.action(description="Replay by force: also what was replayed in vain too often", permissions=["replay"])
    def replay_by_force(self, request: HttpRequest, queryset: QuerySet[DeadLetter]) -> HttpResponse | None:
        return self._replay(request, queryset, force=True)

    def _replay(self, request: HttpRequest, queryset: QuerySet[DeadLetter], *, force: bool) -> HttpResponse | None:
        chosen = self.few(request, queryset, "dead_letters replay")
        if chosen is None:
            return None
        if not is_confirmed(request):
            return self._ask_replay(request, chosen, force=force)
        letters = {letter.pk: letter for letter in chosen}
        deadline = time.monotonic() + REQUEST_SECONDS
        done, errors, waiting = 0, [], 0
        for outcome in letter_actions.replay(list(letters), by=str(request.user), force=force):
            if outcome.error:
                errors.append(f"Dead letter {outcome.letter_id}: {outcome.error}")
                self.log(request, letters[outcome.letter_id], f"not replayed: {outcome.error}")
            else:
                done += 1
                self.log(request, letters[outcome.letter_id], "replayed")
            waiting += outcome.waiting
            if time.monotonic() > deadline:
                errors.append(f"Stopped after {REQUEST_SECONDS:.0f} seconds: replay the rest, or use the command")
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
        return None

    def _ask_replay(self, request: HttpRequest, chosen: list[DeadLetter], *, force: bool) -> HttpResponse:
        rehearsal = letter_actions.replay(
            [letter.pk for letter in chosen], by=str(request.user), force=force, dry_run=True
        )
        outcomes = {outcome.letter_id: outcome for outcome in rehearsal}
        ready = sum(not outcome.error for outcome in outcomes.values())
        refused = len(chosen) - ready
        stuck = {outcome.letter_id for outcome in outcomes.values() if outcome.error}
        behind = _waiting_behind([letter for letter in chosen if letter.pk in outcomes.keys() - stuck], stuck)
        warnings = []
        if refused:
            warnings.append(f"Not replayed: {refused}. The list says why.")
        if behind:
            warnings.append(f"Handled after them: {behind} that wait behind them in their keys.")
        warnings += [
            f"Consumer {name} is paused: the chosen ones are handled all the same, what waits behind them is not."
            for name in sorted({letter.consumer for letter in chosen} & set(pauses.paused()))
        ]
        return confirm(
            self,
            request,
            title="Replay dead letters by force" if force else "Replay dead letters",
            introduction=f"Their handlers run again now, in order, for up to {REQUEST_SECONDS:.0f} seconds. One that "
            "fails stays open, with the new failure, and those behind it in its key are left alone."
            if ready
            else "None of them can be replayed.",
            warnings=warnings,
            facts=[("Replayed", ready), ("Not replayed", refused), ("Waiting behind", behind)],
            columns=("Id", "Consumer", "Event type", "Key", "Failed for", "Replays in vain", "What happens"),
            rows=[
                (
                    letter.pk,
                    letter.consumer,
                    letter.event_type or "-",
                    letter.text_key(),
                    letter.error[:120],
                    letter.replays,
                    _outlook(outcomes.get(letter.pk)),
                )
                for letter in chosen
            ],
            action="replay_by_force" if force else "replay",
            fields=chosen_again(chosen),
            button=f"Replay {ready}" if ready else "",
            back=request.get_full_path(),
        )

    @admin.action(description="Discard: close without handling", permissions=["discard"])
    def discard(self, request: HttpRequest, queryset: QuerySet[DeadLetter]) -> HttpResponse | None:
        """Say what goes on without them, ask for the reason, then discard."""
        chosen = self.few(request, queryset, "dead_letters discard")
        if chosen is None:
            return None
        if closed := [letter for letter in chosen if letter.resolution]:
            self.message_user(
                request, f"Dead letter {closed[0].pk} is closed already; nothing was changed", messages.ERROR
            )
            return None
        reason = reason_of(request)
        if not is_confirmed(request, needs_reason=True):
            return self._ask_discard(request, chosen)
        ids, by, refused = [letter.pk for letter in chosen], str(request.user), ""
        try:
            letter_actions.discard(ids, reason=reason, by=by)
        except AlreadyClosed as error:  # found before anything is done
            text = str(error)
            self.message_user(request, f"{text[:1].upper()}{text[1:]}; nothing was changed", messages.ERROR)
            return None
        except ReplayRefused as error:
            refused = str(error)
        # Each key is discarded in a transaction of its own: those before the one that was refused are.
        done = DeadLetter.objects.filter(pk__in=ids, resolution=DeadLetter.Resolution.DISCARDED, resolved_by=by[:150])
        done_ids = set(done.filter(resolution_reason=reason).values_list("pk", flat=True))
        discarded = [letter for letter in chosen if letter.pk in done_ids]
        for letter in discarded:
            self.log(request, letter, f"discarded: {reason}")
        released = self._release(discarded, time.monotonic() + REQUEST_SECONDS)
        if refused:
            before = f"; {len(discarded)} of {len(chosen)} were discarded before that{_and_released(released)}"
            text = f"{refused[:1].upper()}{refused[1:]}{before if discarded else ''}"
            self.message_user(request, text, messages.ERROR)
        else:
            self.message_user(request, f"{len(discarded)} dead letters discarded{_and_released(released)}")
        return None

    def _ask_discard(self, request: HttpRequest, chosen: list[DeadLetter]) -> HttpResponse:
        behind = _waiting_behind(chosen)
        warnings = [f"What waits behind them in their key is handled then: {behind}."] if behind else []
        warnings += [
            f"Consumer {name} is paused: what waits behind them is handled after its resumption."
            for name in sorted({letter.consumer for letter in chosen if _parks(letter)} & set(pauses.paused()))
        ]
        return confirm(
            self,
            request,
            title="Discard dead letters",
            introduction="These events will not be handled. They stay visible as discarded, with your name and the "
            "reason.",
            warnings=warnings,
            facts=[("Discarded", len(chosen)), ("Waiting behind", behind)],
            columns=("Id", "Consumer", "Event type", "Event id", "Key", "Reason", "Error"),
            rows=[
                (
                    letter.pk,
                    letter.consumer,
                    letter.event_type or "-",
                    letter.event_id,
                    letter.text_key(),
                    letter.reason,
                    letter.error[:120],
                )
                for letter in chosen
            ],
            action="discard",
            fields=chosen_again(chosen),
            button=f"Discard {len(chosen)}",
            needs_reason=True,
            danger=True,
            back=request.get_full_path(),
        )

    def _release(self, chosen: list[DeadLetter], deadline: float) -> int:
        """Handle what waited behind them; what is left over at the deadline is for the consumers."""
        names = {letter.consumer for letter in chosen}
        return sum(
            letter_actions.release(consumer, lambda: time.monotonic() > deadline)
            for consumer in consumers()
            if consumer.name in names
        )


def _waiting_behind(chosen: list[DeadLetter], stuck: Collection[int] = ()) -> int:
    """How many letters that are not chosen are handled once these are closed, as far as they are counted.

    Those that wait in their keys, up to the first that does not merely wait: one that failed itself, or one of the
    `stuck`, which stay open. None of a key where an open letter stands before the chosen ones.
    """
    firsts: dict[tuple[str, str, bytes], int] = {}
    for letter in sorted(chosen, key=lambda letter: letter.pk):
        if letter.key is not None and _parks(letter):
            firsts.setdefault((letter.consumer, letter.topic, bytes(letter.key)), letter.pk)
    ids = [letter.pk for letter in chosen]
    count = 0
    for (consumer, topic, key), first in firsts.items():
        others = DeadLetter.objects.open().of_key(consumer, topic, key).exclude(pk__in=ids).order_by("id")
        for pk, reason in others.values_list("pk", "reason")[: COUNTED_WAITING - count]:
            if pk < first or pk in stuck or reason != DeadLetter.Reason.BEHIND:
                break
            count += 1
        if count == COUNTED_WAITING:
            break
    return count


def _parks(letter: DeadLetter) -> bool:
    return any(c.on_failure == "park_key" for c in consumers() if c.name == letter.consumer)


def _outlook(outcome: letter_actions.Outcome | None) -> str:
    if outcome is None:
        return "not: it is closed, or stays behind one of its key that is not replayed"
    return f"not: {outcome.error}" if outcome.error else "handled again"


def _and_released(count: int) -> str:
    return f"; {count} that waited behind were handled" if count else ""


def _block(text: str, name: str) -> str:
    """Text as it is, in a box that scrolls by itself, also by keyboard."""
    if not text:
        return "-"
    block = '<pre class="operate-pre" tabindex="0" role="region" aria-label="{}">{}</pre>'
    return format_html(block, name, payload.readable_characters(text))
