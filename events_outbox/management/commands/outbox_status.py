import dataclasses
import json
from datetime import datetime
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import Error
from django.utils import timezone

from events_outbox.management.arguments import age
from events_outbox.status import OpenTransaction, OutboxStatus, read_status, readable_seconds


class Command(BaseCommand):
    help = (
        "Show what is pending, who leads, and what is stuck. Exit status: 0; 1 with --fail-if-older-than when the "
        "oldest pending event is older than that, or any is pending and no relay leads; 2 when nothing can be read."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--json", action="store_true", help="one JSON object")
        parser.add_argument(
            "--fail-if-older-than", type=age, metavar="AGE", help="e.g. 60s: see above; says why on standard error"
        )

    def handle(self, **options: Any) -> None:
        try:
            status = read_status()
        except Error as error:
            raise CommandError(f"the state cannot be read: {str(error).strip()}", returncode=2) from error
        if options["json"]:
            self.stdout.write(json.dumps(dataclasses.asdict(status), default=str))
        else:
            for name, value in _lines(status):
                self.stdout.write(f"{name:20}{value}")
        limit = options["fail_if_older_than"]
        if limit is not None and (trouble := status.trouble(limit.total_seconds())):
            raise CommandError(trouble, returncode=1)


def _lines(status: OutboxStatus) -> list[tuple[str, str]]:
    counts = ", ".join(f"{consumer} {count}" for consumer, count in status.dead_letters.items())
    undeliverable = f"{status.undeliverable:,}"
    if status.undeliverable_to_redrive:
        undeliverable += f", of them {status.undeliverable_to_redrive:,} to be redriven"
    if status.undeliverable_discarded:
        undeliverable += f"; {status.undeliverable_discarded:,} discarded"
    return [
        ("leader", _leader(status)),
        ("heartbeat", _ago(status.heartbeat_age_seconds)),
        ("standbys", str(status.standbys)),
        ("pending", f"{status.pending:,}" if status.cursor_is_of_this_cluster else "not known until a relay leads"),
        ("oldest pending", _age(status.oldest_pending_age_seconds)),
        ("rate", f"{status.events_per_second:,.0f} events/s"),
        ("last error", status.last_error or "-"),
        ("open transactions", _open_transactions(status)),
        ("undeliverable", undeliverable),
        ("dead letters", counts or "-"),
        ("published", status.published),
        ("window", status.window or "-"),
    ]


def _leader(status: OutboxStatus) -> str:
    if status.leader is None:
        return f"none; {status.lock_held_by} holds the lock" if status.lock_held_by else "none"
    since = ""
    if status.leader_since is not None:
        led_seconds = max((timezone.now() - status.leader_since).total_seconds(), 0.0)
        since = f", since {_time(status.leader_since)} ({readable_seconds(led_seconds)})"
    return f"{status.leader_host}, pid {status.leader_pid}{since}"


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
