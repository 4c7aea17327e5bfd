"""The snapshot cursor under concurrency: nothing missed, nothing made up, order kept; and wrong readers are caught."""

import contextlib
import random
import secrets
import time

import psycopg
import pytest
from django.db import connection, transaction

from events_outbox import window
from events_outbox.fields import NOTHING_SEEN, PgSnapshot
from events_outbox.leader import open_session
from events_outbox.models import OutboxEvent
from events_outbox.window import Pages, open_window, read_bytes, take_snapshot, window_ids
from tests.outbox_writers import Ledger, Violations, emit, judge, writers

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("aggregates")]


class SnapshotReader:
    """Windows between two snapshots that were really taken."""

    def __init__(self):
        self.lo = NOTHING_SEEN

    def read(self, session):
        hi = take_snapshot(session)
        ids = [id_ for chunk in window_ids(session, self.lo, hi) for id_ in chunk]
        self.lo = hi
        return ids


class WindowReader:
    """The relay's way as it is: few rows come with the snapshot, more of them page by page."""

    def __init__(self):
        self.lo = NOTHING_SEEN

    def read(self, session):
        pages = open_window(session, self.lo, page_rows=random.randint(1, 4))
        ids = [row[0] for page in _read(pages) for row in page]
        self.lo = pages.hi
        return ids


class LastIdReader:
    """Mutant: everything above the last id."""

    def __init__(self):
        self.last_id = 0

    def read(self, session):
        rows = session.execute(
            "SELECT id FROM events_outbox_outboxevent WHERE id > %s ORDER BY id", [self.last_id]
        ).fetchall()
        self.last_id = rows[-1][0] if rows else self.last_id
        return [row[0] for row in rows]


class XminReader:
    """Mutant: transactions below the oldest running one, in the order of transaction ids."""

    def __init__(self):
        self.last = (0, 0)

    def read(self, session):
        rows = session.execute(
            """SELECT transaction_id::text::bigint, id FROM events_outbox_outboxevent
                WHERE (transaction_id, id) > (%s::text::xid8, %s)
                  AND transaction_id < pg_snapshot_xmin(pg_current_snapshot())
                ORDER BY transaction_id, id""",
            self.last,
        ).fetchall()
        self.last = rows[-1] if rows else self.last
        return [id_ for _, id_ in rows]


class AboveMaxIdReader:
    """Mutant: as the snapshot reader, but new transactions' rows only above the highest id read."""

    def __init__(self):
        self.lo = NOTHING_SEEN
        self.max_id = 0

    def read(self, session):
        hi = take_snapshot(session)
        rows = session.execute(
            """SELECT id FROM events_outbox_outboxevent
                WHERE ((transaction_id >= %s::text::xid8 AND id > %s) OR transaction_id = ANY(%s::text[]::xid8[]))
                  AND pg_visible_in_snapshot(transaction_id, %s::pg_snapshot) ORDER BY id""",
            [str(self.lo.xmax), self.max_id, [str(xid) for xid in self.lo.xip], str(hi)],
        ).fetchall()
        self.lo = hi
        self.max_id = max([self.max_id, *(row[0] for row in rows)])
        return [row[0] for row in rows]


class MadeUpCutReader:
    """Mutant: windows between transaction ids ("everything below X", once all of them are over), in id order."""

    def __init__(self):
        self.low = 0
        self.high = None

    def read(self, session):
        now = take_snapshot(session)
        self.high = self.high or now.xmax
        if now.xmin < self.high:
            return []
        rows = session.execute(
            """SELECT id FROM events_outbox_outboxevent
                WHERE transaction_id >= %s::text::xid8 AND transaction_id < %s::text::xid8 ORDER BY id""",
            [str(self.low), str(self.high)],
        ).fetchall()
        self.low, self.high = self.high, None
        return [row[0] for row in rows]


MUTANTS = [LastIdReader, XminReader, AboveMaxIdReader, MadeUpCutReader]


def published_by(reader, ledger, seed, seconds):
    """Run the writers for `seconds` while the reader reads; return the ids it read, in its order."""
    ids = []
    with open_session() as session:
        with writers(ledger, seed):
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                ids += reader.read(session)
                time.sleep(0.001)
        nothing_new = 0
        while nothing_new < 3:
            new = reader.read(session)
            ids += new
            nothing_new = 0 if new else nothing_new + 1
    return ids


@pytest.mark.parametrize("reader", [SnapshotReader, WindowReader])
def test_nothing_missed_and_order_kept_under_concurrent_writers(reader):
    seed = random.randrange(10**9)
    ledger = Ledger()
    ids = published_by(reader(), ledger, seed, seconds=6)
    print(f"seed {seed}: {ledger.count()} events")  # shown when the test fails
    assert judge(ids, ledger) == Violations(0, 0, 0, 0)
    assert ledger.count() > 500


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_same_test_catches_wrong_readers(mutant):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        ledger = Ledger()
        OutboxEvent.objects.all().delete()
        with connection.cursor() as cursor:
            cursor.execute("UPDATE test_aggregate SET number = 0")
        ids = published_by(mutant(), ledger, random.randrange(10**9), seconds=3)
        if judge(ids, ledger).total:
            return
    pytest.fail(f"{mutant.__name__} was not caught: the test is too weak")


@pytest.mark.parametrize("reader", [SnapshotReader, WindowReader])
def test_a_long_transaction_holds_back_only_its_own_events(reader):
    with psycopg.connect(**_raw_parameters()) as other, open_session() as session:
        other.execute("SELECT pg_current_xact_id()")
        with transaction.atomic():
            emit("a0", 1)
        reader = reader()
        assert len(reader.read(session)) == 1


def _raw_parameters():
    parameters = connection.get_connection_params()
    return {key: parameters[key] for key in ("host", "port", "dbname", "user") if key in parameters}


def test_window_of_a_snapshot_is_the_rows_between():
    with open_session() as session:
        for number in range(3):
            with transaction.atomic():
                emit("a0", number)
        first = take_snapshot(session)
        with transaction.atomic():
            emit("a0", 3)
        second = take_snapshot(session)
        all_ids = list(OutboxEvent.objects.order_by("id").values_list("id", flat=True))
        assert list(window_ids(session, NOTHING_SEEN, first)) == [all_ids[:3]]
        assert list(window_ids(session, first, second)) == [all_ids[3:]]
        assert list(window_ids(session, NOTHING_SEEN, second, after_id=all_ids[1])) == [all_ids[2:]]
        assert list(window_ids(session, second, second)) == []


def test_python_and_postgresql_agree_on_what_a_snapshot_sees():
    with connection.cursor() as cursor:
        for text in ("10:10:", "10:20:", "10:20:10,15,19", "3:3:"):
            snapshot = PgSnapshot.parse(text)
            assert str(snapshot) == text
            for xid in (2, 3, 9, 10, 11, 15, 19, 20, 21):
                cursor.execute("SELECT pg_visible_in_snapshot(%s::text::xid8, %s::pg_snapshot)", [str(xid), text])
                assert snapshot.sees(xid) == cursor.fetchone()[0], (text, xid)


def test_reading_a_window_does_not_walk_through_published_rows():
    """EXPLAIN on a big table: the queries of a window use their indexes, whatever has been published."""
    from events_outbox.window import LOOK_SQL, PAGE_SQL, RANGE_SQL, WINDOW_IDS_SQL

    with connection.cursor() as cursor:
        cursor.execute(
            """INSERT INTO events_outbox_outboxevent (transaction_id, event_id, event_type, event_version,
                   aggregate_id, tenant_id, topic, correlation_id, traceparent, tracestate, baggage, value)
               SELECT '2'::xid8, gen_random_uuid(), 'conversation.created', 'v1', (n % 1000)::text, 't',
                      'conversation.events', '', '', '', '', ''
                 FROM generate_series(1, 200000) n"""
        )
    with open_session() as session:
        lo = take_snapshot(session)
        for number in range(20):
            with transaction.atomic():
                emit("a0", number)
        look = LOOK_SQL, [[str(lo.xmax), "5"], [str(2**64 - 1), "5"], 17]
        _assert_each_span_is_looked_up(_explain(session, *look))  # nothing is known of the table yet
        session.execute("ANALYZE events_outbox_outboxevent")
        _assert_each_span_is_looked_up(_explain(session, *look))
        hi = take_snapshot(session)
        lo = PgSnapshot(lo.xmin - 1, lo.xmax, frozenset({lo.xmin - 1}))
        parameters = {
            "xmax": str(lo.xmax),
            "xip": [str(xid) for xid in lo.xip],
            "hi": str(hi),
            "after_id": 0,
        }
        declare = "DECLARE explained NO SCROLL CURSOR WITH HOLD FOR" + WINDOW_IDS_SQL
        plan = _explain(session, declare, parameters)
        assert "outbox_window" in plan and "outboxevent_pkey" not in plan and "Seq Scan" not in plan, plan
        ids = [id_ for chunk in window_ids(session, lo, hi) for id_ in chunk]
        assert len(ids) == 20
        # A long window too: what is walked through begins with it, not with the first row that was ever published.
        session.execute(
            "UPDATE events_outbox_outboxevent SET transaction_id = %s::text::xid8 WHERE id > %s",
            [str(lo.xmax), ids[0] - 150_000],
        )
        session.execute("VACUUM (ANALYZE) events_outbox_outboxevent")
        _assert_each_span_is_looked_up(_explain(session, *look))
        parameters["hi"] = str(take_snapshot(session))
        plan = _explain(session, declare, parameters)
        assert plan.count("Index Cond: ((transaction_id ") == 2 and "Seq Scan" not in plan, plan
        for sql, parameters in ((PAGE_SQL, [ids, 10**6]), (RANGE_SQL, [ids[0], ids[-1]])):
            plan = _explain(session, sql, parameters)
            assert "outboxevent_pkey" in plan and "Seq Scan" not in plan, plan


def _assert_each_span_is_looked_up(plan):
    assert "Index Cond: ((transaction_id >= span.first) AND (transaction_id <= span.last))" in plan, plan
    assert "Index Scan using outbox_window" in plan and "Seq Scan" not in plan, plan


def test_few_rows_come_with_the_snapshot_in_one_answer():
    with open_session() as session:
        read_bytes(session)
        lo = take_snapshot(session)
        assert _read(open_window(session, lo, 500)) == [[]]
        numbers = iter(range(100))
        for count, page_rows, is_in_one_answer in ((1, 500, True), (16, 500, True), (17, 500, False), (3, 2, False)):
            for _ in range(count):
                with transaction.atomic():
                    emit("a0", next(numbers))
            pages = open_window(session, lo, page_rows)
            with psycopg.connect(**_raw_parameters()) as other:
                other.execute("LOCK TABLE events_outbox_outboxevent")
                session.execute("SET statement_timeout = '50ms'")
                with contextlib.nullcontext() if is_in_one_answer else pytest.raises(psycopg.errors.QueryCanceled):
                    pages.read()
            session.execute("SET statement_timeout = 0")
            found = _read(open_window(session, lo, page_rows))
            assert found == _pages(session, lo, page_rows)
            assert sum(len(page) for page in found) == count
            lo = pages.hi


def test_pages_hold_each_row_of_the_window_once_whatever_their_size():
    with open_session() as session:
        read_bytes(session)
        lo = take_snapshot(session)
        for number in range(12):
            with transaction.atomic():
                emit("a0", number)
        ids = list(OutboxEvent.objects.order_by("id").values_list("id", flat=True))

        def pages(rows):
            return [[row[0] for row in page] for page in _pages(session, lo, rows)]

        assert pages(5) == [ids[:5], ids[5:10], ids[10:]]
        OutboxEvent.objects.filter(id__in=ids[3:8]).delete()  # a gap, as rollbacks leave them
        left = ids[:3] + ids[8:]
        assert pages(5) == [left[:5], left[5:]]


def test_large_values_make_short_pages(monkeypatch):
    monkeypatch.setattr(window, "PAGE_MAX_BYTES", 1)
    monkeypatch.setattr(window, "FEW_ROWS", 1)
    with open_session() as session:
        read_bytes(session)
        lo = take_snapshot(session)
        for number in range(4):
            with transaction.atomic():
                emit("a0", f"{number} {secrets.token_hex(8_000)}")  # too long for the table itself
        assert [len(page) for page in _pages(session, lo, 500)] == [1, 1, 1, 1]


def test_the_session_is_free_for_other_questions_once_the_page_under_way_is_in():
    with open_session() as session:
        read_bytes(session)
        lo = take_snapshot(session)
        for number in range(5):
            with transaction.atomic():
                emit("a0", number)
        pages = Pages(session, lo, take_snapshot(session), 0, 2)
        page, is_last = pages.read()
        with pytest.raises(psycopg.OperationalError, match="another command"):
            session.execute("SELECT 1")
        pages.receive()
        assert session.execute("SELECT 1").fetchall() == [(1,)]
        rows = page + pages.read()[0]
        pages.receive()
        last, is_last = pages.read()
        assert is_last and len(rows + last) == 5
        assert [row[0] for row in rows + last] == list(OutboxEvent.objects.order_by("id").values_list("id", flat=True))


def test_a_page_that_could_not_be_read_is_asked_for_again():
    with open_session() as session:
        read_bytes(session)
        lo = take_snapshot(session)
        for number in range(6):
            with transaction.atomic():
                emit("a0", number)
        pages = Pages(session, lo, take_snapshot(session), 0, 2)
        found = [pages.read()[0]]
        pages.receive()
        session.execute("SET statement_timeout = '50ms'")
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("LOCK TABLE events_outbox_outboxevent")
            found.append(pages.read()[0])  # it is in; the one after it has to wait
            with pytest.raises(psycopg.errors.QueryCanceled):
                pages.receive()
        page, is_last = pages.read()
        assert [len(page) for page in (*found, page)] == [2, 2, 2] and is_last


def _pages(session, lo, page_rows):
    """All pages of the window from `lo` to now."""
    return _read(Pages(session, lo, take_snapshot(session), 0, page_rows))


def _read(pages):
    found, is_last = [], False
    while not is_last:
        page, is_last = pages.read()
        found.append(page)
    return found


def _explain(session, sql, parameters):
    cursor = psycopg.RawCursor(session) if "$1" in sql else session.cursor()
    return "\n".join(row[0] for row in cursor.execute(f"EXPLAIN {sql}", parameters).fetchall())
