"""Writers that commit and roll back at random, a ledger of what they committed, and the comparison with what was read.

In a test they are threads on the test's own database. `tests.faults.writers` runs them in a process of its own.
"""

import itertools
import random
import threading
import time
import traceback
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
from django.db import InterfaceError, OperationalError, connection, transaction
from uuid_utils.compat import uuid7

from events_outbox import NewEvent, emit_event, emit_events
from events_outbox.models import OutboxEvent
from events_outbox.proto.base_event_pb2 import BaseEvent
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload

WRITERS = 8
AGGREGATES = 12
AGGREGATE_NAMES = [f"a{n}" for n in range(AGGREGATES)]
CREATE_AGGREGATES = "CREATE TABLE test_aggregate (name text PRIMARY KEY, number int NOT NULL)"
FILL_AGGREGATES = "INSERT INTO test_aggregate SELECT unnest(%s::text[]), 0"
WAYS = ("plain", "plain", "first_write", "early_xid", "early_xid", "two", "savepoint", "rollback")
CONNECTION_LOST = (OperationalError, InterfaceError)


class Written(NamedTuple):
    """One event: who it is, and its place among those of its aggregate."""

    event_id: str
    aggregate: str
    number: int

    @classmethod
    def parse(cls, value):
        base = BaseEvent.FromString(value)
        return cls(base.event_id, base.aggregate_id, int(base.metadata["number"]))


@dataclass
class Ledger:
    """What the writers know of their transactions, kept outside the database.

    A commit whose answer was lost stays in doubt until `settle()` is told which of its rows exist.
    """

    committed: dict[str, Written] = field(default_factory=dict)
    in_doubt: dict[str, Written] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def announce(self, written):
        """A transaction is about to commit."""
        with self.lock:
            self.in_doubt |= {event.event_id: event for event in written}

    def confirm(self, written):
        """It has."""
        with self.lock:
            for event in written:
                del self.in_doubt[event.event_id]
                self.committed[event.event_id] = event

    def settle(self, existing_ids):
        """Of the events in doubt those committed whose rows exist. Returns how many did and how many did not."""
        with self.lock:
            found = {event_id: event for event_id, event in self.in_doubt.items() if event_id in existing_ids}
            lost = len(self.in_doubt) - len(found)
            self.committed |= found
            self.in_doubt = {}
            return len(found), lost

    def count(self):
        with self.lock:
            return len(self.committed)


@dataclass
class Violations:
    missed: int = 0
    phantoms: int = 0
    duplicates: int = 0
    out_of_order: int = 0

    @property
    def total(self):
        return self.missed + self.phantoms + self.duplicates + self.out_of_order


def compare(read, ledger):
    """Compare events in the order in which they were read with the ledger. What comes again is no matter of order."""
    violations = Violations()
    first = {event.event_id: event for event in reversed(read)}
    violations.missed = len(ledger.committed.keys() - first.keys())
    violations.phantoms = len(first.keys() - ledger.committed.keys())
    violations.duplicates = len(read) - len(first)
    numbers, seen = defaultdict(list), set()
    for event in read:
        if event.event_id not in seen:
            seen.add(event.event_id)
            numbers[event.aggregate].append(event.number)
    for in_order_read in numbers.values():
        violations.out_of_order += sum(later <= earlier for earlier, later in itertools.pairwise(in_order_read))
    return violations


def judge(ids, ledger):
    """`compare()` for the ids of outbox rows, in the order in which they were read."""
    values = dict(OutboxEvent.objects.values_list("id", "value"))
    return compare([Written.parse(bytes(values[id_])) for id_ in ids], ledger)


def new_event(aggregate, number, size=0):
    return NewEvent(
        event_type="conversation.created",
        payload=ConversationCreatedPayload(conversation_id=aggregate, title="x" * size),
        aggregate_id=aggregate,
        tenant_id="t",
        metadata={"number": str(number)},
        event_id=uuid7(),
    )


def emit(aggregate, number):
    event_id = uuid7()
    emit_event(
        "conversation.created",
        ConversationCreatedPayload(conversation_id=aggregate),
        aggregate_id=aggregate,
        tenant_id="t",
        metadata={"number": str(number)},
        event_id=event_id,
    )
    return Written(str(event_id), aggregate, number)


def emit_numbered(places, size=0):
    """Emit an event for each (aggregate, number), in one statement."""
    events = [new_event(aggregate, number, size) for aggregate, number in places]
    emit_events(events)
    return [
        Written(str(event.event_id), aggregate, number)
        for event, (aggregate, number) in zip(events, places, strict=True)
    ]


def emit_next(aggregate, written, count=1):
    """Change the aggregate's row, and so lock it, then emit: the numbers are in the order of the commits."""
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE test_aggregate SET number = number + %s WHERE name = %s RETURNING number", [count, aggregate]
        )
        number = cursor.fetchone()[0]
    if count == 1:
        written.append(emit(aggregate, number))
    else:
        written += emit_numbered([(aggregate, n) for n in range(number - count + 1, number + 1)])


class _RollBack(Exception):
    pass


def one_transaction(ledger, rng, way, fresh_aggregate):
    """One of the ways in which transactions meet."""
    written = []
    aggregates = sorted(rng.sample(AGGREGATE_NAMES, 2))
    try:
        with transaction.atomic():
            if way == "first_write":
                # Nothing written before: nextval() runs before the transaction has its id.
                written.append(emit(fresh_aggregate, 1))
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
                with pytest.raises(_RollBack), transaction.atomic():
                    emit_next(aggregates[0], [])
                    raise _RollBack
                with transaction.atomic():
                    emit_next(aggregates[0], written)
            elif way == "rollback":
                emit_next(aggregates[0], written)
                raise _RollBack
            elif way == "burst":
                emit_next(aggregates[0], written, rng.randrange(20, 100))
            else:
                emit_next(aggregates[0], written)
                if rng.random() < 0.3:
                    time.sleep(rng.random() * 0.005)
            ledger.announce(written)
    except _RollBack:
        return
    ledger.confirm(written)


def long_transaction(ledger, wait):
    """A writing transaction that stays open as long as `wait()` takes."""
    written = []
    with transaction.atomic():
        emit_next("long", written)
        wait()
        emit_next("long", written)
        ledger.announce(written)
    ledger.confirm(written)


@contextmanager
def writers(ledger, seed, *, count=WRITERS, ways=WAYS, pause_seconds=0.0, long_seconds=0.7, survive=False):
    """`count` writers and one that keeps long writing transactions open, until the block is left.

    `pause_seconds`: of each writer, after each transaction. `long_seconds`: None keeps one open all the time.
    `survive`: a lost connection is no error but part of the test.
    """
    over = threading.Event()
    errors = []

    def run(write):
        try:
            while not over.is_set():
                try:
                    write()
                    over.wait(pause_seconds)
                except CONNECTION_LOST:
                    if not survive:
                        raise
                    connection.close()
                    over.wait(0.1)
        except Exception as error:
            errors.append(error)
            over.set()
            traceback.print_exc()
        finally:
            connection.close()

    def short(writer):
        rng = random.Random(f"{seed}-{writer}")
        serial = iter(range(10**9))
        return lambda: one_transaction(ledger, rng, rng.choice(ways), f"w{seed}-{writer}-{next(serial)}")

    def long():
        long_transaction(ledger, lambda: over.wait(long_seconds))

    threads = [threading.Thread(target=run, args=[short(writer)]) for writer in range(count)]
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


@contextmanager
def aggregates_table():
    """The table whose rows the writers lock."""
    with connection.cursor() as cursor:
        cursor.execute(CREATE_AGGREGATES)
        cursor.execute(FILL_AGGREGATES, [[*AGGREGATE_NAMES, "long"]])
    yield
    with connection.cursor() as cursor:
        cursor.execute("DROP TABLE test_aggregate")
