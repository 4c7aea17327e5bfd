from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from events_outbox.handlers import consumer_named
from events_outbox.operators import system_operator
from events_outbox.pauses import resume


class Command(BaseCommand):
    help = "Let a paused consumer go on."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("name", metavar="NAME", help="the consumer's name")

    def handle(self, **options: Any) -> None:
        try:
            name = consumer_named(options["name"]).name
        except LookupError as error:
            raise CommandError(str(error)) from None
        if resume(name, by=system_operator()):
            self.stdout.write(f"{name} goes on: its processes notice within about a second")
        else:
            self.stdout.write(f"{name} is not paused")
