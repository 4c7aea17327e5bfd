import json
from typing import Any
from uuid import UUID

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils import timezone

from events_outbox.decoding import decoded
from events_outbox.handlers import consumers
from events_outbox.letter_actions import ReplayRefused, discard, release, replay
from events_outbox.management.arguments import event_type_pattern, moment, positive
from events_outbox.management.tables import print_table, short
from events_outbox.models import DeadLetter, DeadLetterQuerySet, OperatorAction
from events_outbox.operators import system_operator
from events_outbox.replay import of_types

LIST_LIMIT = 100
COLUMNS = (
    "id",
    "failed at",
    "consumer",
    "event type",
    "reason",
    "state",
    "attempts",
    "replays",
    "key",
    "event id",
    "error",
)


class Command(BaseCommand):
    help = "List, show, replay or discard dead letters: events that a consumer could not handle."

    def add_arguments(self, parser: CommandParser) -> None:
        actions = parser.add_subparsers(dest="action", required=True, metavar="list | show | replay | discard")

        listing = actions.add_parser("list", help="show them, the oldest first: the order of a replay")
        listing.add_argument("--closed", action="store_true", help="those replayed or discarded, not the open ones")
        listing.add_argument("--json", action="store_true", help="a JSON array, of all unless there is a --limit")
        listing.add_argument("--limit", type=positive, help=f"at most so many (default {LIST_LIMIT}; with --json: all)")

        one = actions.add_parser("show", help="all about one: event, headers, error, traceback, history, audit trail")
        one.add_argument("id", metavar="ID", help="an id as the list shows it, or an event id")

        again = actions.add_parser("replay", help="handle again, in order, and then what waited behind in the same key")
        again.add_argument("--force", action="store_true", help="also what was replayed in vain too often")

        give_up = actions.add_parser("discard", help="close without handling: what waited behind is handled")
        give_up.add_argument("--reason", dest="why", required=True, help="why; stays with the letter")

        for action in (again, give_up):
            action.add_argument("ids", nargs="*", metavar="ID", help="an id as the list shows it, or an event id")
            action.add_argument("--all", action="store_true", help="all that are open")
            action.add_argument("--limit", type=positive, help="at most so many, the oldest")
            action.add_argument("--dry-run", action="store_true", help="show what would happen")
        for action in (listing, again, give_up):
            _add_filters(action, by_reason=action is not give_up)

    def handle(self, **options: Any) -> None:
        try:
            getattr(self, f"_{options['action']}")(options)
        except ReplayRefused as error:
            raise CommandError(str(error)) from None

    def _list(self, options: dict[str, Any]) -> None:
        letters = DeadLetter.objects.exclude(resolution="") if options["closed"] else _open()
        found = _filtered(letters, options)
        limit = options["limit"] or (None if options["json"] else LIST_LIMIT)
        shown = list(found.order_by("id")[:limit])
        if options["json"]:
            self.stdout.write(json.dumps([_as_dict(letter) for letter in shown]))
        else:
            print_table(self.stdout, COLUMNS, [_as_row(letter) for letter in shown], found.count(), "dead letters")

    def _show(self, options: dict[str, Any]) -> None:
        letters = list(DeadLetter.objects.filter(pk__in=_ids([options["id"]], DeadLetter.objects.all())))
        if len(letters) != 1:
            known = ", ".join(f"{letter.pk} ({letter.consumer})" for letter in letters)
            raise CommandError(f"several consumers have it: {known}" if letters else "there is no such dead letter")
        (letter,) = letters
        closed = ""
        if letter.resolved_at is not None:
            closed = f" {_at(letter.resolved_at)} by {letter.resolved_by} {letter.resolution_reason}".rstrip()
        for name, text in (
            ("dead letter", f"{letter.pk} of consumer {letter.consumer}"),
            ("state", f"{letter.state}{closed}"),
            ("event", f"{letter.event_type or '-'} {letter.event_id}, tenant {letter.tenant_id or '-'}"),
            ("place", f"{letter.topic}/{letter.partition}/{letter.offset}, key {letter.text_key()}"),
            ("failed", f"{_at(letter.failed_at)} by {letter.failed_by}, kept since {_at(letter.created_at)}"),
            ("reason", f"{letter.reason}, attempts {letter.attempts}, replays in vain {letter.replays}"),
            ("error", letter.error),
        ):
            self.stdout.write(f"{name + ':':<13}{text}")
        self._section("event", decoded(letter.value))
        self._section("headers", "\n".join(f"{name}: {value}" for name, value in letter.text_headers()))
        self._section("traceback", letter.traceback)
        for number, failure in enumerate(letter.history, start=1):
            said = "{at} {reason} by {by}, attempts {attempts}: {error}\n{traceback}".format(**failure)
            self._section(f"earlier failure {number} of {len(letter.history)}", said)
        self._section(
            "audit trail",
            "\n".join(
                f"{_at(action.at)} {action.action} by {action.by} {action.reason or action.detail.get('error', '')}"
                for action in OperatorAction.objects.about_letter(letter)
            ),
        )

    def _section(self, title: str, text: str) -> None:
        if text := text.rstrip():
            self.stdout.write(f"\n{title}\n" + "\n".join(f"  {line}" for line in text.splitlines()))

    def _replay(self, options: dict[str, Any]) -> None:
        chosen, dry_run = _chosen(options), options["dry_run"]
        done = waiting = failed = 0
        for outcome in replay(chosen, by=system_operator(), force=options["force"], dry_run=dry_run):
            if outcome.error:
                failed += 1
                waiting += outcome.waiting
                behind = f" ({outcome.waiting} chosen ones left alone behind it)" if outcome.waiting else ""
                self.stdout.write(f"dead letter {outcome.letter_id}: {short(outcome.error, 500)}{behind}")
            else:
                done += 1
        self.stdout.write(f"{done} of {len(chosen)} {'would be ' if dry_run else ''}replayed")
        if not dry_run:
            self._release(chosen)
        if failed:
            raise CommandError(f"{failed} failed or refused, {waiting} left alone behind them")

    def _discard(self, options: dict[str, Any]) -> None:
        chosen = _chosen(options)
        if options["dry_run"]:
            self.stdout.write(f"{len(chosen)} would be discarded")
            return
        count = discard(chosen, reason=options["why"], by=system_operator())
        self.stdout.write(f"{count} discarded")
        self._release(chosen)

    def _release(self, chosen: list[int]) -> None:
        """Handle what waited behind the chosen letters; running consumers take part in it."""
        names = set(DeadLetter.objects.filter(pk__in=chosen).order_by().values_list("consumer", flat=True).distinct())
        count = 0
        for consumer in consumers():
            while consumer.name in names and (released := release(consumer)):
                count += released
        if count:
            self.stdout.write(f"{count} that waited behind were handled")


def _add_filters(parser: CommandParser, *, by_reason: bool) -> None:
    parser.add_argument("--consumer", help="of this consumer")
    parser.add_argument(
        "--event-type", type=event_type_pattern, help="of this type, or of a pattern such as conversation.*"
    )
    if by_reason:
        parser.add_argument("--reason", choices=DeadLetter.Reason.values, help="that failed for this reason")
    else:
        parser.set_defaults(reason=None)
    parser.add_argument("--topic", help="of this topic")
    parser.add_argument("--aggregate-id", help="of this aggregate: the record's key")
    parser.add_argument("--tenant-id", help="of this tenant")
    parser.add_argument("--event-id", type=UUID, help="of this event")
    parser.add_argument("--since", type=moment, metavar="TIME", help="kept then or later: ISO 8601, or an age as 2h")
    parser.add_argument("--until", type=moment, metavar="TIME", help="kept before")


def _open() -> DeadLetterQuerySet:
    found: DeadLetterQuerySet = DeadLetter.objects.open()
    return found


def _conditions(options: dict[str, Any]) -> dict[str, Any]:
    key = options["aggregate_id"]
    conditions = {
        "key": key and key.encode(),
        "created_at__gte": options["since"],
        "created_at__lt": options["until"],
        **{name: options[name] for name in ("consumer", "reason", "topic", "tenant_id", "event_id")},
    }
    return {field: value for field, value in conditions.items() if value}


def _filtered(letters: DeadLetterQuerySet, options: dict[str, Any]) -> DeadLetterQuerySet:
    found = letters.filter(**_conditions(options))
    return found.filter(of_types([options["event_type"]])) if options["event_type"] else found


def _chosen(options: dict[str, Any]) -> list[int]:
    """The ids of the letters to act on, in order."""
    by_filter = bool(_conditions(options) or options["event_type"])
    if bool(options["ids"]) + by_filter + options["all"] != 1:
        raise CommandError(f"say what to {options['action']}: ids, filters, or --all")
    if options["ids"]:
        chosen = sorted(set(_ids(options["ids"], _open())))
    else:
        chosen = list(_filtered(_open(), options).order_by("id").values_list("pk", flat=True))
    return chosen[: options["limit"]]


def _ids(texts: list[str], letters: DeadLetterQuerySet) -> list[int]:
    """Ids of letters; an event id stands for its letters. Raises CommandError for what is neither."""
    ids: list[int] = []
    for text in texts:
        if text.isdecimal():
            ids.append(int(text))
            continue
        try:
            event_id = UUID(text)
        except ValueError:
            raise CommandError(f"{text!r} is neither an id nor an event id") from None
        of_event = letters.filter(event_id=event_id).values_list("pk", flat=True)
        if not of_event:
            raise CommandError(f"there is no dead letter of event {event_id}, or none that is open")
        ids.extend(of_event)
    return ids


def _at(moment: Any) -> str:
    return timezone.localtime(moment).isoformat(sep=" ", timespec="seconds")


def _as_row(letter: DeadLetter) -> tuple[str, ...]:
    closed = f"{letter.resolved_by}: {letter.resolution_reason or letter.resolution}"
    return (
        str(letter.pk),
        _at(letter.failed_at),
        letter.consumer,
        letter.event_type or "-",
        letter.reason,
        letter.state,
        str(letter.attempts),
        str(letter.replays),
        short(letter.text_key(), 40),
        str(letter.event_id),
        short(closed if letter.resolution else letter.error),
    )


def _as_dict(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.pk,
        "state": letter.state,
        "consumer": letter.consumer,
        "event_id": str(letter.event_id),
        "event_type": letter.event_type,
        "tenant_id": letter.tenant_id,
        "topic": letter.topic,
        "partition": letter.partition,
        "offset": letter.offset,
        "key": letter.text_key(),
        "reason": letter.reason,
        "error": letter.error,
        "attempts": letter.attempts,
        "replays": letter.replays,
        "history": letter.history,
        "created_at": letter.created_at.isoformat(),
        "failed_at": letter.failed_at.isoformat(),
        "failed_by": letter.failed_by,
        "resolved_at": letter.resolved_at and letter.resolved_at.isoformat(),
        "resolved_by": letter.resolved_by,
        "resolution_reason": letter.resolution_reason,
    }
