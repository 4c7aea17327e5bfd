"""`manage.py simulate_traffic`: load over HTTP, and a check that analytics equal what was sent (development only)."""

import signal
import time
from argparse import ArgumentParser, ArgumentTypeError
from types import FrameType
from typing import Any
from uuid import UUID

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from voicehelper.services import find_services
from voicehelper.simulation import Simulation, Summary, counted, differences, people_of

COUNTED_WITHIN_SECONDS = 120.0


class Command(BaseCommand):
    help = (
        "Have people of simulated tenants use the API for a while, and compare analytics with what was accepted. "
        "Exits with 1 when they differ. Relay, consumers and web server must run, as `make up` has them."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--rate", type=_positive, default=50.0, help="requests a second, in all (default 50)")
        parser.add_argument("--seconds", type=_positive, default=30.0, help="how long (default 30)")
        parser.add_argument("--tenants", type=int, choices=range(1, 101), metavar="1..100", default=3)
        parser.add_argument(
            "--error-rate",
            type=_share,
            default=0.02,
            help="share of conversations that fail, and that send a wrong request (0 to 1, default 0.02)",
        )
        parser.add_argument(
            "--reply-share",
            type=_share,
            default=0.0 if settings.ASSISTANT.base_url else 0.2,
            help="share of messages that the assistant is asked to reply to (0 to 1, default 0.2; 0 where LLM_BASE_URL "
            "names a language model, which costs what it costs)",
        )
        parser.add_argument("--url", default=find_services().web_url, help="the web server (default: %(default)s)")
        parser.add_argument("--seed", type=int, default=1, help="the same seed has people say the same (default 1)")

    def handle(self, *args: Any, **options: Any) -> None:
        if settings.ENVIRONMENT == "prod":
            raise CommandError("simulate_traffic makes tenants with known names: it does not run in production")
        people = people_of(options["tenants"])
        tenants = sorted({person.tenant_id for person in people})
        self._wait_until_still(tenants)
        before = counted(tenants)
        simulation = Simulation(
            options["url"],
            people,
            rate=options["rate"],
            seconds=options["seconds"],
            error_rate=options["error_rate"],
            reply_share=options["reply_share"],
            seed=options["seed"],
        )

        def stop(number: int, frame: FrameType | None) -> None:
            simulation.stop()

        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
        for summary in simulation.run():
            self.stdout.write(_line(summary))
            self.stdout.flush()
        ledger = simulation.ledger
        if not ledger.conversations:
            raise CommandError(f"Nothing was accepted at {options['url']}: is the web server running? {_line(summary)}")
        if ledger.unknown:
            raise CommandError(f"{ledger.unknown} requests stayed without an answer: nothing can be compared")
        accepted = (
            f"{ledger.conversations.total():,} conversations and {ledger.messages.total():,} messages accepted, among "
            f"them {ledger.replies:,} replies of {ledger.tokens.total():,} tokens"
        )
        self.stdout.write(f"{accepted}; waiting until analytics has counted them")
        deadline = time.monotonic() + COUNTED_WITHIN_SECONDS
        while (found := differences(ledger, before, counted(tenants))) and time.monotonic() < deadline:
            time.sleep(0.2)
        if found:
            raise CommandError("analytics differs from what was accepted:\n" + "\n".join(found))
        self.stdout.write(f"analytics has counted exactly that, for each of {len(tenants)} tenants and each mode")

    def _wait_until_still(self, tenants: list[UUID]) -> None:
        """What an earlier run has left on the way would be counted as this one's."""
        last = counted(tenants)
        still_since = time.monotonic()
        while time.monotonic() - still_since < 1:
            time.sleep(0.2)
            if (now := counted(tenants)) != last:
                last, still_since = now, time.monotonic()


def _line(summary: Summary) -> str:
    def milliseconds(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds * 1e3:.0f} ms"

    return (
        f"{summary.requests:6,} requests, {summary.per_second:6.1f}/s, p50 {milliseconds(summary.p50)}, "
        f"p95 {milliseconds(summary.p95)}; so far {summary.replies} replies, {summary.refused} refused, "
        f"{summary.unknown} without an answer"
    )


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"{text!r} is no share between 0 and 1")
    return value
