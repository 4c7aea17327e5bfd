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

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import psycopg
from psycopg import generators, pq
from psycopg.adapt import Transformer
from psycopg.types.string import ByteaBinaryLoader

from .fields import PgSnapshot
from .records import HEADER_FIELDS

_OUTBOX = "events_outbox_outboxevent"
ID_CHUNK = 5000

Row = tuple[Any, ...]
"""A row of a page: id, topic, aggregate_id, value, then the HEADER_FIELDS; all but the first two as bytes."""

# Ids of a window. `lo` comes in parts, as constants, so that the index on (transaction_id, id) serves both branches;
# with the snapshot functions in the condition, or with a LIMIT, the planner walks the primary key through every
# published row instead, and with OR between the branches it walks through this whole index.
WINDOW_IDS_SQL = f"""
    SELECT id FROM {_OUTBOX}
     WHERE transaction_id >= %(xmax)s::xid8
       AND pg_visible_in_snapshot(transaction_id, %(hi)s::pg_snapshot) AND id > %(after_id)s
     UNION ALL
    SELECT id FROM {_OUTBOX}
     WHERE transaction_id = ANY(%(xip)s::xid8[])
       AND pg_visible_in_snapshot(transaction_id, %(hi)s::pg_snapshot) AND id > %(after_id)s
     ORDER BY id
"""

PAGE_MAX_BYTES = 16_000_000
"""Bytes of values in a page: what the relay holds in memory, whatever the batch size."""
FEW_ROWS = 16
"""Rows that fit PAGE_MAX_BYTES whatever is in them: MAX_EVENT_BYTES is below a megabyte, and brokers take no more."""
# The topic as text, all else as the bytes that go to Kafka: see `read_bytes`.
PAGE_COLUMNS = ", ".join(
    ["e.id", "e.topic::text", "e.aggregate_id::varchar", "e.value", *(f"e.{name}::varchar" for name in HEADER_FIELDS)]
)
# The rows that a snapshot does not see, and the snapshot up to which: a statement sees what its own snapshot sees, no
# more and no less. Ids of transactions come as spans, for `transaction_id = x` would be sorted by id alone, and with
# a LIMIT the planner takes the primary key for that and walks through every published row; so, the index on
# (transaction_id, id) is looked into once for each span.
LOOK_SQL = f"""
    SELECT pg_current_snapshot()::text, {PAGE_COLUMNS}
      FROM (VALUES (1)) AS always
      LEFT JOIN (SELECT few.* FROM unnest($1::xid8[], $2::xid8[]) AS span (first, last)
                  CROSS JOIN LATERAL (SELECT * FROM {_OUTBOX}
                                       WHERE transaction_id BETWEEN span.first AND span.last
                                       ORDER BY transaction_id, id LIMIT $3) AS few
                  LIMIT $3) e ON true
     ORDER BY e.id
"""
_LAST_TRANSACTION_ID = 2**64 - 1

PAGE_SQL = f"""
    SELECT {PAGE_COLUMNS}
      FROM (SELECT *, sum(octet_length(value)) OVER (ORDER BY id) - octet_length(value) AS bytes_before
              FROM {_OUTBOX} WHERE id = ANY($1)) e
     WHERE bytes_before < $2 ORDER BY id
"""
# Half the cost, where the ids have no gap and no value is large.
RANGE_SQL = f"SELECT {PAGE_COLUMNS} FROM {_OUTBOX} e WHERE e.id BETWEEN $1 AND $2 ORDER BY e.id"
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


def open_window(connection: psycopg.Connection[Any], lo: PgSnapshot, page_rows: int) -> "Pages":
    """Take a snapshot now and return the pages of the window from `lo` up to it.

    Where the window has few rows, as it has unless the relay is behind, they come with the snapshot in one round trip.
    """
    few = min(FEW_ROWS, page_rows)
    in_progress = [str(xid) for xid in sorted(lo.xip)]
    spans = ([str(lo.xmax), *in_progress], [str(_LAST_TRANSACTION_ID), *in_progress])
    _send_query(connection, LOOK_SQL, [*(_array(xids) for xids in spans), str(few + 1)])
    found = _receive(connection)
    hi = PgSnapshot.parse(found[0][0])
    rows = [row[1:] for row in found if row[1] is not None]
    return Pages(connection, lo, hi, 0, page_rows, all_rows=rows if len(rows) <= few else None)


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
        is_last = False
        while not is_last:
            chunk = ids.fetchmany(ID_CHUNK)
            is_last = len(chunk) < ID_CHUNK
            if chunk:
                yield [row[0] for row in chunk]


class Pages:
    """The rows of the window between `lo` and `hi` with an id above `after_id`, ascending, page by page.

    `all_rows`: these rows, where they have been read already.
    While the caller is busy with a page, the server prepares the next one. `receive()` brings that in: call it before
    the connection is used for anything else, and before a long wait (an unread result keeps its locks).
    """

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        lo: PgSnapshot,
        hi: PgSnapshot,
        after_id: int,
        page_rows: int,
        all_rows: list[Row] | None = None,
    ) -> None:
        self.hi = hi
        self._all_rows = all_rows
        self._connection = connection
        self._ids = (id_ for chunk in window_ids(connection, lo, hi, after_id) for id_ in chunk)
        self._page_rows = page_rows
        self._wanted: list[int] = []
        self._some_are_large: bool | None = None  # not looked yet
        self._page: list[Row] | None = None
        self.is_under_way = False

    def read(self) -> tuple[list[Row], bool]:
        """Return the next page and whether it is the last one, and ask for the one after it.

        A page has `page_rows` rows, fewer at the end of the window, where rows are gone, and where their values
        exceed PAGE_MAX_BYTES.
        """
        if self._all_rows is not None:
            return self._all_rows, True
        if self._page is None and not self.is_under_way:
            self._ask_for_more()
        self.receive()
        page, self._page = self._page or [], None
        last_id = page[-1][0] if page else float("inf")
        self._wanted = [id_ for id_ in self._wanted if id_ > last_id]
        self._ask_for_more()
        return page, not self._wanted

    def _ask_for_more(self) -> None:
        self._wanted += islice(self._ids, self._page_rows - len(self._wanted))
        if not self._wanted:
            return
        if self._some_are_large is None and len(self._wanted) > FEW_ROWS:
            self._some_are_large = _some_are_large(self._connection)
        _send(self._connection, self._wanted, bool(self._some_are_large))
        self.is_under_way = True

    def receive(self) -> None:
        """Bring in the page that is under way, if any."""
        if self.is_under_way:
            self.is_under_way = False
            self._page = _receive(self._connection)


def read_page(connection: psycopg.Connection[Any], ids: Sequence[int]) -> list[Row]:
    """Return the rows of the first of these ids, ascending, until their values exceed PAGE_MAX_BYTES; at least one.

    An id that is not there any more is left out.
    """
    _send(connection, ids, some_are_large=True)
    return _receive(connection)


def _some_are_large(connection: psycopg.Connection[Any]) -> bool:
    return bool(connection.execute(LARGE_VALUES_SQL, {"outbox": _OUTBOX}).fetchall()[0][0])


def _send(connection: psycopg.Connection[Any], ids: Sequence[int], some_are_large: bool) -> None:
    """Ask for the rows of these ids without waiting for them."""
    if some_are_large or ids[-1] - ids[0] >= len(ids):
        _send_query(connection, PAGE_SQL, [_array(map(str, ids)), str(PAGE_MAX_BYTES)])
    else:
        _send_query(connection, RANGE_SQL, [str(ids[0]), str(ids[-1])])


def _send_query(connection: psycopg.Connection[Any], sql: str, parameters: Sequence[str]) -> None:
    connection.pgconn.send_query_params(
        sql.encode(), [parameter.encode() for parameter in parameters], result_format=pq.Format.BINARY
    )
    connection.wait(generators.send(connection.pgconn))


def _array(values: Iterable[str]) -> str:
    return "{" + ",".join(values) + "}"


def _receive(connection: psycopg.Connection[Any]) -> list[Row]:
    (result,) = connection.wait(generators.fetch_many(connection.pgconn))
    if result.status != pq.ExecStatus.TUPLES_OK:
        raise psycopg.errors.error_from_result(result)
    transformer = Transformer(connection)
    transformer.set_pgresult(result)
    return transformer.load_rows(0, result.ntuples, tuple)


def read_bytes(connection: psycopg.Connection[Any]) -> None:
    """Have `varchar` come as bytes on this connection: decoding each field only to encode it again costs too much."""
    connection.adapters.register_loader("varchar", ByteaBinaryLoader)
