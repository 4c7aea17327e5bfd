"""The state of the outbox and its consumers, read from the database: for `outbox_status`, metrics and the admin."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from django.db import connection, transaction
from django.db.models import Count, Min
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from monitoring import metrics

from .leader import APPLICATION_NAME, LOCK_KEY
from .models import DeadLetter, OutboxEvent, RelayCursor, UndeliverableEvent

SCRAPE_SECONDS = 3
COUNT_LIMIT = 100_000
"""Counts stop here where speed matters more than the exact figure: metrics and the admin."""


@dataclass(frozen=True)
class OutboxStatus:
    """`oldest_pending_age_seconds` and `leader` are None when nothing is pending and when no relay leads."""

    pending: int
    oldest_pending_age_seconds: float | None
    undeliverable: int
    dead_letters: dict[str, int]
    leader: str | None
    leader_since: datetime | None
    heartbeat_age_seconds: float | None
    standbys: int
    last_error: str
    published: str
    window: str | None


def read_status(count_limit: int | None = None) -> OutboxStatus:
    """Read the state now. `count_limit`: stop counting pending events there; None counts them all."""
    cursor = RelayCursor.read()
    pending, oldest = count_pending(cursor, count_limit)
    leader_alive, standbys = _relays()
    now = datetime.now(UTC)
    return OutboxStatus(
        pending=pending,
        oldest_pending_age_seconds=max((now - oldest).total_seconds(), 0.0) if oldest else None,
        undeliverable=UndeliverableEvent.objects.count(),
        dead_letters=open_dead_letters(),
        leader=cursor.leader if leader_alive else None,
        leader_since=cursor.leader_since if leader_alive else None,
        heartbeat_age_seconds=(now - cursor.heartbeat_at).total_seconds() if cursor.heartbeat_at else None,
        standbys=standbys,
        last_error=cursor.last_error,
        published=str(cursor.published),
        window=str(cursor.window) if cursor.window else None,
    )


def count_pending(cursor: RelayCursor, limit: int | None = None) -> tuple[int, datetime | None]:
    """Count the pending events (at most `limit`) and return when the oldest of them was created."""
    pending = OutboxEvent.objects.pending(cursor).order_by()
    found = pending[:limit].aggregate(count=Count("id"), oldest=Min("created_at"))
    return found["count"], found["oldest"]


def open_dead_letters() -> dict[str, int]:
    """Return the number of open dead letters of each consumer that has some."""
    counts = DeadLetter.objects.open().order_by("consumer").values_list("consumer").annotate(Count("id"))
    return dict(counts)


def _relays() -> tuple[bool, int]:
    """Whether a relay holds the lock, and how many others are connected."""
    with connection.cursor() as cursor:
        cursor.execute(
            """SELECT EXISTS (SELECT FROM pg_locks
                               WHERE locktype = 'advisory' AND granted AND objsubid = 1
                                 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                                 AND (classid::bigint << 32) + objid::bigint = %s),
                      (SELECT count(*) FROM pg_stat_activity
                        WHERE application_name = %s AND datname = current_database())""",
            [LOCK_KEY, APPLICATION_NAME],
        )
        leads, sessions = cursor.fetchone()
    return leads, sessions - 1 if leads else sessions


class StatusCollector(Collector):
    """The database's view as metrics, read at each scrape: true also while every relay is dead.

    Raises what the database raises, also when it takes longer than SCRAPE_SECONDS.
    """

    def collect(self) -> Iterator[GaugeMetricFamily]:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SELECT set_config('statement_timeout', %s, true)", [f"{SCRAPE_SECONDS}s"])
            yield from self._families()

    def _families(self) -> Iterator[GaugeMetricFamily]:
        pending, oldest = count_pending(RelayCursor.read(), COUNT_LIMIT)
        age_seconds = (datetime.now(UTC) - oldest).total_seconds() if oldest else 0.0
        yield GaugeMetricFamily(
            "outbox_pending_events", f"Committed events not published yet, at most {COUNT_LIMIT}", value=pending
        )
        yield GaugeMetricFamily(
            "outbox_oldest_pending_age_seconds", "Age of the oldest pending event", value=max(age_seconds, 0.0)
        )
        yield GaugeMetricFamily(
            "outbox_undeliverable_events",
            "Events parked because the broker refused them or one before",
            value=UndeliverableEvent.objects.count(),
        )
        family = GaugeMetricFamily("consumer_dead_letters", "Open dead letters", labels=["consumer"])
        for consumer, count in open_dead_letters().items():
            family.add_metric([consumer], count)
        yield family


def register_status_metrics() -> None:
    """Expose the database's view on every metrics endpoint of this process."""
    metrics.register_collector(StatusCollector())
