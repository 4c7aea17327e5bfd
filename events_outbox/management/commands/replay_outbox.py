from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from events_outbox.exceptions import LeadershipLost
from events_outbox.publisher import ProducerBroken
from events_outbox.replay import replay_unhandled


class Command(BaseCommand):
    help = "Publish events again that the relay has published already, with the same ids."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--unhandled",
            action="store_true",
            help="those that some consumer has not handled: for a broker that lost its records",
        )

    def handle(self, **options: Any) -> None:
        if not options["unhandled"]:
            raise CommandError("say what to publish again: --unhandled")
        try:
            count = replay_unhandled()
        except (LeadershipLost, ProducerBroken) as error:
            raise CommandError(str(error)) from error
        self.stdout.write(f"published {count} unhandled events again")
