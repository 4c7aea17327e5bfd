"""How fast the relay drains while a writing transaction is open: it holds back what vacuum may remove."""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from tests.benchmarks.bench import COLUMNS, OUTBOX, Bench, Outbox, start_of
from tests.benchmarks.report import Row, median_and_spread, number

SMALL_BATCH = 10


def run(bench: Bench) -> list[Row]:
    scale = bench.scale
    last = scale.events // 20
    with bench.database() as outbox:
        outbox.fill(scale.events, last=last)
        outbox.drain("all")
        short = [outbox.drain("last") for _ in range(scale.rounds)]
        alone, beside = [], []
        for _ in range(scale.rounds):
            alone.append(outbox.drain("all"))
            with _writing_transaction(outbox):
                outbox.add_pending(last)  # which a reader that waits for all older transactions would not publish
                beside.append(outbox.drain("all"))
        # Every move of the cursor leaves a dead version of its row behind, and none of them can be removed.
        _rate_in_small_batches(outbox)  # warms up
        moves_without = [_rate_in_small_batches(outbox) for _ in range(scale.rounds)]
        with _writing_transaction(outbox):
            moves = outbox.drain("all", batch_size=SMALL_BATCH).count // SMALL_BATCH
            moves_during = [_rate_in_small_batches(outbox) for _ in range(scale.rounds)]
        moves_without += [_rate_in_small_batches(outbox) for _ in range(scale.rounds)]
    start = start_of(short, alone)
    without, during = ([drain.rate(start) for drain in drains] for drains in (alone, beside))
    ratio, spread = median_and_spread([late / early for early, late in zip(without, during, strict=True)])
    rate, _ = median_and_spread(without)
    late_rate, late_spread = median_and_spread(moves_during)
    early_rate, early_spread = median_and_spread(moves_without)
    return [
        Row(
            measure="drain rate with a writing transaction open throughout / without",
            value=ratio,
            unit="x",
            must=">= 0.90",
            baseline=f"without, {number(rate)} events/s",
            detail=f"{spread}; {scale.events:,} events a run and more, {last:,} of them added while it was open; "
            f"{start:.2f} s that the relay takes to start without are taken off both",
        ),
        Row(
            measure=f"the same in batches of {SMALL_BATCH}, after {moves:,} cursor moves during that transaction",
            value=late_rate / early_rate,
            unit="x",
            baseline=f"before and after that, {number(early_rate)} events/s ({early_spread})",
            detail=f"{number(late_rate)} events/s ({late_spread}), right after those moves",
        ),
    ]


def _rate_in_small_batches(outbox: Outbox) -> float:
    """Events per second of a drain in small batches, less the start and what the events take in large ones."""
    fast = outbox.drain("last")
    slow = outbox.drain("last", batch_size=SMALL_BATCH)
    return slow.rate(fast.seconds)


@contextmanager
def _writing_transaction(outbox: Outbox) -> Iterator[None]:
    """Another session's transaction that has written an event, and is rolled back in the end."""
    with psycopg.connect(outbox.url) as connection:
        connection.execute("SELECT pg_current_xact_id()")
        connection.execute(
            f"INSERT INTO {OUTBOX} (event_id, {COLUMNS}) SELECT uuidv7(), {COLUMNS} FROM {OUTBOX} WHERE id = 1"
        )
        yield
        connection.rollback()
