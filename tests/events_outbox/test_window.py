"""The snapshot cursor under concurrency: nothing missed, nothing made up, order kept; and wrong readers are caught."""

import itertools
import random
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field

import psycopg
import pytest
from django.db import connection, transaction

from events_outbox import emit_event
from events_outbox.fields import NOTHING_SEEN, PgSnapshot
from events_outbox.leader import open_session
from events_outbox.models import OutboxEvent
from events_outbox.proto.base_event_pb2 import BaseEvent
from events_outbox.window import take_snapshot, window_ids
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload

pytestmark = pytest.mark.django_db(transaction=True)

WRITERS = 8
AGGREGATES = 12


class SnapshotReader:
    """The relay's way: windows between two snapshots that were really taken."""

    def __init__(self):
        self.lo = NOTHING_SEEN

    def read(self, session):
        hi = take_snapshot(session)
        ids = [id_ for chunk in window_ids(session, self.lo, hi) for id_ in chunk]
        self.lo = hi
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


@dataclass
class Ledger:
    """What the writers know they committed, kept outside the database."""

    committed: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, written):
        with self.lock:
            for aggregate, number in written:
                self.committed[aggregate].append(number)

    def count(self):
        with self.lock:
            return sum(len(numbers) for numbers in self.committed.values())


@dataclass
class Violations:
    missed: int
    phantoms: int
    duplicates: int
    out_of_order: int

    @property
    def total(self):
        return self.missed + self.phantoms + self.duplicates + self.out_of_order


def emit_next(aggregate, written):
    """Change the aggregate's row, and so lock it, then emit: the numbers are in the order of the commits."""
    with connection.cursor() as cursor:
        cursor.execute("UPDATE test_aggregate SET number = number + 1 WHERE name = %s RETURNING number", [aggregate])
        number = cursor.fetchone()[0]
    emit(aggregate, number)
    written.append((aggregate, number))


def emit(aggregate, number):
    emit_event(
        "conversation.created",
        ConversationCreatedPayload(conversation_id=aggregate),
        aggregate_id=aggregate,
        tenant_id="t",
        metadata={"number": str(number)},
    )


def one_transaction(rng, writer, serial):
    """One of the ways in which transactions meet. Returns what is committed when it returns."""
    written = []
    aggregates = sorted(rng.sample([f"a{n}" for n in range(AGGREGATES)], 2))
    way = rng.choice(["plain", "plain", "first_write", "early_xid", "early_xid", "two", "savepoint", "rollback"])
    try:
        with transaction.atomic():
            if way == "first_write":
                # Nothing written before: nextval() runs before the transaction has its id.
                emit(f"w{writer}-{serial}", 1)
                written.append((f"w{writer}-{serial}", 1))
            elif way == "early_xid":
                with connection.cursor() as cursor:
                    cursor.execute("SELECT pg_current_xact_id()")
                time.sleep(rng.random() * 0.01)
                emit_next(aggregates[0], written)
            elif way == "two":
                emit_next(aggregates[0], written)
                emit_next(aggregates[1], written)
                time.sleep(rng.random() * 0.01)
            elif way == "savepoint":
                with pytest.raises(ZeroDivisionError), transaction.atomic():
                    emit_next(aggregates[0], [])
                    raise ZeroDivisionError
                with transaction.atomic():
                    emit_next(aggregates[0], written)
            elif way == "rollback":
                emit_next(aggregates[0], written)
                raise ZeroDivisionError
            else:
                emit_next(aggregates[0], written)
                if rng.random() < 0.3:
                    time.sleep(rng.random() * 0.005)
    except ZeroDivisionError:
        return []
    return written


@contextmanager
def writers(ledger, seed):
    """Eight writers and one that keeps long writing transactions open, until the block is left."""
    over = threading.Event()
    errors = []

    def run(write):
        try:
            while not over.is_set():
                write()
        except Exception as error:
            errors.append(error)
        finally:
            connection.close()

    def short(writer):
        rng = random.Random(f"{seed}-{writer}")
        serial = iter(range(10**9))
        return lambda: ledger.add(one_transaction(rng, writer, next(serial)))

    def long():
        written = []
        with transaction.atomic():
            emit_next("long", written)
            over.wait(0.7)
            emit_next("long", written)
        ledger.add(written)

    threads = [threading.Thread(target=run, args=[short(writer)]) for writer in range(WRITERS)]
    threads.append(threading.Thread(target=run, args=[long]))
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert not errors, errors


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


def judge(ids, ledger):
    values = dict(OutboxEvent.objects.values_list("id", "value"))
    read = defaultdict(list)
    for id_ in ids:
        base = BaseEvent.FromString(bytes(values[id_]))
        read[base.aggregate_id].append(int(base.metadata["number"]))
    violations = Violations(0, 0, 0, 0)
    for aggregate in read.keys() | ledger.committed.keys():
        got, committed = read[aggregate], set(ledger.committed[aggregate])
        violations.missed += len(committed - set(got))
        violations.phantoms += len(set(got) - committed)
        violations.duplicates += len(got) - len(set(got))
        violations.out_of_order += sum(later < earlier for earlier, later in itertools.pairwise(got))
    return violations


@pytest.fixture(autouse=True)
def aggregates():
    with connection.cursor() as cursor:
        cursor.execute("CREATE TABLE test_aggregate (name text PRIMARY KEY, number int NOT NULL)")
        cursor.executemany(
            "INSERT INTO test_aggregate VALUES (%s, 0)", [[f"a{n}"] for n in range(AGGREGATES)] + [["long"]]
        )
    yield
    with connection.cursor() as cursor:
        cursor.execute("DROP TABLE test_aggregate")


def test_nothing_missed_and_order_kept_under_concurrent_writers():
    seed = random.randrange(10**9)
    ledger = Ledger()
    ids = published_by(SnapshotReader(), ledger, seed, seconds=6)
    print(f"seed {seed}: {ledger.count()} events")  # noqa: T201  (shown when the test fails)
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


def test_a_long_transaction_holds_back_only_its_own_events():
    with psycopg.connect(**_raw_parameters()) as other, open_session() as session:
        other.execute("SELECT pg_current_xact_id()")
        with transaction.atomic():
            emit("a0", 1)
        reader = SnapshotReader()
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
    """EXPLAIN on a big table: the two queries of a window use their indexes, whatever has been published."""
    from events_outbox.window import PAGE_SQL, WINDOW_IDS_SQL

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
        session.execute("ANALYZE events_outbox_outboxevent")
        hi = take_snapshot(session)
        lo = PgSnapshot(lo.xmin, lo.xmax, frozenset({lo.xmin}))
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
        plan = _explain(session, PAGE_SQL, [ids])
        assert "outboxevent_pkey" in plan and "Seq Scan" not in plan, plan


def _explain(session, sql, parameters):
    return "\n".join(row[0] for row in session.execute(f"EXPLAIN {sql}", parameters).fetchall())
