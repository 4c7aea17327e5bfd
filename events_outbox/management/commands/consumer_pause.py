from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from events_outbox.handlers import consumer_named
from events_outbox.operators import system_operator
from events_outbox.pauses import pause, paused


class Command(BaseCommand):
    help = "Pause a consumer: its processes stay in their group and handle nothing until consumer_resume."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name", metavar="NAME", help="the consumer's name")
        parser.add_argument("--reason", required=True, help="why; shown wherever the pause is")

    def handle(self, **options: Any) -> None:
        try:
            name = consumer_named(options["name"]).name
        except LookupError as error:
            raise CommandError(str(error)) from None
        if pause(name, by=system_operator(), reason=options["reason"]):
            self.stdout.write(f"{name} is paused: its processes notice within about a second")
        else:
            self.stdout.write(f"{name} is paused already, {paused().get(name, 'until just now')}")
