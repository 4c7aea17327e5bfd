"""Deleting what has served its time: published events, and processed marks.

In chunks by id, each a short transaction of its own that locks nothing but the rows it deletes. An event that is not
published, or that waits as undeliverable, is never deleted, however old; nor is a mark that is younger than what
Kafka may still have.
"""

import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg

from . import partitions
from .conf import outbox_settings
from .leader import SESSION_LOST

logger = logging.getLogger(__name__)

CHUNK_ROWS = 1000

_OUTBOX = "events_outbox_outboxevent"
_UNDELIVERABLE = "events_outbox_undeliverableevent"
_CURSOR = "events_outbox_relaycursor"

# One statement sees one moment: the cursor, what is parked, and the events agree.
_PRUNABLE = f"""
    p.created_at < %(cutoff)s
    AND EXISTS (SELECT FROM {_CURSOR} c, pg_control_system() s
                 WHERE pg_visible_in_snapshot(p.transaction_id, c.published)
                   AND {partitions.CURSOR_IS_OF_THIS_CLUSTER})
    AND NOT EXISTS (SELECT FROM {_UNDELIVERABLE} u WHERE u.event_id = p.id AND u.discarded_at IS NULL)
"""
_PRUNE_CHUNK_SQL = f"""
    WITH page AS MATERIALIZED (
             SELECT id, created_at, transaction_id FROM {{table}} WHERE id > %(after_id)s ORDER BY id LIMIT %(rows)s),
         old AS MATERIALIZED (SELECT id FROM page p WHERE {_PRUNABLE}),
         discarded AS (DELETE FROM {_UNDELIVERABLE} WHERE event_id IN (SELECT id FROM old)),
         gone AS (DELETE FROM {{table}} WHERE id IN (SELECT id FROM old) RETURNING id)
    SELECT (SELECT max(id) FROM page), (SELECT min(created_at) < %(cutoff)s FROM page), (SELECT count(*) FROM gone)
"""
_COUNT_SQL = f"SELECT count(*) FROM {_OUTBOX} p WHERE {_PRUNABLE}"
_PRUNE_MARKS_SQL = """
    WITH page AS MATERIALIZED (
             SELECT id, processed_at FROM events_outbox_processedevent
              WHERE id > %(after_id)s ORDER BY id LIMIT %(rows)s),
         gone AS (DELETE FROM events_outbox_processedevent p
                   WHERE id IN (SELECT id FROM page WHERE processed_at < %(cutoff)s)
                     -- An event that is handled when it comes again would be handled once more by a replay.
                     AND NOT EXISTS (SELECT FROM events_outbox_deadletter d
                                      WHERE d.consumer = p.consumer AND d.event_id = p.event_id AND d.resolution = '')
                  RETURNING id)
    SELECT (SELECT max(id) FROM page), (SELECT min(processed_at) < %(cutoff)s FROM page), (SELECT count(*) FROM gone)
"""


def count_prunable(session: psycopg.Connection[Any], older_than: timedelta) -> int:
    """Count the events that `prune_events()` would delete. Reads the whole table.

    Of a partitioned outbox whole partitions go, so that fewer may be deleted than are counted.
    """
    ((count,),) = session.execute(_COUNT_SQL, {"cutoff": datetime.now(UTC) - older_than}).fetchall()
    return int(count)


def prune_events(session: psycopg.Connection[Any], older_than: timedelta) -> Iterator[int]:
    """Delete published events older than that, and yield after each chunk how many it had. Starts at the oldest."""
    cutoff, table = datetime.now(UTC) - older_than, _OUTBOX
    if partitions.is_partitioned(session):
        yield from partitions.drop_old(session, cutoff)
        table = partitions.DEFAULT_PARTITION
    yield from _chunks(session, _PRUNE_CHUNK_SQL.format(table=table), cutoff)


def shortest_age_of_marks() -> timedelta:
    """Marks that are younger stay: Kafka may bring their events again."""
    return timedelta(days=outbox_settings().TOPIC_RETENTION_DAYS)


def count_old_marks(session: psycopg.Connection[Any], older_than: timedelta) -> int:
    """Count the processed marks that `prune_marks()` would delete. Reads the whole table."""
    cutoff = datetime.now(UTC) - max(older_than, shortest_age_of_marks())
    ((count,),) = session.execute(
        "SELECT count(*) FROM events_outbox_processedevent WHERE processed_at < %s", [cutoff]
    ).fetchall()
    return int(count)


def prune_marks(session: psycopg.Connection[Any], older_than: timedelta) -> Iterator[int]:
    """Delete processed marks older than that, and yield after each chunk how many it had.

    However short the age, those that are younger than TOPIC_RETENTION_DAYS stay: a check tells of such a setting, but
    a leader may run without checks.
    """
    yield from _chunks(session, _PRUNE_MARKS_SQL, datetime.now(UTC) - max(older_than, shortest_age_of_marks()))


def _chunks(session: psycopg.Connection[Any], prune_chunk: str, cutoff: datetime) -> Iterator[int]:
    after_id, some_are_old = 0, True
    while some_are_old:
        parameters = {"after_id": after_id, "rows": CHUNK_ROWS, "cutoff": cutoff}
        ((after_id, some_are_old, count),) = session.execute(prune_chunk, parameters).fetchall()
        yield count


def housekeeping(session: psycopg.Connection[Any]) -> Iterator[int]:
    """One round of what the settings ask for, in short steps; yields after each.

    A task that fails does not keep the others from their turn; the session's end is raised.
    """
    conf = outbox_settings()
    if conf.PARTITION_ROWS is not None and partitions.is_partitioned(session):
        yield from _tried("making partitions ahead", _make_ahead, session, conf.PARTITION_ROWS)
    if conf.PRUNE_AFTER_DAYS is not None:
        yield from _tried("pruning events", prune_events, session, timedelta(days=conf.PRUNE_AFTER_DAYS))
    if conf.PROCESSED_KEEP_DAYS is not None:
        yield from _tried("pruning marks", prune_marks, session, timedelta(days=conf.PROCESSED_KEEP_DAYS))


def _make_ahead(session: psycopg.Connection[Any], rows: int) -> Iterator[int]:
    yield partitions.make_ahead(session, rows)


def _tried(task: str, steps: Callable[..., Iterator[int]], *arguments: Any) -> Iterator[int]:
    try:
        yield from steps(*arguments)
    except SESSION_LOST:
        raise
    except psycopg.Error as error:
        # Of no matter for publishing: a missing right, say.
        logger.warning("housekeeping failed", extra={"task": task, "error": str(error).strip()})
