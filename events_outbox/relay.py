"""The relay: lead, publish a batch, stop.

One relay leads, any number stand by. The leader reads the next window of committed events, produces a batch, waits
for the broker's acknowledgements and moves the cursor. After a crash between acknowledgement and cursor the batch
is sent again: at least once in Kafka, which the consumers make effectively once.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import psycopg
from opentelemetry import trace
from opentelemetry.propagate import extract
from opentelemetry.trace import Span, SpanKind

from monitoring import metrics

from .catalog import topics
from .conf import outbox_settings
from .exceptions import LeadershipLost
from .kafka import RECORD_REFUSALS, KafkaError, KafkaException, Message, Producer, make_producer
from .leader import Leader, Parked, open_session
from .models import OutboxEvent, RelayCursor
from .records import HEADER_FIELDS, headers_for, trace_carrier
from .window import read_page, take_snapshot, window_ids

logger = logging.getLogger(__name__)
tracer = trace.get_tracer(__name__)

HEARTBEAT_SECONDS = 1.0
STOP_GRACE_SECONDS = 2.0
BEHIND = "behind"

Row = tuple[Any, ...]
"""A row of a page: id, topic, aggregate_id, value, then the header fields."""


class _Abandoned(Exception):
    """The batch in flight was given up, unacknowledged; the cursor still stands before it."""


class Relay:
    """Publishes the outbox to Kafka until told to stop.

    `batch_size`: events between two cursor moves; None takes EVENTS_OUTBOX["BATCH_SIZE"]. `on_tick` is called at
    least once a second while the relay works, also as a standby: the sign of life for a health check.
    """

    def __init__(self, *, batch_size: int | None = None, on_tick: Callable[[], None] = lambda: None) -> None:
        self._conf = outbox_settings()
        self._batch_size = batch_size or self._conf.BATCH_SIZE
        self._on_tick = on_tick
        self._stopping = threading.Event()
        self._producer: Producer | None = None
        self._refused: dict[int, KafkaError] = {}
        self._producer_failure = ""
        self._trouble = ""
        self._last_heartbeat = 0.0
        self._last_redrive_look = 0.0
        # Counters begin at 0: one that is born with its first event shows no increase for it.
        for topic in topics():
            metrics.OUTBOX_PUBLISHED.labels(topic)
            for code in RECORD_REFUSALS:
                metrics.OUTBOX_PUBLISH_FAILURES.labels(topic, KafkaError(code).name())

    def stop(self) -> None:
        """Ask the relay to stop; safe in a signal handler. The batch in flight is finished or abandoned."""
        self._stopping.set()

    def run(self, *, until_empty: bool = False) -> None:
        """Lead or stand by until `stop()`.

        `until_empty`: return once nothing is pending. A database that is away is waited for.
        """
        while not self._stopping.is_set():
            try:
                with open_session() as session:
                    leader = Leader(session)
                    if self._wait_for_lead(leader, until_empty):
                        self._lead(leader, until_empty)
                        if until_empty:
                            return
                    elif until_empty and not self._stopping.is_set():
                        return
            except (psycopg.OperationalError, psycopg.InterfaceError, LeadershipLost) as error:
                logger.warning("database session lost, trying again", extra={"error": str(error).strip()})
                self._pause(self._conf.LEADER_POLL_SECONDS)
            except _Abandoned as error:
                logger.warning("batch abandoned, to be published again", extra={"error": str(error)})
                self._pause(self._conf.LEADER_POLL_SECONDS)
            finally:
                metrics.OUTBOX_RELAY_LEADER.set(0)
                self._drop_producer()

    def _wait_for_lead(self, leader: Leader, until_empty: bool) -> bool:
        """Stand by until the lock is ours (True), or until stopped or, with `until_empty`, nothing is pending."""
        standing_by = False
        while not self._stopping.is_set():
            if leader.try_lead():
                logger.info("this relay leads", extra={"published": str(leader.published)})
                metrics.OUTBOX_RELAY_LEADER.set(1)
                return True
            if not standing_by:
                logger.info("another relay leads, standing by")
                standing_by = True
            if until_empty and not OutboxEvent.objects.pending(RelayCursor.read()).exists():
                return False
            self._pause(self._conf.LEADER_POLL_SECONDS)
        return False

    def _lead(self, leader: Leader, until_empty: bool) -> None:
        idle_seconds = self._conf.IDLE_POLL_MIN_SECONDS
        while not self._stopping.is_set():
            self._redrive(leader)
            if self.publish_window(leader):
                idle_seconds = self._conf.IDLE_POLL_MIN_SECONDS
            elif until_empty:
                leader.save()
                return
            else:
                self._pause(idle_seconds)
                idle_seconds = min(idle_seconds * 2, self._conf.IDLE_POLL_MAX_SECONDS)
            self._heartbeat(leader)

    def publish_window(self, leader: Leader) -> int:
        """Publish the window in progress, or the next one, and return how many events it had.

        Returns early, with the cursor inside the window, when the relay is stopped.
        Raises LeadershipLost when the database session is gone.
        """
        hi = leader.window or take_snapshot(leader.session)
        if hi == leader.published:
            return 0
        count = 0
        ids = window_ids(leader.session, leader.published, hi, leader.window_last_id)
        for batch, is_last in _batches(ids, self._batch_size):
            parked = self._publish(leader, read_page(leader.session, batch), leader.parked_keys)
            count += len(batch)
            if is_last:
                leader.published, leader.window, leader.window_last_id = hi, None, 0
            else:
                leader.window, leader.window_last_id = hi, batch[-1]
            self._save(leader, parked)
            if self._stopping.is_set():
                return count
        leader.published, leader.window, leader.window_last_id = hi, None, 0
        return count

    def publish_again(self, leader: Leader, ids: Iterable[int]) -> int:
        """Publish these events once more, in the order of `ids`, without moving the cursor. Return how many."""
        count = 0
        for batch, _ in _batches([ids], self._batch_size):
            leader.save(self._publish(leader, read_page(leader.session, batch), leader.parked_keys))
            count += len(batch)
        self._drop_producer()
        return count

    def _redrive(self, leader: Leader) -> None:
        """Publish what an operator asked to redrive; looked for once a second."""
        if not leader.parked_keys or time.monotonic() - self._last_redrive_look < HEARTBEAT_SECONDS:
            return
        while rows := leader.redrive_requests(self._batch_size):
            refused = self._publish(leader, rows, set())
            refused_ids = {parked.event_id for parked in refused}
            delivered_ids = [row[0] for row in rows if row[0] not in refused_ids]
            leader.close_redrive(delivered_ids, refused)
            logger.info("redrive done", extra={"delivered": len(delivered_ids), "refused": len(refused)})
        self._last_redrive_look = time.monotonic()

    def _publish(self, leader: Leader, rows: Sequence[Row], blocked: set[tuple[str, str]]) -> list[Parked]:
        """Produce the rows in order and wait for the broker. Return those to park; their keys join `blocked`.

        A broker that is away is waited for. Raises _Abandoned when the relay is stopped meanwhile or the producer
        broke: nothing of the batch counts as published then.
        """
        started = time.perf_counter()
        self._refused.clear()
        producer = self._producer = self._producer or make_producer(self._broker_trouble)
        parked: list[Parked] = []
        with tracer.start_as_current_span("send", kind=SpanKind.CLIENT) as span:
            if span.is_recording():
                _describe(span, rows)
            for row in rows:
                topic, aggregate_id = row[1], row[2]
                if (topic, aggregate_id) in blocked:
                    reason = "behind an earlier undeliverable event of the same key"
                    parked.append(Parked(row[0], topic, aggregate_id, BEHIND, reason))
                    continue
                self._produce(leader, producer, row)
                if row[0] in self._refused:
                    blocked.add((topic, aggregate_id))
            self._flush(leader, producer)

        for row in rows:
            if error := self._refused.get(row[0]):
                blocked.add((row[1], row[2]))
                parked.append(Parked(row[0], row[1], row[2], error.name(), error.str()))
                metrics.OUTBOX_PUBLISH_FAILURES.labels(row[1], error.name()).inc()
                logger.error(
                    "event undeliverable, parked",
                    extra={"outbox_id": row[0], "topic": row[1], "reason": error.name(), "error": error.str()},
                )
        parked.sort(key=lambda p: p.event_id)
        _count_published(rows, parked)
        metrics.OUTBOX_PUBLISH_BATCH_SECONDS.observe(time.perf_counter() - started)
        return parked

    def _produce(self, leader: Leader, producer: Producer, row: Row) -> None:
        outbox_id, topic, aggregate_id, value = row[:4]
        while True:
            try:
                producer.produce(
                    topic,
                    value,
                    aggregate_id,
                    headers=headers_for(row[4:]),
                    on_delivery=partial(self._on_refusal, outbox_id),
                )
                return
            except BufferError:
                # The local queue is full: let the broker take some of it.
                producer.poll(0.1)
                self._while_waiting(leader, producer)
            except KafkaException as error:
                self._on_refusal(outbox_id, error.args[0], None)
                return

    def _flush(self, leader: Leader, producer: Producer) -> None:
        while producer.flush(0.5) and not self._producer_failure:
            self._while_waiting(leader, producer)
        if self._producer_failure:
            self._fail(leader, self._producer_failure)
        leader.last_error = self._trouble = ""

    def _while_waiting(self, leader: Leader, producer: Producer) -> None:
        """The broker is slow or away: stay alive, say so, and give up only when stopped."""
        leader.last_error = self._trouble or "waiting for the broker"
        self._heartbeat(leader)
        if self._producer_failure:
            self._fail(leader, self._producer_failure)
        if self._stopping.is_set() and producer.flush(STOP_GRACE_SECONDS):
            raise _Abandoned("stopped while the broker did not answer")

    def _fail(self, leader: Leader, failure: str) -> None:
        leader.last_error = failure
        self._save(leader)
        raise _Abandoned(failure)

    def _on_refusal(self, outbox_id: int, error: KafkaError, _message: Message | None) -> None:
        """Delivery report of an event that was not delivered (`delivery.report.only.error`)."""
        if error.code() in RECORD_REFUSALS:
            self._refused[outbox_id] = error
        else:
            self._producer_failure = f"{error.name()}: {error.str()}"

    def _broker_trouble(self, error: KafkaError) -> None:
        """librdkafka tells of lost connections and failed logins; it goes on trying by itself."""
        self._trouble = error.str()
        logger.warning("broker trouble", extra={"error_name": error.name(), "error": error.str()})
        if error.fatal():
            self._producer_failure = f"{error.name()}: {error.str()}"

    def _heartbeat(self, leader: Leader) -> None:
        self._on_tick()
        if time.monotonic() - self._last_heartbeat >= HEARTBEAT_SECONDS:
            self._save(leader)

    def _save(self, leader: Leader, parked: Sequence[Parked] = ()) -> None:
        leader.save(parked)
        self._last_heartbeat = time.monotonic()

    def _pause(self, seconds: float) -> None:
        self._on_tick()
        self._stopping.wait(seconds)

    def _drop_producer(self) -> None:
        """Forget the producer and what it still holds: the next leader publishes that from the cursor."""
        if self._producer is not None:
            self._producer.purge()
            self._producer.flush(1.0)
        self._producer = None
        self._producer_failure = ""


def _batches(chunks: Iterable[Iterable[int]], size: int) -> Iterator[tuple[list[int], bool]]:
    """Cut chunks of ids into batches, each with whether it is the last one."""
    ids = (id_ for chunk in chunks for id_ in chunk)
    batch = list(islice(ids, size))
    while batch:
        following = list(islice(ids, size))
        yield batch, not following
        batch = following


def _describe(span: Span, rows: Sequence[Row]) -> None:
    """Messaging attributes of the batch, and links to the requests that emitted its events."""
    span.set_attribute("messaging.system", "kafka")
    span.set_attribute("messaging.operation.name", "send")
    span.set_attribute("messaging.operation.type", "send")
    span.set_attribute("messaging.batch.message_count", len(rows))
    for row in rows:
        carrier = trace_carrier(dict(zip(HEADER_FIELDS, row[4:], strict=True)))
        span.add_link(trace.get_current_span(extract(carrier)).get_span_context())


def _count_published(rows: Sequence[Row], parked: Sequence[Parked]) -> None:
    not_published = {p.event_id for p in parked}
    by_topic: dict[str, int] = {}
    for row in rows:
        if row[0] not in not_published:
            by_topic[row[1]] = by_topic.get(row[1], 0) + 1
    for topic, count in by_topic.items():
        metrics.OUTBOX_PUBLISHED.labels(topic).inc(count)
