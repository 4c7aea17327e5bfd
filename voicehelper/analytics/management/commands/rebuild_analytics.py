from argparse import ArgumentTypeError
from datetime import UTC, date, datetime, timedelta
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError

from events_outbox.conf import outbox_settings
from events_outbox.management.arguments import moment
from voicehelper.analytics.rebuild import FRESH_TABLE, Difference, Rebuild, RebuildFailed


class Command(BaseCommand):
    help = (
        "Count all events that the consumer `analytics` has handled again, from the outbox and, where that was pruned, "
        f"from Kafka, into the fresh table {FRESH_TABLE}; also while events go on arriving. Exit status 1: the live "
        "totals differ; 2: the events could not be read."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--since", type=day, metavar="DAY", help="this UTC day and later ones, e.g. 2026-01-31")
        parser.add_argument("--compare", action="store_true", help="show the rows that differ from the live ones")
        parser.add_argument(
            "--swap",
            action="store_true",
            help="put the rebuilt totals in the place of the live ones; what is counted meanwhile stays",
        )
        parser.add_argument(
            "--unmarked-before",
            type=moment,
            metavar="TIME",
            help="events that happened before then count as handled also without a processed mark, since those were "
            "pruned; default: PROCESSED_KEEP_DAYS ago, where that is set",
        )

    def handle(self, **options: Any) -> None:
        keep_days = outbox_settings().PROCESSED_KEEP_DAYS
        unmarked_before = options["unmarked_before"]
        if unmarked_before is None and keep_days is not None:
            unmarked_before = datetime.now(UTC) - timedelta(days=keep_days)
        try:
            with Rebuild(since=options["since"], unmarked_before=unmarked_before) as rebuild:
                self._run(rebuild, compare=options["compare"], swap=options["swap"])
        except RebuildFailed as error:
            raise CommandError(str(error), returncode=2) from error
        except DatabaseError as error:
            raise CommandError(f"the database failed: {str(error).strip()}", returncode=2) from error

    def _run(self, rebuild: Rebuild, *, compare: bool, swap: bool) -> None:
        rebuild.count(compare=compare or swap)
        self.stdout.write(
            f"{rebuild.from_outbox:,} events of the outbox and {rebuild.from_kafka:,} of Kafka counted again: "
            f"{rebuild.rows:,} rows"
        )
        if rebuild.not_found:
            self.stderr.write(
                f"{rebuild.not_found:,} events that were counted are neither in the outbox nor in Kafka any more: "
                "compare with --since"
            )
        if not (compare or swap):
            self.stdout.write(f"see the table {FRESH_TABLE}")
            return
        for difference in rebuild.differences:
            self.stdout.write(_line(difference))
        if rebuild.differing_rows > len(rebuild.differences):
            self.stdout.write(f"... {rebuild.differing_rows - len(rebuild.differences):,} more")
        if rebuild.differing_rows and not swap:
            raise CommandError(
                f"{rebuild.differing_rows:,} rows differ; {FRESH_TABLE} holds what they should be, and --swap puts it "
                "in their place"
            )
        if rebuild.differing_rows:
            rebuild.swap()
        rebuild.drop_fresh_table()
        self.stdout.write(
            f"{rebuild.differing_rows:,} rows put right" if rebuild.differing_rows else "the live totals are the same"
        )


def day(text: str) -> date:
    """Parse a day such as 2026-01-31."""
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is no day such as 2026-01-31") from None


def _line(difference: Difference) -> str:
    measures = ", ".join(f"{name} {live} live, {fresh} rebuilt" for name, (live, fresh) in difference.measures.items())
    model = f" {difference.model}" if difference.model else ""
    return f"{difference.day} {difference.mode}{model} of {difference.tenant_id}: {measures}"
