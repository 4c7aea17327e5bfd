"""What the database knows for the overview: read within a time that holds for all of it together."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, TypeVar

from django.db import InterfaceError, OperationalError, connection, transaction
from django.db.models import Min

from events_outbox.models import DeadLetter, OutboxEvent, RelayCursor, UndeliverableEvent, Worker
from events_outbox.status import COUNT_LIMIT, OutboxStatus, read_status
from voicehelper.notifications.backlog import Backlog, read_backlog

from .figures import STEP_SECONDS, Chart, Line

logger = logging.getLogger(__name__)

DATABASE_SECONDS = 1.8
"""For all statements together."""
LATEST_LETTERS = 200
"""Among so many of the latest dead letters a consumer's last error is looked for."""
MINUTES = 60

Found = TypeVar("Found")


@dataclass(frozen=True)
class LastError:
    """What went wrong last: since when, and the dead letter it left, if it did."""

    text: str
    at: datetime
    letter_id: int | None = None


@dataclass(frozen=True)
class TenantRows:
    """What of one tenant is stuck, each counted to COUNT_LIMIT. `oldest_pending_at`: None when nothing is pending."""

    pending: int
    undeliverable: int
    dead_letters: int
    oldest_pending_at: datetime | None = None


@dataclass
class Database:
    """None: not read. `missing`: what could not be read in time, in words."""

    status: OutboxStatus | None = None
    workers: list[Worker] | None = None
    letter_errors: dict[str, LastError] | None = None
    deliveries: list[Backlog] | None = None
    emitted: Chart = field(default_factory=Chart)
    tenant: TenantRows | None = None
    missing: list[str] = field(default_factory=list)


def read_all() -> Database:
    """Everything over all tenants."""
    found = Database()
    within = Budget(DATABASE_SECONDS, found.missing)
    found.status = within.read("the state of the outbox", lambda: read_status(COUNT_LIMIT))
    found.workers = within.read("relays and consumers", lambda: list(Worker.objects.with_life()))
    found.letter_errors = within.read("the last dead letters", last_letter_errors)
    found.deliveries = within.read("deliveries", read_backlog)
    emitted = within.read("events emitted a minute", emitted_per_minute)
    found.emitted = emitted or Chart(missing="not read in time")
    return found


def read_tenant(tenant: str) -> Database:
    """What concerns one tenant alone."""
    found = Database()
    within = Budget(DATABASE_SECONDS, found.missing)
    found.tenant = within.read("what is stuck", lambda: tenant_rows(tenant))
    return found


class Budget:
    """Seconds for several reads. One that fails, or takes too long, is noted, and the others go on."""

    def __init__(self, seconds: float, missing: list[str]) -> None:
        self._ends_at = time.monotonic() + seconds
        self._missing = missing

    def read(self, what: str, reader: Callable[[], Found]) -> Found | None:
        try:
            self._left_ms()
            with transaction.atomic(), self._bounded():
                return reader()
        except (OperationalError, InterfaceError) as error:
            logger.warning("the overview misses figures", extra={"what": what, "error": str(error).strip()})
            self._missing.append(what)
            return None

    @contextmanager
    def _bounded(self) -> Iterator[None]:
        """Give each statement the time that is left. On the driver's session: not a query of the page."""

        def within_time(
            execute: Callable[..., Any], sql: Any, parameters: Any, many: bool, context: dict[str, Any]
        ) -> Any:
            with connection.wrap_database_errors:
                limit = [str(self._left_ms())]
                connection.connection.execute("SELECT set_config('statement_timeout', %s, true)", limit)
            return execute(sql, parameters, many, context)

        with connection.execute_wrapper(within_time):
            yield

    def _left_ms(self) -> int:
        left = int((self._ends_at - time.monotonic()) * 1000)
        if left <= 0:
            raise OperationalError("no time is left")
        return left


def last_letter_errors() -> dict[str, LastError]:
    """The latest dead letter's error of each consumer, among the latest of all."""
    latest = DeadLetter.objects.order_by("-id").values_list("consumer", "error", "failed_at", "id")
    errors: dict[str, LastError] = {}
    for consumer, error, failed_at, letter_id in latest[:LATEST_LETTERS]:
        errors.setdefault(consumer, LastError(error, failed_at, letter_id))
    return errors


def tenant_rows(tenant: str) -> TenantRows:
    pending = OutboxEvent.objects.pending(RelayCursor.read()).filter(tenant_id=tenant)
    undeliverable = UndeliverableEvent.objects.open().filter(event__tenant_id=tenant)
    letters = DeadLetter.objects.open().filter(tenant_id=tenant)
    oldest = pending.order_by()[:COUNT_LIMIT].aggregate(at=Min("created_at"))["at"]
    stuck, failed, waiting = (rows.order_by()[:COUNT_LIMIT].count() for rows in (undeliverable, letters, pending))
    return TenantRows(waiting, stuck, failed, oldest)


# For each minute the first id from then on, found by bisecting the primary key: some 25 index look-ups a minute,
# however large the table is. `created_at` has no index, and follows the ids closely enough for a chart.
_FIRST_IDS_SQL = """
    WITH RECURSIVE search(moment, low, high) AS (
        SELECT moment, ends.low, ends.high
          FROM unnest(%s::timestamptz[]) moment,
               (SELECT coalesce(min(id), 1) AS low, coalesce(max(id), 0) + 1 AS high
                  FROM events_outbox_outboxevent) ends
        UNION ALL
        SELECT s.moment,
               CASE WHEN found.created_at < s.moment THEN found.id + 1 ELSE s.low END,
               CASE WHEN found.created_at < s.moment THEN s.high ELSE (s.low + s.high) / 2 END
          FROM search s
          LEFT JOIN LATERAL (SELECT id, created_at FROM events_outbox_outboxevent
                              WHERE id >= (s.low + s.high) / 2 ORDER BY id LIMIT 1) found ON true
         WHERE s.low < s.high
    )
    SELECT moment, low FROM search WHERE low >= high
"""


def emitted_per_minute() -> Chart:
    """How many ids were given to events in each of the last minutes: a little more than were committed."""
    now = datetime.now(UTC).replace(second=0, microsecond=0)
    moments = [now - timedelta(seconds=STEP_SECONDS * back) for back in range(MINUTES, -1, -1)]
    with connection.cursor() as cursor:
        cursor.execute(_FIRST_IDS_SQL, [moments])
        first = dict(cursor.fetchall())
    counts: list[float | None] = [float(max(first[end] - first[start], 0)) for start, end in pairwise(moments)]
    return Chart([moment.timestamp() for moment in moments[1:]], [Line("Emitted per minute", counts)])
