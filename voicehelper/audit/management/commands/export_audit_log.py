from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError

from events_outbox.management.arguments import moment
from voicehelper.audit.chain import FORMATS, ChainBroken
from voicehelper.audit.verification import UnknownTenant, export


class Command(BaseCommand):
    help = (
        "Write a tenant's part of the audit log to standard output, with its hashes: voicehelper/audit/chain.py says "
        "how it is verified elsewhere, and does so by itself (python chain.py FILE). With a period it is the unbroken "
        "part of the chain that holds all of the period's entries."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        time_help = "ISO 8601, or an age such as 2h or 7d"
        parser.add_argument("--tenant", metavar="ID", required=True, help="whose entries")
        parser.add_argument("--format", choices=FORMATS, default="jsonl", help="default: jsonl")
        parser.add_argument("--since", type=moment, metavar="TIME", help=f"what happened then or later: {time_help}")
        parser.add_argument("--until", type=moment, metavar="TIME", help=f"what happened before: {time_help}")

    def handle(self, **options: Any) -> None:
        since, until = options["since"], options["until"]
        if since and until and since >= until:
            raise CommandError("--since must be before --until", returncode=2)
        try:
            for line in export(options["tenant"], options["format"], since=since, until=until):
                self.stdout.write(line, ending="")
        except (UnknownTenant, ChainBroken) as error:
            raise CommandError(str(error), returncode=2) from None
        except DatabaseError as error:
            raise CommandError(f"the log could not be read: {str(error).strip()}", returncode=2) from error
