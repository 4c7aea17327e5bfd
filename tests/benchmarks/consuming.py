"""Jobs of the part `consumer`: a topic is filled, a consumer handles it, a bare loop does the same work.

Both are timed from the first record they have to the last commit: joining the group is not in it. Neither waits for
the broker to have the offsets.
"""

import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

EFFECTS_FILE = "BENCH_EFFECTS"
PARTITIONS = 6
UNTIL_IDLE_SECONDS = 20.0  # a backstop: a run ends when it has what it is there for

MAKE_EFFECTS = "CREATE TABLE bench_effect (key text PRIMARY KEY, events bigint NOT NULL DEFAULT 0)"
ADD_KEYS = "INSERT INTO bench_effect (key) SELECT DISTINCT aggregate_id FROM events_outbox_outboxevent"
UPDATE_ONE = "UPDATE bench_effect SET events = events + 1 WHERE key = %s"
UPSERT = """INSERT INTO bench_effect AS effect (key, events) SELECT * FROM unnest(%s::text[], %s::bigint[])
            ON CONFLICT (key) DO UPDATE SET events = effect.events + excluded.events"""
# As the product's, but that ids stay the text that they are in the event.
MARK = """INSERT INTO events_outbox_processedevent (consumer, event_id)
          SELECT %s, unnest(%s::uuid[]) ON CONFLICT DO NOTHING RETURNING event_id::text"""


# The handlers


def upsert_batch(events: Sequence[Any]) -> None:
    """A batch handler of one upsert: events by tenant and mode."""
    from django.db import connection

    counts = Counter(f"{event.tenant_id} {event.payload.mode}" for event in events)
    with connection.cursor() as cursor:
        cursor.execute(UPSERT, [list(counts), list(counts.values())])


def update_one(event: Any) -> None:
    """A handler of one UPDATE, of the conversation's own row."""
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute(UPDATE_ONE, [event.aggregate_id])


def wait_one_ms(_event: Any) -> None:
    time.sleep(0.001)


# Filling a topic


def fill(topic: str, count: int, *, random_ids: bool = False, evenly: bool = False) -> None:
    """Job: produce so many events to `topic`, as the relay does: copies of the seeds with ids and traces of their own.

    `random_ids`: UUIDv4 instead of the UUIDv7 that emit_event() makes. `evenly`: over the partitions in turn, whatever
    the keys are.
    """
    from confluent_kafka import Producer

    from events_outbox.emit import uuid7
    from events_outbox.kafka import producer_settings
    from events_outbox.proto.base_event_pb2 import BaseEvent
    from tests.benchmarks.relay import records_in_memory

    rng = random.Random(4)
    seeds = [(key, BaseEvent.FromString(value), dict(headers)) for _, key, value, headers in records_in_memory("true")]
    producer = Producer(producer_settings())
    for place in range(count):
        key, base, headers = seeds[place % len(seeds)]
        base.event_id = str(uuid.UUID(int=rng.getrandbits(128), version=4) if random_ids else uuid7())
        headers["event_id"] = base.event_id.encode()
        # As a web request that is not sampled leaves it.
        headers["traceparent"] = f"00-{rng.getrandbits(128):032x}-{rng.getrandbits(64):016x}-00".encode()
        while True:
            try:
                value = base.SerializeToString(deterministic=True)
                where = {"partition": place % PARTITIONS} if evenly else {}
                producer.produce(topic, value, key, headers=headers, **where)
                break
            except BufferError:
                producer.poll(0.05)
        if place % 500 == 0:
            producer.poll(0)
    if remaining := producer.flush(60):
        raise RuntimeError(f"{remaining} events were not delivered")


# The consumer


def consume(name: str, group_id: str, topic: str, count: int, function: str, is_batch: bool) -> dict[str, float]:
    """Job: `ConsumerProcess.run()` until `count` events came, with a function of this module as handler; traced as
    `manage.py consume` is."""
    from events_outbox import Consumer
    from events_outbox.consumer import ConsumerProcess
    from monitoring.tracing import init_tracing, tracing_config

    handled = 0
    do = globals()[function]
    consumer = Consumer(name, group_id=group_id, topics=[topic])

    if is_batch:

        @consumer.handles_batch("*")
        def handle_batch(events):
            nonlocal handled
            handled += len(events)
            do(events)

    else:

        @consumer.handles("*")
        def handle(event):
            nonlocal handled
            handled += 1
            do(event)

    watch = Watch(count)

    class Process(ConsumerProcess):
        def handle_batch(self, records):
            watch.begin()
            super().handle_batch(records)
            if watch.has_all(len(records)):
                self.stop()

    init_tracing(tracing_config())
    Process(consumer).run(until_idle_seconds=UNTIL_IDLE_SECONDS)
    return {**watch.result(), "handled": handled}


class Watch:
    """The clock of a run."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.seen = 0
        self.began = self.ended = self._cpu_began = self._cpu_ended = 0.0

    def begin(self) -> None:
        if not self.began:
            self.began, self._cpu_began = time.time(), time.process_time()

    def has_all(self, seen: int) -> bool:
        self.seen += seen
        self.ended, self._cpu_ended = time.time(), time.process_time()
        return self.seen >= self.count

    def result(self) -> dict[str, float]:
        return {
            "seen": self.seen,
            "began": self.began,
            "ended": self.ended,
            "cpu_seconds": self._cpu_ended - self._cpu_began,
        }


# The bare loops


def bare_batch(name: str, group_id: str, topic: str, count: int) -> dict[str, float]:
    """Job: consume, parse, mark, upsert, commit, with nothing but the client and psycopg."""
    import os

    import psycopg

    with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as connection:

        def work(bases: list[Any], payloads: list[Any]) -> None:
            with connection.transaction(), connection.cursor() as cursor:
                cursor.execute(MARK, [name, [base.event_id for base in bases]])
                new = {event_id for (event_id,) in cursor.fetchall()}
                counts = Counter(
                    f"{base.tenant_id} {payload.mode}"
                    for base, payload in zip(bases, payloads, strict=True)
                    if base.event_id in new
                )
                cursor.execute(UPSERT, [list(counts), list(counts.values())])

        return _bare(group_id, topic, count, work)


def bare_each(name: str, group_id: str, topic: str, count: int) -> dict[str, float]:
    """Job: the same with one UPDATE an event, through Django's connection like the handler's."""
    from django.db import connection, transaction

    def work(bases: list[Any], payloads: list[Any]) -> None:
        with transaction.atomic():
            with connection.cursor() as cursor:
                cursor.execute(MARK, [name, [base.event_id for base in bases]])
                new = {event_id for (event_id,) in cursor.fetchall()}
            for base in bases:
                if base.event_id in new:
                    with connection.cursor() as cursor:
                        cursor.execute(UPDATE_ONE, [base.aggregate_id])

    return _bare(group_id, topic, count, work)


def _bare(group_id: str, topic: str, count: int, work: Callable[[list[Any], list[Any]], None]) -> dict[str, float]:
    from confluent_kafka import TopicPartition

    from events_outbox.proto.base_event_pb2 import BaseEvent
    from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload, MessageSentPayload

    parse = {
        "conversation.created": ConversationCreatedPayload.FromString,
        "conversation.message.sent": MessageSentPayload.FromString,
    }
    watch = Watch(count)
    for client, messages in _batches(group_id, topic):
        watch.begin()
        bases, payloads, done = [], [], {}
        for message in messages:
            base = BaseEvent.FromString(message.value())
            bases.append(base)
            payloads.append(parse[base.event_type](base.payload.value))
            done[message.partition()] = message.offset() + 1
        work(bases, payloads)
        offsets = [TopicPartition(topic, partition, offset) for partition, offset in done.items()]
        client.commit(offsets=offsets, asynchronous=True)
        if watch.has_all(len(messages)):
            client.close()
            break
    return watch.result()


def _batches(group_id: str, topic: str) -> Iterator[tuple[Any, list[Any]]]:
    """The consumer's client and its batches, read as it reads them."""
    from events_outbox.conf import outbox_settings
    from events_outbox.kafka import make_consumer

    size = outbox_settings().CONSUMER_BATCH_SIZE
    client = make_consumer(group_id, lambda _error: None, lambda _error, _offsets: None)
    client.subscribe([topic])
    last = time.monotonic()
    while time.monotonic() - last < UNTIL_IDLE_SECONDS:
        if first := client.poll(0.5):
            messages = [first, *client.consume(size - 1, 0)]
            if error := next((m.error() for m in messages if m.error()), None):
                raise RuntimeError(str(error))
            yield client, messages
            last = time.monotonic()
    raise RuntimeError(f"nothing came for {UNTIL_IDLE_SECONDS:.0f} s")
