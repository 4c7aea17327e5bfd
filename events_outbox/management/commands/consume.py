from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from events_outbox.consumer import ConsumerProcess, ConsumerStopped
from events_outbox.handlers import consumer_named, consumers
from events_outbox.management.process import run_until_signalled


class Command(BaseCommand):
    help = "Run a consumer: handle its events, each effectively once. Run several to share the partitions."

    def add_arguments(self, parser: CommandParser) -> None:
        known = ", ".join(consumer.name for consumer in consumers()) or "none registered"
        parser.add_argument("name", help=f"the consumer's name ({known})")
        parser.add_argument(
            "--until-idle", type=float, metavar="SECONDS", help="return when nothing came for so many seconds"
        )
        parser.add_argument("--batch-size", type=int, help="events a transaction (default: CONSUMER_BATCH_SIZE)")
        parser.add_argument("--metrics-port", type=int, default=0, help="serve /metrics and /livez here (default: off)")

    def handle(self, **options: Any) -> None:
        try:
            consumer = consumer_named(options["name"])
        except LookupError as error:
            raise CommandError(str(error)) from None
        try:
            run_until_signalled(
                consumer.name,
                options["metrics_port"],
                lambda tick: ConsumerProcess(consumer, batch_size=options["batch_size"], on_tick=tick),
                until_idle_seconds=options["until_idle"],
            )
        except ConsumerStopped as error:
            raise CommandError(f"stopped, as on_failure says: {error}") from error
