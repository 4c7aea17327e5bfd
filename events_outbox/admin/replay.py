"""Replaying events: which ones, what that will do, and doing it within the request."""

import contextlib
import threading
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg
from django import forms
from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect, QueryDict
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils import timezone

from events_outbox.conf import outbox_settings
from events_outbox.management.arguments import event_type_pattern, moment
from events_outbox.models import OutboxEvent, RelayCursor
from events_outbox.operators import note_action
from events_outbox.publisher import ProducerBroken
from events_outbox.replay import Replay, ReplayRefused, ReplayStopped, Selection

from .confirmation import INPUT, chosen_again, confirm, is_confirmed, reason_of
from .periods import Period
from .read_only import ReadOnlyAdmin, tenant_of
from .texts import exact_time

REQUEST_SECONDS = 20.0
"""How long a request selects or publishes. What is left over is for the command, which goes on where it stopped."""
AT_ONCE_EVENTS = 10_000
SHOWN_EVENTS = 10
NOTED_CHARACTERS = 20_000
"""Of the command that stands for a selection, in the audit trail."""
FIRST_YEAR, LAST_YEAR = 1970, 9000
LONGEST_ADDRESS = 3_000
"""Of the characters that a web server takes for an address: some 4,000."""


class ParsedField(forms.CharField):
    """A value that is parsed as the command's option is."""

    def __init__(self, parse: Callable[[str], Any], **options: Any) -> None:
        super().__init__(required=False, widget=forms.TextInput({"class": INPUT}), **options)
        self._parse = parse

    def clean(self, value: Any) -> Any:
        text = super().clean(value)
        return parsed(self._parse, text) if text else None


class ManyField(forms.CharField):
    """Several values, one a line; commas separate them as well."""

    def __init__(self, parse: Callable[[str], Any], **options: Any) -> None:
        super().__init__(required=False, widget=forms.Textarea({"class": INPUT, "rows": 2}), **options)
        self._parse = parse

    def clean(self, value: Any) -> Any:
        texts = super().clean(value).replace(",", "\n").splitlines()
        return tuple(parsed(self._parse, text.strip()) for text in texts if text.strip())


def parsed(parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except ArgumentTypeError as error:
        raise forms.ValidationError(str(error)) from error
    except (ValueError, OverflowError) as error:
        raise forms.ValidationError(f"{text!r} is none") from error


class ReplayForm(forms.Form):
    """Which events: the options of `replay_outbox` that choose some. An event must meet every one that is given."""

    since = ParsedField(moment, help_text="Created then or later: ISO 8601, or an age such as 2h or 7d.")
    until = ParsedField(moment, help_text="Created before: ISO 8601, or an age such as 2h or 7d.")
    event_type = ManyField(
        event_type_pattern, label="Event types", help_text="Types or patterns such as conversation.*, one a line."
    )
    aggregate_id = ManyField(str, label="Aggregate ids", help_text="One a line.")
    tenant_id = ManyField(str, label="Tenant ids", help_text="One a line.")
    event_id = ManyField(UUID, label="Event ids", help_text="One a line.")

    def __init__(
        self, data: dict[str, str] | None = None, *, tenant: str | None, initial: dict[str, str] | None = None
    ) -> None:
        super().__init__(data, initial=initial, label_suffix="")
        self._tenant = tenant
        if tenant is not None:
            del self.fields["tenant_id"]  # it is the user's own, whatever is asked for

    def clean(self) -> dict[str, Any]:
        chosen: dict[str, Any] = super().clean() or {}
        if not self.errors:
            if not any(chosen.values()):
                raise forms.ValidationError("Say which events: fill in at least one field.")
            for name in ("since", "until"):
                # Far from the ends of what a time can be: slack is added to it, and other time zones are asked for.
                if chosen[name] and not FIRST_YEAR <= chosen[name].year <= LAST_YEAR:
                    text = f"The year of the time {name} must be between {FIRST_YEAR} and {LAST_YEAR}."
                    raise forms.ValidationError(text)
            if chosen["since"] and chosen["until"] and chosen["since"] >= chosen["until"]:
                raise forms.ValidationError("The time since must be before the time until.")
        return chosen

    def selection(self) -> Selection:
        chosen = self.cleaned_data
        until = chosen["until"]
        if until is None and not chosen["event_id"]:
            until = timezone.now()  # what is confirmed is what was shown, without what comes meanwhile
        return Selection(
            since=chosen["since"],
            until=until,
            event_types=chosen["event_type"],
            aggregate_ids=chosen["aggregate_id"],
            tenant_ids=chosen["tenant_id"] if self._tenant is None else (self._tenant,),
            event_ids=chosen["event_id"],
        )


@dataclass(frozen=True)
class Preview:
    """What a replay would publish. `trouble`: why it cannot be told."""

    total: int = 0
    first: OutboxEvent | None = None
    last: OutboxEvent | None = None
    rows: tuple[OutboxEvent, ...] = ()
    trouble: str = ""


class ReplayPages(ReadOnlyAdmin):
    """The events' part of replaying: an action for chosen rows, a page for whatever a filter says."""

    actions = ("replay",)

    def has_replay_permission(self, request: HttpRequest) -> bool:
        return self.may(request, "replay_events")

    def get_urls(self) -> list[URLPattern]:
        replay = path("replay/", self.admin_site.admin_view(self.replay_view), name="events_outbox_replay")
        return [replay, *super().get_urls()]

    def list_buttons(self, request: HttpRequest) -> list[tuple[str, str, str]]:
        if not self.has_replay_permission(request):
            return super().list_buttons(request)
        address = reverse("admin:events_outbox_replay")
        query = request.GET.urlencode()
        button = ("Replay by filter", f"{address}?{query}" if query else address, "replay")
        return [*super().list_buttons(request), button]

    def page_buttons(self, request: HttpRequest, obj: Any) -> list[tuple[str, str, str]]:
        return []  # the event's page has its own

    @admin.action(description="Replay: publish again", permissions=["replay"])
    def replay(self, request: HttpRequest, queryset: QuerySet[OutboxEvent]) -> HttpResponse | None:
        chosen = self.few(request, queryset, "replay_outbox", button="Replay by filter")
        if chosen is None:
            return None
        selection = Selection(event_ids=tuple(event.event_id for event in chosen))
        if is_confirmed(request, needs_reason=True):
            self._publish(request, selection)
            return None
        return self._ask(request, selection, action="replay", fields=chosen_again(chosen), back=request.get_full_path())

    def replay_view(self, request: HttpRequest) -> HttpResponse:
        """Ask which events, show what would be published, and publish it when that is confirmed."""
        if not (self.has_view_permission(request) and self.has_replay_permission(request)):
            raise PermissionDenied
        tenant = tenant_of(request)
        if request.method == "POST":
            form = ReplayForm(_values(request.POST), tenant=tenant)
            if form.is_valid() and is_confirmed(request, needs_reason=True):
                self._publish(request, form.selection())
                return HttpResponseRedirect(reverse("admin:events_outbox_outboxevent_changelist"))
        elif "preview" in request.GET or ("event_id" in request.GET and "edit" not in request.GET):
            form = ReplayForm(_values(request.GET), tenant=tenant)
        else:
            values, left_out = from_list(request.GET)
            return self._ask_which(request, ReplayForm(initial=values, tenant=tenant), left_out)
        if not form.is_valid():
            return self._ask_which(request, form, [])
        selection = form.selection()
        # One field for all values of a name: there may be more of them than fields that a form may have.
        fields = {name: "\n".join(texts) for name, texts in _fields(selection).items()}
        return self._ask(request, selection, fields=fields, back=_address(selection))

    def _ask_which(self, request: HttpRequest, form: ReplayForm, left_out: list[str]) -> HttpResponse:
        context = {
            **self.admin_site.each_context(request),
            "title": "Replay events",
            "opts": self.opts,
            "introduction": "Publish events again that the relay has published already, in order, with the same ids. "
            "An event must meet every condition that is given. Nothing is published before you confirm it.",
            "warnings": left_out,
            "form": form,
            "button": "Preview",
            "method": "post",  # many ids are too long for an address
            "back": reverse("admin:events_outbox_outboxevent_changelist"),
        }
        return TemplateResponse(request, "admin/events_outbox/question.html", context)

    def _ask(
        self, request: HttpRequest, selection: Selection, *, fields: Mapping[str, object], **options: Any
    ) -> HttpResponse:
        preview = look(selection)
        warnings = [preview.trouble] if preview.trouble else []
        missing = len(set(selection.event_ids)) - preview.total
        if not preview.trouble and missing > 0:
            warnings.append(
                f"{missing} of {len(set(selection.event_ids))} event ids cannot be published again: not there (any "
                "more), not published yet, undeliverable, or left out by another condition."
            )
        too_many = preview.total > AT_ONCE_EVENTS
        if too_many:
            warnings.append(
                f"More than {AT_ONCE_EVENTS:,} are not published from here. Choose fewer, or use the command:\n"
                f"{selection.command()}"
            )
        facts: list[tuple[str, object]] = [("Events to publish again", f"{preview.total:,}")]
        for name, event in (("First", preview.first), ("Last", preview.last)):
            if event is not None:
                facts.append((name, f"id {event.pk}, created {exact_time(event.created_at)}"))
        may_go = preview.total and not too_many and not preview.trouble
        return confirm(
            self,
            request,
            title="Replay events",
            introduction="These events are published again, in order and with the same ids. A consumer that has "
            "handled an event drops the copy; one that has not handles it now. Other readers see it twice."
            if preview.total
            else "There is nothing to publish again.",
            warnings=warnings,
            facts=facts,
            columns=("Id", "Created", "Event type", "Aggregate", "Tenant", "Topic", "Event id"),
            rows=[
                (e.pk, exact_time(e.created_at), e.event_type, e.aggregate_id, e.tenant_id, e.topic, e.event_id)
                for e in preview.rows
            ],
            total=preview.total,
            button=f"Publish {preview.total:,} again" if may_go else "",
            fields={**fields, "shown": preview.total},
            needs_reason=True,
            **options,
        )

    def _publish(self, request: HttpRequest, selection: Selection) -> None:
        """Publish within the request, and say what became of it."""
        by, reason = str(request.user), reason_of(request)
        has_started = False

        def note_start(started: Replay) -> None:
            # Before anything is published: whatever ends this process, what it did has left a trace.
            nonlocal has_started
            note_action(
                "events.replayed",
                consumer="",
                subject=f"{started.total} events, to begin with",
                by=by,
                reason=reason,
                state="started",
                selected=started.total,
                command=selection.command()[:NOTED_CHARACTERS],
            )
            has_started = True

        replay, trouble = publish(selection, at_most=_shown(request), on_start=note_start)
        if has_started:
            replay.note(by=by, reason=reason)
            self.log_many(request, replay.published, f"Replayed{' in part' if trouble else ''}: {reason}")
            done = f"{replay.published:,} of {replay.total:,} events published again"
            self.message_user(request, done, messages.WARNING if trouble else messages.SUCCESS)
        elif not trouble:
            self.message_user(request, "There was nothing to publish again", messages.WARNING)
        if trouble:
            is_left = replay.published < replay.total <= _shown(request)
            go_on = f". Go on with: {selection.command(replay.last_id)}" if is_left else ""
            self.message_user(request, f"{trouble}{go_on}", messages.ERROR)


def look(selection: Selection) -> Preview:
    """Find out what a replay would publish; publish nothing."""
    replay = Replay(selection)
    try:
        with _stopped_in_time(replay), replay:
            total, outer_ids = replay.total, replay.outer_ids
    except ReplayStopped:
        return Preview(
            trouble=f"To select these events takes longer than {REQUEST_SECONDS:.0f} seconds. Choose fewer, or use the "
            f"command:\n{selection.command()}"
        )
    except psycopg.Error as error:
        return Preview(trouble=f"The database does not say which events these are: {error}")
    if outer_ids is None:
        return Preview()
    # Between the first and the last one, so that it costs no more than the selection has.
    rows = selection.events(RelayCursor.read()).filter(id__range=outer_ids).order_by("id").defer("value")
    outer = OutboxEvent.objects.defer("value").in_bulk(set(outer_ids))
    first, last = (outer.get(id_) for id_ in outer_ids)
    return Preview(total, first, last, tuple(rows[:SHOWN_EVENTS]))


def publish(selection: Selection, *, at_most: int, on_start: Callable[[Replay], None]) -> tuple[Replay, str]:
    """Publish for as long as a request may take; return the replay, and what kept it from its end.

    `at_most`: how many were confirmed. Pending events that were published meanwhile can be more. `on_start`: called
    when it is about to publish, which it does not when there is nothing.
    """
    replay = Replay(selection)
    trouble, has_started = "", False
    try:
        with _stopped_in_time(replay), replay:
            if replay.total > at_most:
                return replay, f"By now {replay.total:,} events are meant, more than confirmed: nothing was published"
            if replay.total:
                on_start(replay)
                has_started = True
                replay.publish()
    except ReplayRefused as error:
        return replay, f"The broker refused one: {error}; no later event of its key was published again"
    except ReplayStopped:
        trouble = f"Stopped after {REQUEST_SECONDS:.0f} seconds"
    except (ProducerBroken, psycopg.Error) as error:
        trouble = f"It could not go on: {error}"
    if trouble and has_started and replay.published < replay.total:
        trouble += "; some events of the batch after these may have gone out too"
    return replay, trouble


@contextlib.contextmanager
def _stopped_in_time(replay: Replay) -> Iterator[None]:
    timer = threading.Timer(REQUEST_SECONDS, replay.stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def from_list(query: QueryDict) -> tuple[dict[str, str], list[str]]:
    """The form's values for what a list of events is filtered by, and in words what they cannot express."""
    values = {name: "\n".join(query.getlist(name)) for name in ReplayForm.base_fields if query.get(name)}
    left_out = []
    if topic := query.get("topic"):
        patterns = [f"{domain}.*" for domain, name in outbox_settings().TOPICS.items() if name == topic]
        if patterns:
            values.setdefault("event_type", "\n".join(patterns))
        else:
            left_out.append(f"The topic {topic} is not taken over: choose event types.")
    if date := query.get("date"):
        with contextlib.suppress(ValueError):
            period = Period.parse(date)
            values.setdefault("since", period.start.isoformat())
            values.setdefault("until", period.end.isoformat())
    if term := query.get("q", "").strip():
        try:
            values.setdefault("event_id", str(UUID(term)))
        except ValueError:
            values.setdefault("aggregate_id", term)
            left_out.append("The search is taken over as an aggregate id; it may have been a correlation id.")
    if query.get("status", "published") != "published":
        left_out.append("Only published events are published again, whatever the list's status.")
    return values, left_out


def _shown(request: HttpRequest) -> int:
    """How many events the page that was confirmed had shown."""
    shown = request.POST.get("shown", "")
    return min(int(shown), AT_ONCE_EVENTS) if shown.isdecimal() else AT_ONCE_EVENTS


def _values(query: QueryDict) -> dict[str, str]:
    return {name: "\n".join(query.getlist(name)) for name in ReplayForm.base_fields}


def _fields(selection: Selection) -> dict[str, list[str]]:
    """The selection as fields of the form: times are absolute, as an age means another time later."""
    values: dict[str, Any] = {
        "since": selection.since,
        "until": selection.until,
        "event_type": selection.event_types,
        "aggregate_id": selection.aggregate_ids,
        "tenant_id": selection.tenant_ids,
        "event_id": selection.event_ids,
    }
    texts = {name: _texts(value) for name, value in values.items()}
    return {name: found for name, found in texts.items() if found}


def _texts(value: Any) -> list[str]:
    if isinstance(value, datetime):
        return [value.isoformat()]
    return [str(one) for one in value or ()]


def _address(selection: Selection) -> str:
    """Where the selection can be changed; the empty form when it is too long for an address."""
    query = QueryDict(mutable=True)
    for name, texts in _fields(selection).items():
        query.setlist(name, texts)
    query["edit"] = "1"
    form = reverse("admin:events_outbox_replay")
    address = f"{form}?{query.urlencode()}"
    return address if len(address) <= LONGEST_ADDRESS else form
