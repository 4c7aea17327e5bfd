from functools import partial
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser

from events_outbox.heartbeats import Heartbeats, Kind, Vitals
from events_outbox.management.process import run_until_signalled
from events_outbox.relay import Relay
from monitoring.worker import Worker


class Command(BaseCommand):
    help = "Publish the outbox to Kafka. Run as many as you like: one leads, the others stand by."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--until-empty", action="store_true", help="return once nothing is pending")
        parser.add_argument("--batch-size", type=int, help="events a batch (default: EVENTS_OUTBOX['BATCH_SIZE'])")
        parser.add_argument("--metrics-port", type=int, default=0, help="serve /metrics and /livez here (default: off)")

    def handle(self, **options: Any) -> None:
        try:
            vitals = Vitals(Kind.RELAY, "relay", options["metrics_port"])
            with Worker("relay", options["metrics_port"]) as worker, Heartbeats([vitals]):
                relay = Relay(batch_size=options["batch_size"], on_tick=worker.tick, vitals=vitals)
                run_until_signalled(partial(relay.run, until_empty=options["until_empty"]), relay.stop)
        except ImproperlyConfigured as error:
            raise CommandError(str(error)) from error
