from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser

from events_outbox.leader import SESSION_LOST, open_session
from events_outbox.management.arguments import age
from events_outbox.pruning import count_prunable, prune_events


class Command(BaseCommand):
    help = (
        "Delete published events that are older than an age, in short steps, also while a relay leads. Events that "
        "are not published, or wait as undeliverable, stay. EVENTS_OUTBOX['PRUNE_AFTER_DAYS'] has the leader do it."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--older-than", type=age, required=True, metavar="AGE", help="such as 12h, 7d or 4w")
        parser.add_argument("--dry-run", action="store_true", help="only count them; reads the whole table")

    def handle(self, **options: Any) -> None:
        count = 0
        try:
            with open_session("prune_outbox") as session:
                if options["dry_run"]:
                    self.stdout.write(f"{count_prunable(session, options['older_than']):,} events would be deleted")
                    return
                for deleted in prune_events(session, options["older_than"]):
                    count += deleted
        except (*SESSION_LOST, ImproperlyConfigured) as error:
            raise CommandError(f"{count:,} events deleted, then: {str(error).strip()}") from error
        self.stdout.write(f"{count:,} events deleted")
