"""What waits to be sent by e-mail and webhooks, for the console and as metrics."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from django.db import connection, transaction
from django.db.models import Count, Min, Q
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector

from monitoring import metrics

from .models import Channel, Delivery

COUNT_LIMIT = 10_000
SCRAPE_SECONDS = 2
"""How long a scrape waits for the database."""


@dataclass(frozen=True)
class Backlog:
    """`failing`: those of the `pending` that could not be sent before. Both are counted to COUNT_LIMIT.

    `overdue_seconds`: how long the one has been due that nobody has taken for longest; 0 when none is due.
    """

    channel: Channel
    pending: int
    failing: int
    overdue_seconds: float


def read_backlog() -> list[Backlog]:
    """Return what waits by each channel, read along the index of what is due."""
    return [_backlog(channel) for channel in (Channel.EMAIL, Channel.WEBHOOK)]


def _backlog(channel: Channel) -> Backlog:
    pending = Delivery.objects.filter(state=Delivery.State.PENDING, channel=channel)
    first = pending.order_by("next_attempt_at", "attempts", "id")[:COUNT_LIMIT]
    found = first.aggregate(
        pending=Count("id"), failing=Count("id", filter=Q(attempts__gt=0)), due_at=Min("next_attempt_at")
    )
    overdue = (datetime.now(UTC) - found["due_at"]).total_seconds() if found["due_at"] else 0.0
    return Backlog(channel, found["pending"], found["failing"], max(overdue, 0.0))


class BacklogCollector(Collector):
    """What waits, as metrics: true also while nobody sends.

    Raises what the database raises, also when it takes longer than SCRAPE_SECONDS.
    """

    def collect(self) -> Iterator[GaugeMetricFamily]:
        pending, failing, overdue = (
            family()
            for family in (metrics.DELIVERIES_PENDING, metrics.DELIVERIES_FAILING, metrics.DELIVERIES_OVERDUE_SECONDS)
        )
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SELECT set_config('statement_timeout', %s, true)", [f"{SCRAPE_SECONDS}s"])
            for backlog in read_backlog():
                pending.add_metric([backlog.channel], backlog.pending)
                failing.add_metric([backlog.channel], backlog.failing)
                overdue.add_metric([backlog.channel], backlog.overdue_seconds)
        yield from (pending, failing, overdue)
