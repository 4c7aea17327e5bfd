"""How long an event takes from the commit of its transaction to the broker's acknowledgement."""

import random
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import fields

from confluent_kafka import Producer
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from tests.benchmarks.bench import TOPICS, Bench, Scale
from tests.benchmarks.report import Row, median_and_spread, number, percentile
from tests.benchmarks.size import json_bytes

WRITERS = 4
WARM_UP_SECONDS = 3
PROBES = 200


def run(bench: Bench) -> list[Row]:
    scale = bench.scale
    _set_timestamp_type(bench, "LogAppendTime")
    try:
        ack_ms = _append_to_ack_ms(bench)
        with bench.database() as outbox:
            outbox.seed(100)
            outbox.place("all")
            outbox.rewind("all")
            before, bytes_before = bench.ends(), bench.log_bytes()
            with bench.relay(outbox.url):
                seconds = WARM_UP_SECONDS + scale.rounds * scale.latency_seconds
                committed = bench.call(write_steadily, url=outbox.url, rate=scale.latency_rate, seconds=seconds)
                bench.wait_for_records(before, len(committed))
            disk_bytes = bench.log_bytes() - bytes_before
            records = bench.records_since(before)
    finally:
        _set_timestamp_type(bench, "CreateTime")

    appended_ms = {dict(record.headers())["event_id"].decode(): record.timestamp()[1] for record in records}
    if len(appended_ms) != len(committed):
        raise RuntimeError(f"{len(appended_ms)} of {len(committed)} events came")
    rounds = by_round(scale, [(at, appended_ms[event_id] - at * 1000 + ack_ms) for event_id, at in committed])
    rate = sum(map(len, rounds)) / (scale.rounds * scale.latency_seconds)
    how = (
        f"{number(rate)} events/s by {WRITERS} writers at random intervals, a transaction each; the clock starts when "
        f"COMMIT returns and stops at the broker's LogAppendTime (ms) plus {ack_ms:.1f} ms, which a lone record's "
        "acknowledgement takes to come back after that"
    )
    p50, spread_50 = median_and_spread([percentile(latencies, 0.50) for latencies in rounds])
    p99, spread_99 = median_and_spread([percentile(latencies, 0.99) for latencies in rounds])
    title = f"commit -> broker ack at {scale.latency_rate} events/s"
    live = disk_bytes / sum(json_bytes(record.value()) for record in records)
    return [
        Row(measure=f"{title}, p50", value=p50, unit="ms", must="<= 20", detail=f"{spread_50}; {how}"),
        Row(
            measure=f"{title}, p99",
            value=p99,
            unit="ms",
            must="<= 60",
            detail=f"{spread_99}; {scale.latency_seconds} s each; longest {number(max(map(max, rounds)))} ms",
        ),
        Row(
            measure=f"bytes on the broker's disk / JSON uncompressed, live at {scale.latency_rate} events/s",
            value=live,
            unit="x",
            detail="the same traffic as above: what is published at once is a few events, too few to compress well; "
            "key and headers count, the JSON has none",
        ),
    ]


def by_round(scale: Scale, measured: Sequence[tuple[float, float]]) -> list[list[float]]:
    """Latencies of each round, from pairs of the time of commit and the latency; the warming up is left out."""
    rounds: list[list[float]] = [[] for _ in range(scale.rounds)]
    begin = min(at for at, _ in measured) + WARM_UP_SECONDS
    for at, latency in measured:
        which = int((at - begin) // scale.latency_seconds)
        if at >= begin and which < scale.rounds:
            rounds[which].append(latency)
    return rounds


def _set_timestamp_type(bench: Bench, timestamp_type: str) -> None:
    entry = ConfigEntry("message.timestamp.type", timestamp_type, incremental_operation=AlterConfigOpType.SET)
    resources = [ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry]) for topic in TOPICS]
    admin = bench.admin()
    for future in admin.incremental_alter_configs(resources).values():
        future.result(timeout=30)


def _append_to_ack_ms(bench: Bench) -> float:
    """From the broker's LogAppendTime, which is cut to whole milliseconds, to the delivery report: the median."""
    producer = Producer({"bootstrap.servers": bench.bootstrap_servers, "acks": "all", "linger.ms": 0})
    took: list[float] = []

    def acknowledged(error, record):
        if error:
            raise RuntimeError(error)
        took.append(time.time() * 1000 - record.timestamp()[1])

    for _ in range(PROBES):
        producer.produce("default.events", b"probe", on_delivery=acknowledged)
        producer.flush()
        time.sleep(0.0037)  # not in step with the clock's milliseconds
    return statistics.median(took[10:])


def write_steadily(rate: int, seconds: float) -> list[tuple[str, float]]:
    """Job: emit at random intervals, each event in a transaction of its own; return ids and times of commit."""
    from django.db import connection, transaction

    from events_outbox import emit_event
    from tests.benchmarks.traffic import conversation_events

    events = [
        {field.name: getattr(event, field.name) for field in fields(event)} | {"event_id": None, "timestamp": None}
        for event in conversation_events(int(rate * seconds * 1.2), seed=2)
    ]
    rng = random.Random(3)
    schedule, at = [], 0.0
    while at < seconds and len(schedule) < len(events):
        schedule.append(at)
        at += rng.expovariate(rate)
    committed: list[list[tuple[str, float]]] = [[] for _ in range(WRITERS)]
    begin = time.time() + 0.5

    def write(which):
        for place in range(which, len(schedule), WRITERS):
            # When a commit took long, the next ones come at once: the schedule does not wait for the database.
            time.sleep(max(0.0, begin + schedule[place] - time.time()))
            event = events[place]
            with transaction.atomic():
                row = emit_event(**event)
            committed[which].append((str(row.event_id), time.time()))
        connection.close()

    threads = [threading.Thread(target=write, args=(which,)) for which in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [pair for pairs in committed for pair in pairs]
