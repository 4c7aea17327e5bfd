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
from itertools import islice
from typing import Any

import psycopg
from psycopg.types.string import ByteaBinaryLoader

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

PAGE_MAX_BYTES = 16_000_000
"""Bytes of values in a page: what the relay holds in memory, whatever the batch size."""
# The topic as text, all else as the bytes that go to Kafka: see `read_bytes`.
PAGE_COLUMNS = ", ".join(
    ["e.id", "e.topic::text", "e.aggregate_id::varchar", "e.value", *(f"e.{name}::varchar" for name in HEADER_FIELDS)]
)
PAGE_SQL = f"""
    SELECT {PAGE_COLUMNS}
      FROM (SELECT *, sum(octet_length(value)) OVER (ORDER BY id) - octet_length(value) AS bytes_before
              FROM {_OUTBOX} WHERE id = ANY(%s)) e
     WHERE bytes_before < %s ORDER BY id
"""
# Half the cost, where the ids have no gap and no value is large.
RANGE_SQL = f"SELECT {PAGE_COLUMNS} FROM {_OUTBOX} e WHERE e.id BETWEEN %s AND %s ORDER BY e.id"
# Rows of more than some two kilobytes have their values out of line.
LARGE_VALUES_SQL = """
    SELECT coalesce(sum(pg_relation_size(reltoastrelid)), 0) > 0 FROM pg_class
     WHERE (oid = %(outbox)s::regclass OR oid IN (SELECT relid FROM pg_partition_tree(%(outbox)s::regclass)))
       AND reltoastrelid <> 0
"""


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
    """Return the rows of the first of these ids, ascending, until their values exceed PAGE_MAX_BYTES; at least one.

    A row is (id, topic, aggregate_id, value, then the HEADER_FIELDS), all but the first two as bytes. An id that is
    not there any more is left out.
    """
    return connection.execute(PAGE_SQL, [list(ids), PAGE_MAX_BYTES], binary=True).fetchall()


def read_pages(
    connection: psycopg.Connection[Any], lo: PgSnapshot, hi: PgSnapshot, after_id: int, page_rows: int
) -> Iterator[tuple[list[tuple[Any, ...]], bool]]:
    """Yield the rows of the window between `lo` and `hi`, ascending, in pages, each with whether it is the last one.

    See `read_page()`; a page is empty where all its rows are gone.
    """
    ids = (id_ for chunk in window_ids(connection, lo, hi, after_id) for id_ in chunk)
    wanted = list(islice(ids, page_rows))
    some_are_large = bool(wanted) and connection.execute(LARGE_VALUES_SQL, {"outbox": _OUTBOX}).fetchall()[0][0]
    while wanted:
        if some_are_large or wanted[-1] - wanted[0] >= len(wanted):
            page = read_page(connection, wanted)
            wanted = [id_ for id_ in wanted if page and id_ > page[-1][0]]
        else:
            page = connection.execute(RANGE_SQL, [wanted[0], wanted[-1]], binary=True).fetchall()
            wanted = []
        wanted += islice(ids, page_rows - len(wanted))
        yield page, not wanted


def read_bytes(connection: psycopg.Connection[Any]) -> None:
    """Have `varchar` come as bytes on this connection: decoding each field only to encode it again costs too much."""
    connection.adapters.register_loader("varchar", ByteaBinaryLoader)
