"""The state of the outbox and its consumers, read from the database: for `outbox_status`, metrics and the admin."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from django.db import connection, transaction
from django.db.models import Count, Min
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from monitoring import metrics

from .handlers import consumers
from .leader import APPLICATION_NAME, LOCK_KEY
from .models import ConsumerPause, DeadLetter, OutboxEvent, RelayCursor, UndeliverableEvent
from .pauses import relay_pause

SCRAPE_SECONDS = 3
COUNT_LIMIT = 100_000
"""Counts stop here where speed matters more than the exact figure: metrics and the admin."""
QUERY_CHARACTERS = 200


@dataclass(frozen=True)
class OpenTransaction:
    """A transaction that has written to the outbox and has not ended: its own events, and no others, wait for it.

    `prepared` is its name when it was prepared for a two-phase commit: it has no session then, and waits for
    COMMIT PREPARED or ROLLBACK PREPARED. `query` is the last statement of its session, which may hold data. What
    PostgreSQL does not show to this user is None, and "<insufficient privilege>" for the query.
    """

    pid: int | None
    prepared: str | None
    application_name: str | None
    user: str | None
    client: str | None
    state: str | None
    age_seconds: float | None
    query: str | None


@dataclass(frozen=True)
class ConsumerState:
    """A registered consumer: its open dead letters, and since when, by whom and why it is paused (None: it is not)."""

    name: str
    group_id: str
    dead_letters: int
    paused_at: datetime | None
    paused_by: str
    pause_reason: str


@dataclass(frozen=True)
class ProcessedMarks:
    """The table of processed marks: `rows` is an estimate, `bytes` includes its indexes."""

    rows: int
    bytes: int


@dataclass(frozen=True)
class OutboxStatus:
    """The state at one moment.

    None: `oldest_pending_age_seconds` when nothing is pending; `leader`, `leader_host`, `leader_pid`, `leader_since`
    when no relay leads; `heartbeat_age_seconds` when none ever did; `oldest_open_transaction` when there is none;
    `relay_paused_at` when no operator has paused the relay. `undeliverable` counts the open ones. `lock_held_by` is the
    application name of whoever holds the leader's lock without being a relay, e.g. replay_outbox; empty otherwise.
    Where `cursor_is_of_this_cluster` is false, `pending` says nothing.
    """

    leader: str | None
    leader_host: str | None
    leader_pid: int | None
    leader_since: datetime | None
    lock_held_by: str
    heartbeat_age_seconds: float | None
    standbys: int
    pending: int
    oldest_pending_age_seconds: float | None
    events_per_second: float
    last_error: str
    relay_paused_at: datetime | None
    relay_paused_by: str
    relay_pause_reason: str
    open_transactions: int
    oldest_open_transaction: OpenTransaction | None
    undeliverable: int
    undeliverable_to_redrive: int
    undeliverable_discarded: int
    dead_letters: dict[str, int]
    consumers: list[ConsumerState]
    processed_marks: ProcessedMarks
    published: str
    window: str | None
    cursor_is_of_this_cluster: bool

    def trouble(self, older_than_seconds: float) -> str | None:
        """Say in a sentence why events are not on their way as they should be; None when they are.

        That is when the oldest pending event is older than that, or anything is pending and no relay leads. What an
        open transaction holds back is not pending: nobody knows yet whether it will ever be an event.
        """
        if not self.cursor_is_of_this_cluster:
            return "the cursor is that of another database cluster: what is pending shows when a relay leads here"
        if self.oldest_pending_age_seconds is not None and self.oldest_pending_age_seconds > older_than_seconds:
            age = f"{self.oldest_pending_age_seconds:.0f} s old, more than {older_than_seconds:.0f} s"
            return f"the oldest of {self.pending} pending events is {age}{self._why()}"
        if self.pending and self.leader is None:
            return f"{self.pending} events are pending and no relay leads"
        return None

    def _why(self) -> str:
        if self.relay_paused_at is not None:
            return f" (the relay is paused by {self.relay_paused_by}: {self.relay_pause_reason})"
        return f" (the relay says: {self.last_error})" if self.last_error else ""


def read_status(count_limit: int | None = None) -> OutboxStatus:
    """Read the state now. `count_limit`: stop counting there, of each kind; None counts them all."""
    cursor = RelayCursor.read()
    pending, oldest = count_pending(cursor, count_limit)
    holder, standbys = _relays()
    leads = holder == APPLICATION_NAME
    host, _, pid = cursor.leader.rpartition(":")
    transactions = open_transactions()
    undeliverable = UndeliverableEvent.objects.open()
    discarded = UndeliverableEvent.objects.filter(discarded_at__isnull=False)
    dead_letters = open_dead_letters(count_limit)
    pause = relay_pause()
    now = datetime.now(UTC)
    return OutboxStatus(
        leader=cursor.leader if leads else None,
        leader_host=host if leads else None,
        leader_pid=int(pid) if leads and pid.isdecimal() else None,
        leader_since=cursor.leader_since if leads else None,
        lock_held_by="" if leads else holder,
        heartbeat_age_seconds=max((now - cursor.heartbeat_at).total_seconds(), 0.0) if cursor.heartbeat_at else None,
        standbys=standbys,
        pending=pending,
        oldest_pending_age_seconds=max((now - oldest).total_seconds(), 0.0) if oldest else None,
        events_per_second=cursor.events_per_second if leads else 0.0,
        last_error=cursor.last_error,
        relay_paused_at=pause.paused_at if pause else None,
        relay_paused_by=pause.paused_by if pause else "",
        relay_pause_reason=pause.reason if pause else "",
        open_transactions=len(transactions),
        oldest_open_transaction=transactions[0] if transactions else None,
        undeliverable=undeliverable[:count_limit].count(),
        undeliverable_to_redrive=undeliverable.filter(redrive_requested_at__isnull=False)[:count_limit].count(),
        undeliverable_discarded=discarded[:count_limit].count(),
        dead_letters=dead_letters,
        consumers=consumer_states(dead_letters),
        processed_marks=processed_marks(),
        published=str(cursor.published),
        window=str(cursor.window) if cursor.window else None,
        cursor_is_of_this_cluster=cursor.is_of_this_cluster(),
    )


def consumer_states(dead_letters: dict[str, int]) -> list[ConsumerState]:
    """Return the state of every registered consumer, by name."""
    pauses = {pause.consumer: pause for pause in ConsumerPause.objects.all()}
    return [
        ConsumerState(
            name=consumer.name,
            group_id=consumer.group_id,
            dead_letters=dead_letters.get(consumer.name, 0),
            paused_at=pause.paused_at if pause else None,
            paused_by=pause.paused_by if pause else "",
            pause_reason=pause.reason if pause else "",
        )
        for consumer in consumers()
        for pause in [pauses.get(consumer.name)]
    ]


# As PostgreSQL plans: rows a page when it was last vacuumed, times the pages of now. Where it was never, or was empty
# then, the running statistics. Counting would read a table that may have many millions of rows.
_PROCESSED_MARKS_SQL = """
    SELECT CASE WHEN reltuples > 0 AND relpages > 0
                THEN reltuples / relpages * (pg_relation_size(oid) / current_setting('block_size')::bigint)
                ELSE coalesce(pg_stat_get_live_tuples(oid), 0) END::bigint,
           pg_total_relation_size(oid)
      FROM pg_class WHERE oid = 'events_outbox_processedevent'::regclass
"""


def processed_marks() -> ProcessedMarks:
    """Estimate how many processed marks there are, and tell the space they take."""
    with connection.cursor() as cursor:
        cursor.execute(_PROCESSED_MARKS_SQL)
        return ProcessedMarks(*cursor.fetchone())


def count_pending(cursor: RelayCursor, limit: int | None = None) -> tuple[int, datetime | None]:
    """Count the pending events (at most `limit`) and return when the oldest of them was created."""
    pending = OutboxEvent.objects.pending(cursor).order_by()
    found = pending[:limit].aggregate(count=Count("id"), oldest=Min("created_at"))
    return found["count"], found["oldest"]


def open_dead_letters(limit: int | None = None) -> dict[str, int]:
    """Return the number of open dead letters of each consumer that has some.

    With a limit, of the registered consumers alone: of each at most so many are counted.
    """
    if limit is not None:
        letters = DeadLetter.objects.open().order_by()
        found = {consumer.name: letters.filter(consumer=consumer.name)[:limit].count() for consumer in consumers()}
        return {name: count for name, count in found.items() if count}
    counts = DeadLetter.objects.open().order_by("consumer").values_list("consumer").annotate(Count("id"))
    return dict(counts)


# Whoever inserts holds this lock, on a partitioned table too, until the transaction ends. So does the relay for a
# moment when it prunes.
_OPEN_TRANSACTIONS_SQL = """
    SELECT w.pid, p.gid, a.application_name, coalesce(a.usename, p.owner), a.client_addr::text, a.state,
           extract(epoch FROM clock_timestamp() - coalesce(a.xact_start, p.prepared))::float8, left(a.query, %s)
      FROM (SELECT DISTINCT l.pid, l.virtualtransaction FROM pg_locks l
             WHERE l.locktype = 'relation' AND l.mode = 'RowExclusiveLock' AND l.granted
               AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
               AND l.relation = 'events_outbox_outboxevent'::regclass) w
      LEFT JOIN pg_stat_activity a ON a.pid = w.pid
      -- A prepared transaction has no process; it is found by the lock on its own transaction id.
      LEFT JOIN pg_prepared_xacts p ON w.pid IS NULL AND p.transaction IN (
            SELECT x.transactionid FROM pg_locks x
             WHERE x.locktype = 'transactionid' AND x.pid IS NULL AND x.virtualtransaction = w.virtualtransaction)
     WHERE w.pid IS DISTINCT FROM pg_backend_pid() AND a.application_name IS DISTINCT FROM %s
     ORDER BY coalesce(a.xact_start, p.prepared) NULLS LAST
"""


def open_transactions() -> list[OpenTransaction]:
    """Return the transactions that have written to the outbox and have not ended, the oldest first."""
    with connection.cursor() as cursor:
        cursor.execute(_OPEN_TRANSACTIONS_SQL, [QUERY_CHARACTERS, APPLICATION_NAME])
        return [OpenTransaction(*row) for row in cursor.fetchall()]


def _relays() -> tuple[str, int]:
    """The application name of who holds the leader's lock (empty: nobody), and how many relays stand by."""
    with connection.cursor() as cursor:
        cursor.execute(
            """WITH holder AS (
                   SELECT pid FROM pg_locks
                    WHERE locktype = 'advisory' AND granted AND objsubid = 1
                      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                      AND (classid::bigint << 32) + objid::bigint = %s)
               SELECT (SELECT application_name FROM pg_stat_activity JOIN holder USING (pid)),
                      (SELECT count(*) FROM pg_stat_activity
                        WHERE application_name = %s AND datname = current_database()
                          AND pid NOT IN (SELECT pid FROM holder))""",
            [LOCK_KEY, APPLICATION_NAME],
        )
        holder, standbys = cursor.fetchone()
    return holder or "", standbys


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
        transaction_age_seconds = max((writer.age_seconds or 0.0 for writer in open_transactions()), default=0.0)
        yield metrics.OUTBOX_PENDING(value=pending)
        yield metrics.OUTBOX_OLDEST_PENDING_AGE(value=max(age_seconds, 0.0))
        yield metrics.OUTBOX_OLDEST_OPEN_TRANSACTION_AGE(value=transaction_age_seconds)
        yield metrics.OUTBOX_UNDELIVERABLE(value=UndeliverableEvent.objects.open().count())
        # 0 where there are none; and those of a consumer that is gone.
        counts = {consumer.name: 0 for consumer in consumers()} | open_dead_letters()
        dead_letters = metrics.CONSUMER_DEAD_LETTERS()
        for name, count in counts.items():
            dead_letters.add_metric([name], count)
        yield dead_letters
        paused, pauses = metrics.CONSUMER_PAUSED(), set(ConsumerPause.objects.values_list("consumer", flat=True))
        for name in (consumer.name for consumer in consumers()):
            paused.add_metric([name], name in pauses)
        yield paused
        yield metrics.OUTBOX_RELAY_PAUSED(value=relay_pause() is not None)
        marks = processed_marks()
        yield metrics.PROCESSED_EVENTS_ROWS(value=marks.rows)
        yield metrics.PROCESSED_EVENTS_BYTES(value=marks.bytes)


def register_status_metrics() -> None:
    """Expose the database's view on every metrics endpoint of this process."""
    metrics.register_collector(StatusCollector())


def readable_seconds(seconds: float) -> str:
    """A duration for people, to two units: "0.4 s", "3 min 12 s", "2 d 4 h"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    parts: list[str] = []
    rest = round(seconds)
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count or parts:
            parts.append(f"{count} {unit}")
    return " ".join(part for part in parts[:2] if not part.startswith("0 "))
