from functools import partial
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandParser

from events_outbox.heartbeats import Heartbeats, Kind, Vitals
from events_outbox.management.process import Together, run_until_signalled
from monitoring.worker import Worker
from voicehelper.notifications.deliveries import DeliveryLoop, worker_name
from voicehelper.notifications.models import Channel

STEPS_OF_A_MAIL = 12
"""For each of them the mail server is waited for, EMAIL_TIMEOUT_SECONDS at most; meanwhile the loop does not tick."""


class Command(BaseCommand):
    help = "Send what notifications have for e-mail and webhooks. Run as many as you like: they share the work."

    def add_arguments(self, parser: CommandParser) -> None:
        channels = [Channel.EMAIL.value, Channel.WEBHOOK.value]
        parser.add_argument("--channel", choices=channels, help="send by this one alone (default: both, side by side)")
        parser.add_argument("--until-idle", action="store_true", help="return once nothing is due")
        parser.add_argument("--metrics-port", type=int, default=0, help="serve /metrics and /livez here (default: off)")

    def handle(self, **options: Any) -> None:
        channels = [options["channel"]] if options["channel"] else [Channel.EMAIL.value, Channel.WEBHOOK.value]
        port, stale_seconds = options["metrics_port"], max(120.0, STEPS_OF_A_MAIL * settings.EMAIL_TIMEOUT)
        with Worker("delivery", port, loops=channels, stale_after_seconds=stale_seconds) as worker:
            loops = {
                channel: DeliveryLoop(
                    channel,
                    partial(worker.tick, channel),
                    until_idle=options["until_idle"],
                    vitals=Vitals(Kind.OTHER, worker_name(channel), port, stale_after_seconds=stale_seconds),
                )
                for channel in channels
            }
            together = Together(loops, worker.done)
            with Heartbeats([loop.vitals for loop in loops.values()]):
                run_until_signalled(together.run, together.stop)
