import json
from typing import Any
from uuid import UUID

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils import timezone

from events_outbox.management.arguments import positive
from events_outbox.management.tables import print_table, short
from events_outbox.models import UndeliverableEvent, UndeliverableEventQuerySet
from events_outbox.operators import system_operator
from events_outbox.undeliverable import ActionRefused, discard, redrive, with_ids

LIST_LIMIT = 100
COLUMNS = ("id", "parked at", "reason", "state", "topic", "aggregate id", "event type", "event id", "why")


class Command(BaseCommand):
    help = "List, redrive or discard events that the broker refused for good, and those that wait behind them."

    def add_arguments(self, parser: CommandParser) -> None:
        actions = parser.add_subparsers(dest="action", required=True, metavar="list | redrive | discard")

        show = actions.add_parser("list", help="show them, the oldest first: the order of a redrive")
        _add_filters(show)
        show.add_argument(
            "--discarded", action="store_true", help="those that were discarded, instead of the open ones"
        )
        show.add_argument("--json", action="store_true", help="a JSON array, of all unless there is a --limit")
        show.add_argument("--limit", type=positive, help=f"at most so many (default {LIST_LIMIT}; with --json: all)")

        again = actions.add_parser("redrive", help="publish again with all events of the same key, in order")
        give_up = actions.add_parser("discard", help="give up: what waits behind them in their key is redriven")
        give_up.add_argument("--reason", required=True, help="why; stays with the event")
        for action in (again, give_up):
            action.add_argument("ids", nargs="*", metavar="ID", help="an id as the list shows it, or an event id")
            action.add_argument("--all", action="store_true", help="all that are open")
            action.add_argument("--dry-run", action="store_true", help="show what would happen")
        _add_filters(again)

    def handle(self, **options: Any) -> None:
        try:
            getattr(self, f"_{options['action']}")(options)
        except ActionRefused as error:
            raise CommandError(f"{error}; nothing was changed") from None

    def _list(self, options: dict[str, Any]) -> None:
        state = {"discarded_at__isnull": not options["discarded"]}
        found = _filtered(UndeliverableEvent.objects.filter(**state), options)
        limit = options["limit"] or (None if options["json"] else LIST_LIMIT)
        shown = list(found.select_related("event").order_by("id")[:limit])
        if options["json"]:
            self.stdout.write(json.dumps([_as_dict(parked) for parked in shown]))
            return
        print_table(self.stdout, COLUMNS, [_as_row(parked) for parked in shown], found.count(), "undeliverable events")

    def _redrive(self, options: dict[str, Any]) -> None:
        filters = {name: options[name] for name in ("topic", "aggregate_id", "reason")}
        if bool(options["ids"]) + any(filters.values()) + options["all"] != 1:
            raise CommandError("say what to redrive: ids, filters, or --all")
        chosen = with_ids(_ids(options["ids"])) if options["ids"] else _filtered(_open(), options)
        redriven = redrive(chosen, by=system_operator(), dry_run=options["dry_run"])
        would = "would be redriven" if options["dry_run"] else "to be redriven: a relay publishes them within seconds"
        self.stdout.write(f"{redriven.events} events of {redriven.keys} keys {would}")

    def _discard(self, options: dict[str, Any]) -> None:
        if bool(options["ids"]) + options["all"] != 1:
            raise CommandError("say what to discard: ids, or --all")
        ids = _ids(options["ids"]) if options["ids"] else list(_open().values_list("pk", flat=True))
        dry_run = options["dry_run"]
        discarded = discard(ids, reason=options["reason"], by=system_operator(), dry_run=dry_run)
        freed = discarded.redriven
        self.stdout.write(f"{discarded.events} events {'would be ' if dry_run else ''}discarded")
        if freed.events:
            self.stdout.write(
                f"{freed.events} events of {freed.keys} keys waited for them and "
                f"{'would be' if dry_run else 'are to be'} redriven"
            )


def _add_filters(parser: CommandParser) -> None:
    parser.add_argument("--topic", help="of this topic")
    parser.add_argument("--aggregate-id", help="of this aggregate")
    parser.add_argument("--reason", help='e.g. MSG_SIZE_TOO_LARGE, or "behind" for followers')


def _open() -> UndeliverableEventQuerySet:
    found: UndeliverableEventQuerySet = UndeliverableEvent.objects.open()
    return found


def _filtered(events: UndeliverableEventQuerySet, options: dict[str, Any]) -> UndeliverableEventQuerySet:
    conditions = {"topic": options["topic"], "aggregate_id": options["aggregate_id"], "reason": options["reason"]}
    return events.filter(**{field: value for field, value in conditions.items() if value})


def _ids(texts: list[str]) -> list[int]:
    """Ids of undeliverable events; an event id stands for its event's. Raises ActionRefused for one that is neither."""
    ids = []
    for text in texts:
        if text.isdecimal():
            ids.append(int(text))
            continue
        try:
            event_id = UUID(text)
        except ValueError:
            raise ActionRefused(f"{text!r} is neither an id nor an event id") from None
        parked = UndeliverableEvent.objects.filter(event__event_id=event_id).first()
        if parked is None:
            raise ActionRefused(f"event {event_id} is not undeliverable")
        ids.append(parked.pk)
    return ids


def _state(parked: UndeliverableEvent) -> str:
    if parked.discarded_at is not None:
        return "discarded"
    return "open" if parked.redrive_requested_at is None else "to be redriven"


def _as_row(parked: UndeliverableEvent) -> tuple[str, ...]:
    event = parked.event
    parked_at = timezone.localtime(parked.parked_at).isoformat(sep=" ", timespec="seconds")
    why = parked.error if parked.discarded_at is None else f"{parked.discarded_by}: {parked.discard_reason}"
    return (
        str(parked.pk),
        parked_at,
        parked.reason,
        _state(parked),
        parked.topic,
        parked.aggregate_id,
        event.event_type,
        str(event.event_id),
        short(why),
    )


def _as_dict(parked: UndeliverableEvent) -> dict[str, Any]:
    return {
        "id": parked.pk,
        "state": _state(parked),
        "reason": parked.reason,
        "error": parked.error,
        "parked_at": parked.parked_at.isoformat(),
        "redrive_requested_at": parked.redrive_requested_at and parked.redrive_requested_at.isoformat(),
        "discarded_at": parked.discarded_at and parked.discarded_at.isoformat(),
        "discarded_by": parked.discarded_by,
        "discard_reason": parked.discard_reason,
        "topic": parked.topic,
        "aggregate_id": parked.aggregate_id,
        "outbox_id": parked.event_id,
        "event_id": str(parked.event.event_id),
        "event_type": parked.event.event_type,
        "tenant_id": parked.event.tenant_id,
        "created_at": parked.event.created_at.isoformat(),
    }
