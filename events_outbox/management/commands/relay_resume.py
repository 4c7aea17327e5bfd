from typing import Any

from django.core.management.base import BaseCommand

from events_outbox.operators import system_operator
from events_outbox.pauses import resume_relay


class Command(BaseCommand):
    help = "Let the paused relay go on."

    def handle(self, **options: Any) -> None:
        if resume_relay(by=system_operator()):
            self.stdout.write("the relay goes on: its leader notices within about a second")
        else:
            self.stdout.write("the relay is not paused")
