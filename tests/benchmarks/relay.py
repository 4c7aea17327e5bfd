"""How fast the relay drains a backlog, against a bare producer and against a relay that flushes each event."""

import gc
import time
from functools import partial
from typing import Any

from tests.benchmarks.bench import OUTBOX, Bench, Drain, Outbox, cpu_us, start_of
from tests.benchmarks.report import Row, median_and_spread, number


def run(bench: Bench) -> list[Row]:
    scale = bench.scale
    with bench.database() as outbox:
        outbox.fill(scale.events, last=scale.few_events)
        written_before = _writes(outbox)
        outbox.drain("all")  # warms the broker's virtual machine
        drains, singles, bare_few, bare_all = [], [], [], []
        for _ in range(scale.rounds):
            drains.append(outbox.drain("all"))
            few, all_ = _produce_bare(bench, outbox)
            bare_few.append(few)
            bare_all.append(all_)
            singles.append(outbox.drain("last", batch_size=1))
        written = _writes(outbox) - written_before

    start = start_of(bare_few, bare_all)
    relay, bare, single = ([drain.rate(start) for drain in some] for some in (drains, bare_all, singles))
    to_bare, spread = median_and_spread([rate / baseline for rate, baseline in zip(relay, bare, strict=True)])
    to_single, spread_single = median_and_spread([rate / one for rate, one in zip(relay, single, strict=True)])
    rate, spread_rate = median_and_spread(relay)
    bare_rate, _ = median_and_spread(bare)
    single_rate, _ = median_and_spread(single)
    published = (scale.rounds + 1) * scale.events + scale.rounds * scale.few_events
    return [
        Row(
            measure="relay drain rate / bare producer of the same rows from memory",
            value=to_bare,
            unit="x",
            must=">= 0.70",
            baseline=f"bare confluent-kafka producer, same settings, {number(bare_rate)} events/s",
            detail=f"{spread}; {scale.events:,} events a run; of CPU {cpu_us(drains):.1f} µs an event, bare "
            f"{cpu_us(bare_all):.1f}; {start:.2f} s that a bare producer takes to start are taken off all",
        ),
        Row(measure="relay drain rate", value=rate, unit="events/s", detail=spread_rate),
        Row(
            measure="updates and dead rows on the outbox table caused by publishing",
            value=written,
            unit="rows",
            must="= 0",
            detail="rows updated, deleted or dead by PostgreSQL's counters, and rows that were ever locked or deleted "
            f"(xmax), after {published:,} events were published",
        ),
        Row(
            measure="drain rate / a relay that flushes each event",
            value=to_single,
            unit="x",
            must=">= 10",
            baseline=f"the same relay with a batch size of 1, {number(single_rate)} events/s",
            detail=f"{spread_single}; {scale.few_events:,} events a run of the baseline",
        ),
    ]


def _writes(outbox: Outbox) -> int:
    (counted,) = outbox.connection.execute(
        "SELECT n_tup_upd + n_tup_del + n_dead_tup FROM pg_stat_user_tables WHERE relname = %s", [OUTBOX]
    ).fetchall()[0]
    (stamped,) = outbox.connection.execute(f"SELECT count(*) FROM {OUTBOX} WHERE xmax <> '0'::xid").fetchall()[0]
    return int(counted) + int(stamped)


def _produce_bare(bench: Bench, outbox: Outbox) -> tuple[Drain, Drain]:
    counts = [bench.scale.few_events, bench.scale.events]
    before = bench.ends()
    few, all_ = bench.call(produce_bare, url=outbox.url, published=outbox.snapshot("all"), counts=counts)
    produced = bench.count_since(before)
    if produced != sum(counts):
        raise RuntimeError(f"the bare producer sent {produced} events instead of {sum(counts)}")
    return Drain(**few), Drain(**all_)


def produce_bare(published: str, counts: list[int]) -> list[dict[str, Any]]:
    """Job: produce rows that are not visible in `published`, once for each of `counts`, each with a new producer.

    The rows are in memory as the relay reads them. What is done with each is what it takes to send it and to hear if
    that failed: its headers, and a callback that knows which row it was.
    """
    from confluent_kafka import Producer

    from events_outbox.fields import PgSnapshot
    from events_outbox.kafka import producer_settings
    from events_outbox.leader import open_session
    from events_outbox.records import headers_for
    from events_outbox.window import Pages, read_bytes, take_snapshot

    rows: list[Any] = []
    with open_session() as session:
        read_bytes(session)
        pages, is_read = Pages(session, PgSnapshot.parse(published), take_snapshot(session), 0, 10_000), False
        while not is_read:
            page, is_read = pages.read()
            rows += page
    gc.collect()
    gc.freeze()  # the collector would walk through all these again and again: no fault of what is measured
    failed: dict[int, Any] = {}

    def on_delivery(row_id: int, error: Any, _message: Any) -> None:
        failed[row_id] = error

    drains = []
    for count in counts:
        started, started_cpu = time.perf_counter(), time.process_time()
        producer = Producer(producer_settings())
        for place, row in enumerate(rows[:count]):
            report = partial(on_delivery, row[0])
            while True:
                try:
                    producer.produce(row[1], row[3], row[2], headers=headers_for(row[4:]), on_delivery=report)
                    break
                except BufferError:
                    producer.poll(0.05)
            if place % 500 == 0:
                producer.poll(0)
        producer.flush()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
        drains.append({"count": count, "seconds": seconds, "cpu_seconds": cpu_seconds})
    if failed:
        raise RuntimeError(f"{len(failed)} events were not delivered: {next(iter(failed.values()))}")
    return drains


def records_in_memory(condition: str, *parameters: Any) -> list[tuple[str, str, bytes, list[tuple[str, bytes]]]]:
    """The records that the relay would make of these rows: topic, key, value, headers. Call it in a job."""
    from django.db import connection

    from events_outbox.records import CONTENT_TYPE, HEADER_FIELDS

    with connection.cursor() as cursor:
        cursor.execute(
            f"""SELECT topic, aggregate_id, value, {", ".join(HEADER_FIELDS)} FROM {OUTBOX}
                 WHERE {condition} ORDER BY id""",
            parameters,
        )
        records = []
        for topic, key, value, *fields in cursor.fetchall():
            headers = [(name, str(text).encode()) for name, text in zip(HEADER_FIELDS, fields, strict=True) if text]
            headers.append(("content-type", CONTENT_TYPE.encode()))
            records.append((topic, key, bytes(value), headers))
    gc.collect()
    gc.freeze()  # the collector would walk through all these again and again: no fault of what is measured
    return records
