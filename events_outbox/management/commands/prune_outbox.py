from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import psycopg
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser

from events_outbox.leader import SESSION_LOST, open_session
from events_outbox.management.arguments import age
from events_outbox.pruning import (
    count_old_marks,
    count_prunable,
    prune_events,
    prune_marks,
    shortest_age_of_marks,
)

Session = psycopg.Connection[Any]


class Command(BaseCommand):
    help = (
        "Delete published events, and processed marks, that are older than an age, in short steps, also while a relay "
        "leads. Events that are not published, or wait as undeliverable, stay. EVENTS_OUTBOX['PRUNE_AFTER_DAYS'] and "
        "['PROCESSED_KEEP_DAYS'] have the leader do it."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--older-than", type=age, metavar="AGE", help="of events, such as 12h, 7d or 4w")
        parser.add_argument(
            "--marks-older-than",
            type=age,
            metavar="AGE",
            help="of processed marks, at least TOPIC_RETENTION_DAYS: an event without its mark is handled again when "
            "it is replayed, or read again",
        )
        parser.add_argument("--dry-run", action="store_true", help="only count them; reads the whole tables")

    def handle(self, **options: Any) -> None:
        events, marks = options["older_than"], options["marks_older_than"]
        if events is None and marks is None:
            raise CommandError("say what to delete: --older-than, --marks-older-than, or both")
        if marks is not None and marks < shortest_age_of_marks():
            raise CommandError(
                f"--marks-older-than: Kafka keeps records for {shortest_age_of_marks().days} days "
                "(TOPIC_RETENTION_DAYS) and may bring them again; nothing was deleted"
            )
        try:
            with open_session("prune_outbox") as session:
                for what, older_than, count, prune in (
                    ("events", events, count_prunable, prune_events),
                    ("processed marks", marks, count_old_marks, prune_marks),
                ):
                    if older_than is None:
                        continue
                    if options["dry_run"]:
                        self.stdout.write(f"{count(session, older_than):,} {what} would be deleted")
                    else:
                        self.stdout.write(f"{_pruned(session, what, older_than, prune):,} {what} deleted")
        except (*SESSION_LOST, ImproperlyConfigured) as error:
            raise CommandError(str(error).strip()) from error


def _pruned(
    session: Session, what: str, older_than: timedelta, prune: Callable[[Session, timedelta], Iterator[int]]
) -> int:
    count = 0
    try:
        for deleted in prune(session, older_than):
            count += deleted
    except SESSION_LOST as error:
        raise CommandError(f"{count:,} {what} deleted, then: {str(error).strip()}") from error
    return count
