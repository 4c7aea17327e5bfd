import dataclasses
import json
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from events_outbox.status import read_status


class Command(BaseCommand):
    help = "Show what is pending, who leads, and what is stuck."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--json", action="store_true", help="one JSON object")

    def handle(self, **options: Any) -> None:
        status = dataclasses.asdict(read_status())
        if options["json"]:
            self.stdout.write(json.dumps(status, default=str))
            return
        for name, value in status.items():
            self.stdout.write(f"{name.replace('_', ' '):28}{'-' if value in (None, '', {}) else value}")
