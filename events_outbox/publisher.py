"""Publishing a batch: produce its events in order and wait for the broker's word on each."""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from opentelemetry import trace
from opentelemetry.propagate import extract
from opentelemetry.trace import Span, SpanKind

from monitoring import metrics

from .catalog import topics
from .kafka import RECORD_REFUSALS, KafkaError, KafkaException, Message, Producer, make_producer
from .leader import Parked
from .records import HEADER_FIELDS, headers_for, trace_carrier

logger = logging.getLogger(__name__)
tracer = trace.get_tracer(__name__)

BEHIND = "behind"
FLUSH_SECONDS = 0.5

Row = tuple[Any, ...]
"""A row of a page: id, topic, aggregate_id, value, then the header fields."""
Key = tuple[str, str]
"""Topic and aggregate id: within it order is kept."""


class ProducerBroken(Exception):
    """The producer failed in a way that is not about a record. Nothing of the batch counts as published."""


class Publisher:
    """Owns the producer. `on_wait(what for)` is called every half second while the broker is slow or away.

    What `on_wait` raises ends the waiting: nothing of the batch counts as published then.
    """

    def __init__(self, on_wait: Callable[[str], None]) -> None:
        self._on_wait = on_wait
        self._producer: Producer | None = None
        self._refused: dict[int, KafkaError] = {}
        self._failure = ""
        self._trouble = ""
        # Counters begin at 0: one that is born with its first event shows no increase for it.
        for topic in topics():
            metrics.OUTBOX_PUBLISHED.labels(topic)
            for code in RECORD_REFUSALS:
                metrics.OUTBOX_PUBLISH_FAILURES.labels(topic, KafkaError(code).name())

    def publish(self, rows: Sequence[Row], blocked: set[Key]) -> list[Parked]:
        """Publish the rows in order. Return, in order, those to park; their keys join `blocked`.

        Rows of a blocked key are not produced but parked behind it. A broker that is away is waited for.
        Raises ProducerBroken, and what `on_wait` raises.
        """
        started = time.perf_counter()
        parked: dict[int, Parked] = {}
        with tracer.start_as_current_span("send", kind=SpanKind.CLIENT) as span:
            if span.is_recording():
                _describe(span, rows)
            refused = self._publish_in_order(rows, blocked, parked)
            # What was too large may have been the batch it was in, so each gets its turn alone.
            alone = [row for row in refused if self._refused[row[0]].code() == KafkaError.MSG_SIZE_TOO_LARGE]
            self._park([row for row in refused if row not in alone], blocked, parked)
            for row in alone:
                self._park(self._publish_in_order([row], blocked, parked), blocked, parked)
        _count_published(rows, parked)
        metrics.OUTBOX_PUBLISH_BATCH_SECONDS.observe(time.perf_counter() - started)
        return [parked[row[0]] for row in rows if row[0] in parked]

    def _publish_in_order(self, rows: Sequence[Row], blocked: set[Key], parked: dict[int, Parked]) -> list[Row]:
        """Produce and flush; return the rows that were refused, in order."""
        self._refused.clear()
        for row in rows:
            outbox_id, topic, aggregate_id = row[:3]
            if (topic, aggregate_id) in blocked:
                reason = "behind an earlier undeliverable event of the same key"
                parked[outbox_id] = Parked(outbox_id, topic, aggregate_id, BEHIND, reason)
                continue
            self._produce(row)
            if outbox_id in self._refused:  # refused on the spot: the key's next event must not go out
                self._park([row], blocked, parked)
        self._flush()
        return [row for row in rows if row[0] in self._refused and row[0] not in parked]

    def _park(self, rows: Sequence[Row], blocked: set[Key], parked: dict[int, Parked]) -> None:
        for outbox_id, topic, aggregate_id, *_ in rows:
            error = self._refused[outbox_id]
            blocked.add((topic, aggregate_id))
            parked[outbox_id] = Parked(outbox_id, topic, aggregate_id, error.name(), error.str())
            metrics.OUTBOX_PUBLISH_FAILURES.labels(topic, error.name()).inc()
            logger.error(
                "event undeliverable, parked",
                extra={"outbox_id": outbox_id, "topic": topic, "reason": error.name(), "error": error.str()},
            )

    def _produce(self, row: Row) -> None:
        outbox_id, topic, aggregate_id, value = row[:4]
        producer = self._producer = self._producer or make_producer(self._on_trouble)
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
                producer.poll(FLUSH_SECONDS)
                self._waiting()
            except KafkaException as error:
                self._on_refusal(outbox_id, error.args[0], None)
                return

    def _flush(self) -> None:
        while self._producer is not None and self._producer.flush(FLUSH_SECONDS):
            self._waiting()
        self._raise_failure()
        self._trouble = ""

    def _waiting(self) -> None:
        self._raise_failure()
        self._on_wait(self._trouble or "waiting for the broker")

    def _raise_failure(self) -> None:
        if self._failure:
            raise ProducerBroken(self._failure)

    def _on_refusal(self, outbox_id: int, error: KafkaError, _message: Message | None) -> None:
        """Delivery report of an event that was not delivered (`delivery.report.only.error`)."""
        if error.code() in RECORD_REFUSALS:
            self._refused[outbox_id] = error
        else:
            self._failure = f"{error.name()}: {error.str()}"

    def _on_trouble(self, error: KafkaError) -> None:
        """librdkafka tells of lost connections and failed logins; it goes on trying by itself."""
        self._trouble = error.str()
        logger.warning("broker trouble", extra={"error_name": error.name(), "error": error.str()})
        if error.fatal():
            self._failure = f"{error.name()}: {error.str()}"

    def close(self) -> None:
        """Forget the producer and what it still holds; the next `publish()` makes a new one."""
        if self._producer is not None:
            self._producer.purge()
            self._producer.flush(1.0)
        self._producer = None
        self._failure = ""


def _describe(span: Span, rows: Sequence[Row]) -> None:
    """Messaging attributes of the batch, and links to the requests that emitted its events."""
    span.set_attribute("messaging.system", "kafka")
    span.set_attribute("messaging.operation.name", "send")
    span.set_attribute("messaging.operation.type", "send")
    span.set_attribute("messaging.batch.message_count", len(rows))
    for row in rows:
        carrier = trace_carrier(dict(zip(HEADER_FIELDS, row[4:], strict=True)))
        span.add_link(trace.get_current_span(extract(carrier)).get_span_context())


def _count_published(rows: Sequence[Row], parked: dict[int, Parked]) -> None:
    by_topic: dict[str, int] = {}
    for row in rows:
        if row[0] not in parked:
            by_topic[row[1]] = by_topic.get(row[1], 0) + 1
    for topic, count in by_topic.items():
        metrics.OUTBOX_PUBLISHED.labels(topic).inc(count)
