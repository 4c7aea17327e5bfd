"""How fast events are handled: against bare loops, with many processed marks, by two processes, redelivered; and how
soon after the commit of the business write."""

import contextlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.bench import Bench, Outbox, wait_until
from tests.benchmarks.consuming import ADD_KEYS, EFFECTS_FILE, MAKE_EFFECTS, bare_batch, bare_each, consume, fill
from tests.benchmarks.latency import WARM_UP_SECONDS, WRITERS, by_round, write_steadily
from tests.benchmarks.report import Row, median_and_spread, number, percentile

NAME = "bench"
LIVE = "bench-live"
PROCESSED = "events_outbox_processedevent"
SEEDS = 4_000
CHUNK = 500_000


@dataclass(frozen=True)
class Consumed:
    """How a number of events was handled, from the first record to the last commit; times are the clock's."""

    seen: int
    began: float
    ended: float
    cpu_seconds: float
    handled: int = 0

    @property
    def rate(self) -> float:
        return self.seen / (self.ended - self.began)


Pair = tuple[Consumed, Consumed]


def run(bench: Bench) -> list[Row]:
    with _database(bench) as outbox:
        return [
            *_of_bare_loops(bench, outbox),
            *_of_latency(bench),
            *_of_marks(bench, outbox),
            *_of_two_processes(bench, outbox),
            *_of_redelivery(bench, outbox),
        ]


# What is measured


def _of_bare_loops(bench: Bench, outbox: Outbox) -> list[Row]:
    batches = _beside_bare(bench, outbox, bench.scale.consumed_events, "upsert_batch", bare_batch)
    singles = _beside_bare(bench, outbox, bench.scale.consumed_singly, "update_one", bare_each)
    rate, spread = median_and_spread([ours.rate for ours, _ in batches])
    single_rate, spread_single = median_and_spread([ours.rate for ours, _ in singles])
    return [
        Row(
            measure="batch handler of one upsert",
            value=rate,
            unit="events/s",
            must=">= 20000",
            detail=f"{spread}; {_cost(batches)}; {bench.scale.consumed_events:,} events a run, in batches of "
            "CONSUMER_BATCH_SIZE; from the first record to the last commit",
        ),
        _ratio(
            "batch handler of one upsert / bare loop",
            batches,
            must=">= 0.6",
            baseline="a bare loop that consumes, parses event and payload, does the same dedupe insert and upsert with "
            "psycopg, commits both",
        ),
        _ratio(
            "handler with one UPDATE an event / bare loop",
            singles,
            must=">= 0.8",
            baseline="a bare loop with the same statements, the UPDATE through Django's connection.cursor() as in the "
            "handler",
        ),
        Row(
            measure="handler with one UPDATE an event",
            value=single_rate,
            unit="events/s",
            detail=f"{spread_single}; {_cost(singles)}; {bench.scale.consumed_singly:,} events a run",
        ),
    ]


def _of_latency(bench: Bench) -> list[Row]:
    scale = bench.scale
    effects = bench.services.data_dir / "effects"
    effects.touch()
    bench.begin_at_end(LIVE)
    with _database(bench, seeds=100) as outbox:
        outbox.place("all")
        outbox.rewind("all")
        with bench.relay(outbox.url), bench.consumer(outbox.url, LIVE, **{EFFECTS_FILE: str(effects)}):
            seconds = WARM_UP_SECONDS + scale.rounds * scale.latency_seconds
            committed = bench.call(write_steadily, url=outbox.url, rate=scale.latency_rate, seconds=seconds)
            wait_until(lambda: effects.read_text().count("\n") >= len(committed))
    lines = [line.split() for line in effects.read_text().splitlines()]
    effect_at = {event_id: float(at) for event_id, at in lines}
    if len(lines) != len(committed):
        raise RuntimeError(f"{len(lines)} effects of {len(committed)} events")
    rounds = by_round(scale, [(at, (effect_at[event_id] - at) * 1000) for event_id, at in committed])
    rate = sum(map(len, rounds)) / (scale.rounds * scale.latency_seconds)
    p50, spread_50 = median_and_spread([percentile(latencies, 0.50) for latencies in rounds])
    p99, spread_99 = median_and_spread([percentile(latencies, 0.99) for latencies in rounds])
    title = f"commit of the business write -> effect committed at {scale.latency_rate} events/s"
    how = (
        f"{number(rate)} events/s by {WRITERS} writers at random intervals, a transaction each; `manage.py "
        "relay_outbox` and `manage.py consume` between them; from when the writer's COMMIT returns to the handler's "
        "on_commit(); a handler of one upsert an event"
    )
    return [
        Row(measure=f"{title}, p50", value=p50, unit="ms", must="<= 40", detail=f"{spread_50}; {how}"),
        Row(
            measure=f"{title}, p99",
            value=p99,
            unit="ms",
            must="<= 150",
            detail=f"{spread_99}; {scale.latency_seconds} s each; longest {number(max(map(max, rounds)))} ms",
        ),
    ]


def _of_marks(bench: Bench, empty: Outbox) -> list[Row]:
    rows = bench.scale.processed_rows
    title = f"cost of dedupe with {rows:,} processed rows / with none"
    found = []
    for random_ids in (False, True):
        with contextlib.ExitStack() as stack:
            full = stack.enter_context(_database(bench))
            _add_processed(full, rows, random_ids)
            topic = stack.enter_context(_filled_topic(bench, empty, random_ids=random_ids))  # newer than the marks
            _warm_up(bench, empty, topic, bench.scale.consumed_events, "upsert_batch")
            pairs = []
            for _ in range(bench.scale.rounds):
                _reset(empty)
                without = _consume(bench, empty, topic, bench.scale.consumed_events, "upsert_batch")
                last = _settle_marks(full, rows)
                pairs.append((_consume(bench, full, topic, bench.scale.consumed_events, "upsert_batch"), without))
                full.connection.execute(f"DELETE FROM {PROCESSED} WHERE id > %s", [last])
            ((megabytes,),) = full.connection.execute("SELECT pg_total_relation_size(%s) / 1e6", [PROCESSED]).fetchall()
        ratio, spread = median_and_spread([without.rate / with_.rate for with_, without in pairs])
        rate, _ = median_and_spread([without.rate for _, without in pairs])
        found.append(
            Row(
                measure=f"{title}, with UUIDv4" if random_ids else title,
                value=ratio,
                unit="x",
                must=None if random_ids else "<= 1.25",
                baseline=f"an empty table, {number(rate)} events/s",
                detail=f"{spread}; time an event of the batch handler; rows of the same consumer, table and indexes "
                f"{number(megabytes)} MB; "
                + (
                    "ids that are anywhere in the index, as no emit_event() makes them"
                    if random_ids
                    else "ids are UUIDv7 of a week, as emit_event() makes them, and new ones follow them"
                ),
            )
        )
    return found


def _of_two_processes(bench: Bench, outbox: Outbox) -> list[Row]:
    pairs = []
    for _ in range(bench.scale.rounds):
        one, two = (_rate_of_members(bench, outbox, members) for members in (1, 2))
        pairs.append((one, two))
    ratio, spread = median_and_spread([two / one for one, two in pairs])
    rate, _ = median_and_spread([one for one, _ in pairs])
    return [
        Row(
            measure="2 processes / 1 process with a handler that waits 1 ms",
            value=ratio,
            unit="x",
            must=">= 1.9",
            baseline=f"one process, {number(rate)} events/s",
            detail=f"{spread}; {bench.scale.consumed_waiting:,} events a run, evenly over six partitions, published "
            "when all members have theirs; from the first record of any to the last commit of all",
        )
    ]


def _of_redelivery(bench: Bench, outbox: Outbox) -> list[Row]:
    count = bench.scale.redelivered_events
    with _filled_topic(bench, outbox, count) as topic:
        _reset(outbox)
        _consume(bench, outbox, topic, count, "upsert_batch")
        outbox.connection.execute(f"VACUUM (ANALYZE) {PROCESSED}")
        outbox.connection.execute("CHECKPOINT")
        again = []
        for _ in range(bench.scale.rounds):
            again.append(Consumed(**bench.call(consume, url=outbox.url, **_task(topic, count, "upsert_batch"))))
            if again[-1].seen != count:
                raise RuntimeError(f"{again[-1].seen} of {count} events came again")
        _check(outbox, count)
    rate, spread = median_and_spread([one.rate for one in again])
    return [
        Row(
            measure=f"redelivery of {count:,} events that are handled",
            value=rate,
            unit="events/s",
            must=">= 40000",
            detail=f"{spread}; {_cpu(again)} µs of CPU an event; the same consumer with a new group, from the "
            "topic's beginning",
        ),
        Row(
            measure="handlers run on them",
            value=sum(one.handled for one in again),
            unit="",
            must="= 0",
            detail="counted by the handler, and by its effects",
        ),
    ]


# Runs


def _beside_bare(
    bench: Bench, outbox: Outbox, count: int, function: str, bare: Callable[..., dict[str, float]]
) -> list[Pair]:
    """The consumer and a bare loop on the same topic, taking turns."""
    pairs = []
    with _filled_topic(bench, outbox, count) as topic:
        _warm_up(bench, outbox, topic, count, function)
        for _ in range(bench.scale.rounds):
            _reset(outbox)
            ours = _consume(bench, outbox, topic, count, function)
            _reset(outbox)
            where = {"name": NAME, "group_id": uuid.uuid4().hex, "topic": topic, "count": count}
            pairs.append((ours, Consumed(**bench.call(bare, url=outbox.url, **where))))
            _check(outbox, count)
    return pairs


def _warm_up(bench: Bench, outbox: Outbox, topic: str, count: int, function: str) -> None:
    """The first to read a topic waits for the broker, whose machine code is not made yet."""
    _reset(outbox)
    _consume(bench, outbox, topic, count, function)


def _consume(bench: Bench, outbox: Outbox, topic: str, count: int, function: str) -> Consumed:
    ours = Consumed(**bench.call(consume, url=outbox.url, **_task(topic, count, function)))
    if ours.handled != count:
        raise RuntimeError(f"{ours.handled} of {count} events were handled")
    _check(outbox, count)
    return ours


def _task(topic: str, count: int, function: str, group_id: str = "") -> dict[str, Any]:
    """Arguments of the job `consume`; of a group of its own unless `group_id` is given."""
    return {
        "name": NAME,
        "group_id": group_id or uuid.uuid4().hex,
        "topic": topic,
        "count": count,
        "function": function,
        "is_batch": function == "upsert_batch",
    }


def _rate_of_members(bench: Bench, outbox: Outbox, members: int) -> float:
    count, group_id = bench.scale.consumed_waiting, uuid.uuid4().hex
    _reset(outbox)
    with bench.topic() as topic, ThreadPoolExecutor(members) as pool:
        task = _task(topic, count // members, "wait_one_ms", group_id)
        runs = [pool.submit(bench.call, consume, url=outbox.url, **task) for _ in range(members)]
        bench.wait_for_members(group_id, members)
        bench.call(fill, url=outbox.url, topic=topic, count=count, evenly=True)
        parts = [Consumed(**run.result()) for run in runs]
    if sum(part.handled for part in parts) != count:
        raise RuntimeError(f"{[part.handled for part in parts]} of {count} events were handled")
    return count / (max(part.ended for part in parts) - min(part.began for part in parts))


# Rows


def _ratio(measure: str, pairs: Sequence[Pair], *, must: str, baseline: str) -> Row:
    ratio, spread = median_and_spread([ours.rate / bare.rate for ours, bare in pairs])
    rate, _ = median_and_spread([bare.rate for _, bare in pairs])
    return Row(
        measure=measure,
        value=ratio,
        unit="x",
        must=must,
        baseline=f"{baseline}; same batches and client settings; {number(rate)} events/s",
        detail=spread,
    )


def _cost(pairs: Sequence[Pair]) -> str:
    ours, bare = (_cpu(side) for side in zip(*pairs, strict=True))
    return f"{ours} µs of CPU an event, bare {bare}"


def _cpu(runs: Sequence[Consumed]) -> str:
    return number(median_and_spread([run.cpu_seconds / run.seen * 1e6 for run in runs])[0])


# Topics and databases


@contextlib.contextmanager
def _database(bench: Bench, seeds: int = SEEDS) -> Iterator[Outbox]:
    with bench.database() as outbox:
        outbox.seed(min(seeds, bench.scale.consumed_events))
        outbox.connection.execute(MAKE_EFFECTS)
        yield outbox


@contextlib.contextmanager
def _filled_topic(bench: Bench, outbox: Outbox, count: int = 0, *, random_ids: bool = False) -> Iterator[str]:
    with bench.topic() as topic:
        count = count or bench.scale.consumed_events
        bench.call(fill, url=outbox.url, topic=topic, count=count, random_ids=random_ids)
        yield topic


def _reset(outbox: Outbox) -> None:
    """Nothing is handled, and nothing is left for vacuum to do in the midst of a run."""
    outbox.connection.execute(f"TRUNCATE {PROCESSED}, bench_effect")
    outbox.connection.execute(ADD_KEYS)
    outbox.connection.execute(f"VACUUM (ANALYZE) {PROCESSED}, bench_effect")
    outbox.connection.execute("CHECKPOINT")


def _check(outbox: Outbox, count: int) -> None:
    """Each event has had its effect once."""
    ((effects,),) = outbox.connection.execute("SELECT sum(events) FROM bench_effect").fetchall()
    if effects != count:
        raise RuntimeError(f"{effects} effects of {count} events")


def _add_processed(outbox: Outbox, count: int, random_ids: bool) -> None:
    """Add marks as the consumer leaves them. The index is built at once, which takes a tenth of the time."""
    execute = outbox.connection.execute
    ((constraint, definition),) = execute(
        "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = %s::regclass AND contype = 'u'",
        [PROCESSED],
    ).fetchall()
    execute(f"ALTER TABLE {PROCESSED} DROP CONSTRAINT {constraint}")
    event_id = "gen_random_uuid()" if random_ids else "uuidv7(-age)"
    for start in range(0, count, CHUNK):
        execute(
            f"""INSERT INTO {PROCESSED} (consumer, event_id, processed_at)
                SELECT %s, {event_id}, now() - age
                  FROM (SELECT interval '7 days' * (%s - number) / %s AS age
                          FROM generate_series(%s::bigint, %s::bigint) AS number) AS ages""",
            [NAME, count, count, start + 1, min(start + CHUNK, count)],
        )
    execute(f"ALTER TABLE {PROCESSED} ADD CONSTRAINT {constraint} {definition}")


def _settle_marks(outbox: Outbox, count: int) -> int:
    """Effects at nought, the marks vacuumed; the last mark's id."""
    execute = outbox.connection.execute
    execute("TRUNCATE bench_effect")
    execute(f"VACUUM (ANALYZE) {PROCESSED}, bench_effect")
    execute("CHECKPOINT")
    ((last, there),) = execute(f"SELECT max(id), count(*) FROM {PROCESSED}").fetchall()
    if there != count:
        raise RuntimeError(f"{there} processed rows instead of {count}")
    return int(last)
