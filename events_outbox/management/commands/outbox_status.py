import dataclasses
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import Error
from django.template.defaultfilters import filesizeformat
from django.utils import timezone

from events_outbox.lag import Lag, read_lags
from events_outbox.management.arguments import age
from events_outbox.status import ConsumerState, OpenTransaction, OutboxStatus, read_status, readable_seconds

LAG_SECONDS = 2.0
"""How long Kafka is waited for: the rest is known without it."""


class Command(BaseCommand):
    help = (
        "Show what is pending, who leads, and what is stuck. Exit status: 0; 1 with --fail-if-older-than when the "
        "oldest pending event is older than that, or any is pending and no relay leads; 2 when nothing can be read."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--json", action="store_true", help="one JSON object")
        parser.add_argument(
            "--no-lag",
            action="store_true",
            help=f"do not ask Kafka for the consumers' lag ({LAG_SECONDS:.0f} s at most)",
        )
        parser.add_argument(
            "--fail-if-older-than", type=age, metavar="AGE", help="e.g. 60s: see above; says why on standard error"
        )

    def handle(self, **options: Any) -> None:
        try:
            status = read_status()
        except Error as error:
            raise CommandError(f"the state cannot be read: {str(error).strip()}", returncode=2) from error
        lags = {} if options["no_lag"] else read_lags(LAG_SECONDS)
        if options["json"]:
            self.stdout.write(json.dumps(_as_dict(status, lags), default=str))
        else:
            for name, value in _lines(status, lags):
                self.stdout.write(f"{name:20}{value}")
        limit = options["fail_if_older_than"]
        if limit is not None and (trouble := status.trouble(limit.total_seconds())):
            raise CommandError(trouble, returncode=1)


_NOT_ASKED = Lag(None, None, "not asked for")


def _as_dict(status: OutboxStatus, lags: Mapping[str, Lag]) -> dict[str, Any]:
    shown = dataclasses.asdict(status)
    for consumer in shown["consumers"]:
        lag = lags.get(consumer["name"], _NOT_ASKED)
        consumer |= {"lag_events": lag.events, "lag_seconds": lag.seconds, "lag_not_known": lag.not_known}
    return shown


def _lines(status: OutboxStatus, lags: Mapping[str, Lag]) -> list[tuple[str, str]]:
    counts = ", ".join(f"{consumer} {count}" for consumer, count in status.dead_letters.items())
    undeliverable = f"{status.undeliverable:,}"
    if status.undeliverable_to_redrive:
        undeliverable += f", of them {status.undeliverable_to_redrive:,} to be redriven"
    if status.undeliverable_discarded:
        undeliverable += f"; {status.undeliverable_discarded:,} discarded"
    return [
        ("leader", _leader(status)),
        *([("paused", _paused(status.relay_paused_at, status))] if status.relay_paused_at else []),
        ("heartbeat", _ago(status.heartbeat_age_seconds)),
        ("standbys", str(status.standbys)),
        ("pending", f"{status.pending:,}" if status.cursor_is_of_this_cluster else "not known until a relay leads"),
        ("oldest pending", _age(status.oldest_pending_age_seconds)),
        ("rate", f"{status.events_per_second:,.0f} events/s"),
        ("last error", status.last_error or "-"),
        ("open transactions", _open_transactions(status)),
        ("undeliverable", undeliverable),
        ("dead letters", counts or "-"),
        *(
            ("" if number else "consumers", _consumer(consumer, lags.get(consumer.name, _NOT_ASKED)))
            for number, consumer in enumerate(status.consumers)
        ),
        ("processed marks", f"about {status.processed_marks.rows:,}, {_size(status.processed_marks.bytes)}"),
        ("published", status.published),
        ("window", status.window or "-"),
    ]


def _consumer(consumer: ConsumerState, lag: Lag) -> str:
    """What is to be said of a consumer; whether it has members is for `consumer_offsets`, which takes longer."""
    parts = [_lag(lag)]
    if consumer.paused_at is not None:
        parts.append(f"paused by {consumer.paused_by} since {_time(consumer.paused_at)}: {consumer.pause_reason}")
    if consumer.dead_letters:
        parts.append(f"{consumer.dead_letters:,} dead letters")
    return f"{consumer.name}: " + "; ".join(parts)


def _lag(lag: Lag) -> str:
    if lag.events is None:
        return f"lag not known: {lag.not_known}"
    if not lag.events:
        return "no lag"
    oldest = "of unknown age" if lag.seconds is None else f"{readable_seconds(lag.seconds)} old"
    return f"{lag.events:,} events behind, the oldest {oldest}"


def _size(count: int) -> str:
    return filesizeformat(count).replace("\xa0", " ")


def _leader(status: OutboxStatus) -> str:
    if status.leader is None:
        return f"none; {status.lock_held_by} holds the lock" if status.lock_held_by else "none"
    since = ""
    if status.leader_since is not None:
        led_seconds = max((timezone.now() - status.leader_since).total_seconds(), 0.0)
        since = f", since {_time(status.leader_since)} ({readable_seconds(led_seconds)})"
    return f"{status.leader_host}, pid {status.leader_pid}{since}"


def _paused(since: datetime, status: OutboxStatus) -> str:
    return f"by {status.relay_paused_by} since {_time(since)}: {status.relay_pause_reason}"


def _open_transactions(status: OutboxStatus) -> str:
    """How many hold back events of their own, and which is the oldest."""
    oldest = status.oldest_open_transaction
    if oldest is None:
        return "0"
    return f"{status.open_transactions:,} holding back their events; the oldest: {_describe(oldest)}"


def _describe(writer: OpenTransaction) -> str:
    since = "" if writer.age_seconds is None else f" for {readable_seconds(max(writer.age_seconds, 0.0))}"
    if writer.prepared is not None:
        return f"prepared as {writer.prepared!r} by {writer.user}{since}: commit or roll it back"
    who = " ".join(part for part in (writer.application_name, writer.user, writer.client) if part)
    query = " ".join((writer.query or "-").split())
    return f"pid {writer.pid} ({who}), {writer.state or 'open'}{since}: {query}"


def _age(seconds: float | None) -> str:
    return "-" if seconds is None else readable_seconds(seconds)


def _ago(seconds: float | None) -> str:
    return "-" if seconds is None else f"{readable_seconds(seconds)} ago"


def _time(moment: datetime) -> str:
    return timezone.localtime(moment).isoformat(sep=" ", timespec="seconds")
