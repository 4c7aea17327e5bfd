import dataclasses
import json
from argparse import ArgumentTypeError
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import Error
from django.utils import timezone

from events_outbox.handlers import Consumer, consumer_named, consumers
from events_outbox.kafka import Group
from events_outbox.lag import total
from events_outbox.management.arguments import moment
from events_outbox.offsets import (
    OffsetsNotKnown,
    PartitionOffsets,
    ResetRefused,
    Target,
    plan_reset,
    read_group,
    read_offsets,
    require_no_members,
    reset,
)
from events_outbox.operators import system_operator
from events_outbox.status import readable_seconds

ANSWER_SECONDS = 5.0
"""How long each question to Kafka may take; a broker that is away fails the first."""
COLUMNS = ("topic", "partition", "committed", "start", "end", "lag events", "lag")


class Command(BaseCommand):
    help = "Show what a consumer's group has committed and how far it is behind, or set its offsets anew."

    def add_arguments(self, parser: CommandParser) -> None:
        known = ", ".join(consumer.name for consumer in consumers()) or "none registered"
        parser.add_argument("name", metavar="NAME", help=f"the consumer's name ({known})")
        actions = parser.add_subparsers(dest="action", required=True, metavar="show | reset")

        show = actions.add_parser("show", help="offsets and lag of each partition, and the group's members")
        show.add_argument("--json", action="store_true", help="one JSON object")

        again = actions.add_parser(
            "reset",
            help="begin elsewhere. Refused while the group has members. What has a processed mark is not handled again",
        )
        again.add_argument(
            "--to",
            type=_target,
            required=True,
            metavar="earliest | latest | TIME | OFFSET",
            help="a time in ISO 8601, or an age such as 2h: what was published then or later; an offset",
        )
        again.add_argument("--topic", help="only this topic")
        again.add_argument(
            "--partition", type=_partition, action="append", metavar="N", help="only this one; can be repeated"
        )
        again.add_argument("--reason", default="", help="why; stays in the audit trail")
        again.add_argument("--dry-run", action="store_true", help="show what would happen")

    def handle(self, **options: Any) -> None:
        try:
            consumer = consumer_named(options["name"])
            getattr(self, f"_{options['action']}")(consumer, options)
        except (LookupError, OffsetsNotKnown) as error:
            raise CommandError(str(error)) from None
        except ResetRefused as error:
            raise CommandError(f"{error}; nothing was changed") from None
        except Error as error:
            raise CommandError(
                f"the audit trail cannot be written: {str(error).strip()}; nothing was changed"
            ) from None

    def _show(self, consumer: Consumer, options: dict[str, Any]) -> None:
        offsets = read_offsets(consumer, ANSWER_SECONDS)
        group, members_not_known = None, ""
        try:
            group = read_group(consumer, ANSWER_SECONDS)
        except OffsetsNotKnown as error:
            members_not_known = str(error)
        if options["json"]:
            self.stdout.write(json.dumps(_as_dict(consumer, group, members_not_known, offsets)))
            return
        self.stdout.write(f"group {consumer.group_id}: {_describe(group, members_not_known)}")
        for member in group.members if group else []:
            reads = ", ".join(f"{topic}/{number}" for topic, number in member.partitions) or "nothing"
            self.stdout.write(f"  {member.client_id} on {member.host}: {reads}")
        self._table([COLUMNS, *(_row(partition) for partition in offsets)])
        lag = total(offsets)
        self.stdout.write(f"{lag.events:,} events behind, oldest: {_age(lag.seconds)}" if lag.events else "no lag")

    def _reset(self, consumer: Consumer, options: dict[str, Any]) -> None:
        (to, words), dry_run = options["to"], options["dry_run"]
        partitions = options["partition"] or []
        if isinstance(to, int) and not (partitions and (options["topic"] or len(consumer.topics) == 1)):
            raise CommandError("an offset means another record in each partition: name --topic and --partition")
        moves = plan_reset(consumer, to, ANSWER_SECONDS, topic=options["topic"], partitions=partitions)
        if not dry_run:
            reset(consumer, moves, ANSWER_SECONDS, to=words, by=system_operator(), reason=options["reason"])
        rows = [(m.topic, str(m.partition), _offset(m.from_offset), "->", str(m.to_offset)) for m in moves]
        self._table([("topic", "partition", "from", "", "to"), *rows])
        changed = sum(m.from_offset != m.to_offset for m in moves)
        self.stdout.write(f"{changed} of {len(moves)} partitions {'would begin' if dry_run else 'begin'} elsewhere")
        if dry_run:
            try:
                require_no_members(consumer, ANSWER_SECONDS)
            except ResetRefused as error:
                self.stdout.write(f"but it would be refused now: {error}")

    def _table(self, rows: list[tuple[str, ...]]) -> None:
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            self.stdout.write("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _target(text: str) -> tuple[Target, str]:
    """Parse where to, and keep the words for the audit trail."""
    if text == "earliest":
        return "earliest", text
    if text == "latest":
        return "latest", text
    if text.isdecimal():
        return int(text), text
    try:
        to = moment(text)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{error}, nor earliest, latest or an offset") from None
    if to > timezone.now():
        raise ArgumentTypeError(f"{text!r} lies in the future")
    return to, to.isoformat(timespec="milliseconds")


def _partition(text: str) -> int:
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} is no partition's number")
    return int(text)


def _row(p: PartitionOffsets) -> tuple[str, ...]:
    place = (p.topic, str(p.partition), _offset(p.committed), str(p.start), str(p.end))
    return (*place, f"{p.lag_events:,}", _age(p.lag_seconds) if p.lag_events else "-")


def _offset(committed: int | None) -> str:
    return "never" if committed is None else str(committed)


def _age(seconds: float | None) -> str:
    return "not known" if seconds is None else readable_seconds(seconds)


def _describe(group: Group | None, not_known: str) -> str:
    if group is None:
        return f"members not known: {not_known}"
    if group.is_empty:
        return "no members"
    return f"{len(group.members)} members ({group.state})"


def _as_dict(
    consumer: Consumer, group: Group | None, members_not_known: str, offsets: list[PartitionOffsets]
) -> dict[str, Any]:
    lag = total(offsets)
    return {
        "consumer": consumer.name,
        "group_id": consumer.group_id,
        "state": group.state if group else None,
        "members": [dataclasses.asdict(member) for member in group.members] if group else None,
        "members_not_known": members_not_known,
        "lag_events": lag.events,
        "lag_seconds": lag.seconds,
        "partitions": [dataclasses.asdict(partition) for partition in offsets],
    }
