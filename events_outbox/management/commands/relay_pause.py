from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from events_outbox.operators import system_operator
from events_outbox.pauses import in_words, pause_relay, relay_pause


class Command(BaseCommand):
    help = "Pause the relay: the leader keeps the lead and publishes nothing until relay_resume. Events wait."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--reason", required=True, help="why; shown wherever the pause is")

    def handle(self, **options: Any) -> None:
        if pause_relay(by=system_operator(), reason=options["reason"]):
            self.stdout.write("the relay is paused: its leader notices within about a second")
        else:
            pause = relay_pause()
            self.stdout.write(f"the relay is paused already, {in_words(pause) if pause else 'until just now'}")
