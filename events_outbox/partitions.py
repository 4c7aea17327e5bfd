"""The outbox as a table partitioned by id range, for installations whose old events are dropped rather than deleted.

Chosen by EVENTS_OUTBOX["PARTITION_ROWS"] before the first `migrate`. The leader makes partitions ahead and drops
old ones whole. Should it not come to that in time, rows fall into the default partition: an insert never fails
because a partition is missing.

Differences to the plain table: `event_id` is unique within a partition only (PostgreSQL wants the partition key in
every unique constraint), and rows of the default partition are deleted one by one.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg

from .fields import PgSnapshot

logger = logging.getLogger(__name__)

OUTBOX = "events_outbox_outboxevent"
SEQUENCE = f"{OUTBOX}_id_seq"
UNDELIVERABLE = "events_outbox_undeliverableevent"
CURSOR = "events_outbox_relaycursor"
DEFAULT_PARTITION = f"{OUTBOX}_default"
# A cursor of another cluster (a restore, and no relay has led since) says nothing about the transactions of this one;
# nor does one that points into the future.
CURSOR_IS_OF_THIS_CLUSTER = """
    coalesce(c.system_identifier, s.system_identifier) = s.system_identifier
    AND pg_snapshot_xmax(c.published) <= pg_snapshot_xmax(pg_current_snapshot())
"""
PARTITIONS_AHEAD = 2
LOCK_TIMEOUT_MS = 200
"""How long making or dropping a partition may wait for its locks, and so hold up inserts behind it."""
ATTACH_TIMEOUT_MS = 1000
"""How long it may then take to attach a partition, and hold up inserts."""

# Of a table that only grows, and is pruned in chunks: the defaults would wait for a fifth of it to change.
AUTOVACUUM = (
    "autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_insert_scale_factor = 0.02, "
    "autovacuum_analyze_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 1"
)


@dataclass(frozen=True)
class Partition:
    """A partition with the ids from `start` to below `end`."""

    name: str
    start: int
    end: int


def partition_new_table(execute: Any, rows: int, *, start: int = 1) -> None:
    """Replace the outbox, which must be empty, by a partitioned table. `execute(sql)` runs in the migration.

    The first partitions begin at id `start`.
    """
    # LIKE copies columns and defaults. No identity column: PostgreSQL has them in partitioned tables only since 17.
    execute(f"CREATE TABLE outbox_partitioned (LIKE {OUTBOX} INCLUDING DEFAULTS) PARTITION BY RANGE (id)")
    execute(f"DROP TABLE {OUTBOX} CASCADE")
    execute(f"ALTER TABLE outbox_partitioned RENAME TO {OUTBOX}")
    execute(f"CREATE SEQUENCE {SEQUENCE} OWNED BY {OUTBOX}.id")
    execute(f"ALTER TABLE {OUTBOX} ALTER COLUMN id SET DEFAULT nextval('{SEQUENCE}')")
    execute(f"ALTER TABLE {OUTBOX} ADD PRIMARY KEY (id)")
    execute(f"CREATE INDEX outbox_window ON {OUTBOX} (transaction_id, id)")
    execute(f"CREATE INDEX outbox_aggregate ON {OUTBOX} (aggregate_id)")
    execute(f"CREATE INDEX outbox_correlation ON {OUTBOX} (correlation_id)")
    execute(
        f"""ALTER TABLE {UNDELIVERABLE} ADD CONSTRAINT undeliverable_event_fk FOREIGN KEY (event_id)
            REFERENCES {OUTBOX} (id) DEFERRABLE INITIALLY DEFERRED"""
    )
    execute(f"CREATE TABLE {DEFAULT_PARTITION} PARTITION OF {OUTBOX} (UNIQUE (event_id)) DEFAULT WITH ({AUTOVACUUM})")
    for first in range(start, start + PARTITIONS_AHEAD * rows, rows):
        for statement in _make(first, rows):
            execute(statement)


def is_partitioned(session: psycopg.Connection[Any]) -> bool:
    """Whether the outbox of this database is a partitioned table."""
    row = session.execute("SELECT relkind = 'p' FROM pg_class WHERE oid = %s::regclass", [OUTBOX]).fetchone()
    return bool(row and row[0])


def partitions(session: psycopg.Connection[Any]) -> list[Partition]:
    """Return the partitions by id range, without the default one."""
    found = []
    for name, bound in session.execute(
        """SELECT c.relname, pg_get_expr(c.relpartbound, c.oid) FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
            WHERE i.inhparent = %s::regclass""",
        [OUTBOX],
    ):
        if match := re.fullmatch(r"FOR VALUES FROM \('(\d+)'\) TO \('(\d+)'\)", bound):
            found.append(Partition(name, int(match[1]), int(match[2])))
    return sorted(found, key=lambda partition: partition.start)


def make_ahead(session: psycopg.Connection[Any], rows: int) -> int:
    """Make partitions until PARTITIONS_AHEAD of them wait for ids to come. Return how many were made.

    Gives up quietly where a lock is not to be had at once; the next call tries again.
    """
    made = 0
    ((next_id,),) = session.execute(f"SELECT last_value + 1 FROM {SEQUENCE}").fetchall()
    end = max((partition.end for partition in partitions(session)), default=1)
    if end <= next_id:
        # Ids go to the default partition by now, and the new one must not claim any of those.
        end = next_id + rows
    with _short_locks(session, "partition not made, will try again"):
        while end < next_id + PARTITIONS_AHEAD * rows:
            with session.transaction():
                # An insert that is running would send its row to the default partition, and fail, because that one
                # must not have it any more: so none may be running.
                session.execute(f"LOCK TABLE ONLY {OUTBOX} IN SHARE ROW EXCLUSIVE MODE")
                # The server goes through the whole default partition, which is small where partitions are made in time.
                session.execute(f"SET LOCAL statement_timeout = {ATTACH_TIMEOUT_MS}")
                for statement in _make(end, rows):
                    session.execute(statement)
            end += rows
            made += 1
    return made


def drop_old(session: psycopg.Connection[Any], cutoff: datetime) -> Iterator[int]:
    """Drop the partitions all of whose events are published and older than `cutoff`. Yield how many events of each.

    One with an open undeliverable event stays, and one for which a lock is not to be had at once.
    """
    ((next_id,),) = session.execute(f"SELECT last_value + 1 FROM {SEQUENCE}").fetchall()
    for partition in partitions(session):
        if partition.end > next_id:
            break
        try:
            yield _drop_if_old(session, partition, cutoff)
        except psycopg.errors.UndefinedTable:
            continue  # dropped by somebody else meanwhile


def _drop_if_old(session: psycopg.Connection[Any], partition: Partition, cutoff: datetime) -> int:
    # In this order: counting goes through all of it.
    if not _is_published(session, partition) or (count := _count_if_old(session, partition, cutoff)) is None:
        return 0
    with _short_locks(session, "partition not dropped, will try again"), session.transaction():
        session.execute(f"LOCK TABLE ONLY {OUTBOX} IN ACCESS EXCLUSIVE MODE")
        # What was written to it before the lock and is not published shows now.
        if not _is_published(session, partition):
            return 0
        session.execute(
            f"DELETE FROM {UNDELIVERABLE} WHERE event_id >= %s AND event_id < %s", [partition.start, partition.end]
        )
        session.execute(f"ALTER TABLE {OUTBOX} DETACH PARTITION {partition.name}")
        session.execute(f"DROP TABLE {partition.name}")
        logger.info("outbox partition dropped", extra={"partition": partition.name})
        return count
    return 0


def _count_if_old(session: psycopg.Connection[Any], partition: Partition, cutoff: datetime) -> int | None:
    """The number of events if all are older than `cutoff`. Looks at the newest first, which mostly settles it."""
    newest = session.execute(f"SELECT created_at FROM {partition.name} ORDER BY id DESC LIMIT 1").fetchone()
    if newest and newest[0] >= cutoff:
        return None
    ((count, all_are_old),) = session.execute(
        f"SELECT count(*), coalesce(max(created_at) < %s, true) FROM {partition.name}", [cutoff]
    ).fetchall()
    return int(count) if all_are_old else None


def _is_published(session: psycopg.Connection[Any], partition: Partition) -> bool:
    """No event that the cursor's snapshot does not see, and none that waits for a redrive. Both by index."""
    row = session.execute(
        f"SELECT c.published::text FROM {CURSOR} c, pg_control_system() s WHERE {CURSOR_IS_OF_THIS_CLUSTER}"
    ).fetchone()
    if row is None:
        return False
    published = PgSnapshot.parse(row[0])
    ((some_wait,),) = session.execute(
        f"""SELECT EXISTS (SELECT FROM {partition.name}
                            WHERE transaction_id >= %s::xid8 OR transaction_id = ANY(%s::xid8[]))
                OR EXISTS (SELECT FROM {UNDELIVERABLE}
                            WHERE event_id >= %s AND event_id < %s AND discarded_at IS NULL)""",
        [str(published.xmax), [str(xid) for xid in published.xip], partition.start, partition.end],
    ).fetchall()
    return not some_wait


def _make(start: int, rows: int) -> Iterator[str]:
    """Statements that make a partition. Attached, not created in place: that would lock the whole outbox."""
    name = f"{OUTBOX}_p{start}"
    yield f"CREATE TABLE {name} (LIKE {OUTBOX} INCLUDING DEFAULTS, UNIQUE (event_id)) WITH ({AUTOVACUUM})"
    yield f"ALTER TABLE {OUTBOX} ATTACH PARTITION {name} FOR VALUES FROM ({start}) TO ({start + rows})"


@contextmanager
def _short_locks(session: psycopg.Connection[Any], otherwise: str) -> Iterator[None]:
    session.execute("SELECT set_config('lock_timeout', %s, false)", [f"{LOCK_TIMEOUT_MS}ms"])
    try:
        yield
    except psycopg.errors.QueryCanceled as error:
        logger.warning(
            "partition not attached: the default partition takes too long to go through, attach one in a quiet hour",
            extra={"error": str(error).strip()},
        )
    except (psycopg.errors.LockNotAvailable, psycopg.errors.CheckViolation) as error:
        logger.info(otherwise, extra={"error": str(error).strip()})
    finally:
        session.execute("SELECT set_config('lock_timeout', '0', false)")
