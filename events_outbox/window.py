"""Reading committed events in order, each once: the snapshot cursor, and nothing else.

A *window* is the set of rows that one snapshot (`hi`) sees and an earlier one (`lo`) does not, read in id order.
Since both are snapshots that PostgreSQL really took, every committed row falls into exactly one window, whatever
the order of ids, transaction ids and commits. What looks simpler goes wrong:

- `id > last id` misses rows: ids are handed out before the commit.
- `transaction_id < pg_snapshot_xmin(now)`, in the order of transaction ids, stalls behind the longest transaction
  and breaks the order of an aggregate: a transaction can get its id early and then wait for the row lock.
- `transaction_id >= xmax(lo) and id > last id` loses rows: `nextval` runs before the transaction id is assigned.
- Cutting at a transaction id ("everything below X") is no moment in time, so order breaks.

Within a window id order is the order of commits of one aggregate, as long as each transaction emits after it took
the lock on the aggregate: the next holder of that lock draws its ids later.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import psycopg

from .fields import PgSnapshot
from .records import HEADER_FIELDS

_OUTBOX = "events_outbox_outboxevent"
ID_CHUNK = 5000

# Ids of a window. `lo` comes in parts, as constants, so that the index on (transaction_id, id) can serve both
# branches; with the snapshot functions in the condition, or with a LIMIT, the planner walks the primary key through
# every published row instead.
WINDOW_IDS_SQL = f"""
    SELECT id FROM {_OUTBOX}
     WHERE (transaction_id >= %(xmax)s::xid8 OR transaction_id = ANY(%(xip)s::xid8[]))
       AND pg_visible_in_snapshot(transaction_id, %(hi)s::pg_snapshot)
       AND id > %(after_id)s
     ORDER BY id
"""

PAGE_COLUMNS = ", ".join(f"e.{column}" for column in ("id", "topic", "aggregate_id", "value", *HEADER_FIELDS))
PAGE_SQL = f"SELECT {PAGE_COLUMNS} FROM {_OUTBOX} e WHERE e.id = ANY(%s) ORDER BY e.id"


def take_snapshot(connection: psycopg.Connection[Any]) -> PgSnapshot:
    """Take a snapshot now: what it sees is committed and stays visible to every later statement."""
    (text,) = connection.execute("SELECT pg_current_snapshot()::text").fetchall()[0]
    return PgSnapshot.parse(text)


def window_ids(
    connection: psycopg.Connection[Any], lo: PgSnapshot, hi: PgSnapshot, after_id: int = 0
) -> Iterator[list[int]]:
    """Yield the ids of the window between `lo` and `hi`, ascending, in chunks of at most ID_CHUNK.

    The result is kept by the server (a cursor WITH HOLD), so a backlog of millions costs the relay no memory and
    holds no transaction open. `connection` must be in autocommit mode.
    """
    with connection.cursor("outbox_window", withhold=True) as ids:
        ids.execute(
            WINDOW_IDS_SQL,
            {
                "xmax": str(lo.xmax),
                "xip": [str(xid) for xid in sorted(lo.xip)],
                "hi": str(hi),
                "after_id": after_id,
            },
        )
        while chunk := ids.fetchmany(ID_CHUNK):
            yield [row[0] for row in chunk]


def read_page(connection: psycopg.Connection[Any], ids: Sequence[int]) -> list[tuple[Any, ...]]:
    """Return the rows of these ids, ascending: id, topic, aggregate_id, value, and the HEADER_FIELDS."""
    return connection.execute(PAGE_SQL, [list(ids)]).fetchall()
