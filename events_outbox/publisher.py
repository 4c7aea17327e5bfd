"""Publishing a batch: produce its events in order and wait for the broker's word on each."""

import logging
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from monitoring import metrics
from monitoring.labels import bounded

from .catalog import topics
from .kafka import (
    RECORD_REFUSALS,
    TOPIC_REFUSALS,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    can_publish_to,
    make_producer,
    producer_settings,
)
from .leader import Parked
from .records import HEADER_FIELDS, headers_for
from .trace_context import span_contexts
from .window import Row

logger = logging.getLogger(__name__)
tracer = trace.get_tracer(__name__)

BEHIND = "behind"
WAITING = "waiting for the broker"
FLUSH_SECONDS = 0.5
STUCK_SECONDS = 20.0
"""Without progress for so long, the producer is suspected of having lost a broker that is there."""
BROKEN_SECONDS = 1.0
"""How long a broken producer may take for its last reports; some it never gives."""

_TRACE_FIELDS = ("traceparent", "tracestate")
Key = tuple[str, str]
"""Topic and aggregate id: within it order is kept."""

KEYS_THAT_MEET_EVERY_PARTITION = 10_000
KNOWN_SECONDS = 3600.0


class ProducerBroken(Exception):
    """The producer failed in a way that is not about a record. Nothing of the batch counts as published."""


class ProducerStuck(ProducerBroken):
    """The broker answers others, but not this producer. Be more patient with the next one."""


class Publisher:
    """Owns the producer. `on_wait(what for)` is called every half second while the broker is slow or away.

    What `on_wait` raises ends the waiting: nothing of the batch counts as published then. `patience_seconds`: after
    so long without progress the producer is given up, if the broker answers others.

    Order through refusals: a gapless producer stops at the first record that the broker refuses, so nothing that
    comes after it in its partition gets there. A new producer then publishes what was refused one by one, since a
    request is refused as a whole, and after that the rest of the batch, without the keys that are parked.
    """

    def __init__(self, on_wait: Callable[[str], None], patience_seconds: float = STUCK_SECONDS) -> None:
        self._on_wait = on_wait
        self._patience_seconds = patience_seconds
        self._producer: Producer | None = None
        self._client_id = str(producer_settings()["client.id"])
        self._errors: dict[int, KafkaError] = {}
        self._unsent: set[int] = set()
        self._failed_topics: dict[str, KafkaError] = {}
        self._broken = ""
        self._trouble = ""
        self._known_keys: dict[str, set[bytes]] = defaultdict(set)  # by topic
        self._new_to_broker: Sequence[Row] = []
        self._forgets_keys_at = 0.0
        self._undelivered = 0
        self._stuck_at = float("inf")
        # Counters begin at 0: one that is born with its first event shows no increase for it.
        for topic in topics():
            metrics.OUTBOX_PUBLISHED.labels(topic)
            for code in RECORD_REFUSALS:
                metrics.OUTBOX_PUBLISH_FAILURES.labels(topic, KafkaError(code).name())

    def publish(
        self, rows: Sequence[Row], blocked: set[Key], meanwhile: Callable[[], None] = lambda: None
    ) -> list[Parked]:
        """Publish the rows in order; all are acknowledged on return. Return those to park; their keys join `blocked`.

        Rows of a blocked key are not produced but parked behind it. A broker that is away is waited for. `meanwhile`
        is called while the broker is at work.
        Raises ProducerBroken, and what `on_wait` and `meanwhile` raise.
        """
        if not rows:
            return []
        started = time.perf_counter()
        parking = _Parking(blocked)
        with tracer.start_as_current_span("send", kind=SpanKind.CLIENT) as span:
            try:
                self._produce(rows, parking)
                meanwhile()
                refused, left = self._settle(rows, parking)
                while refused:
                    # The broker refuses a request as a whole: each record of it gets its turn alone.
                    for row in refused:
                        self._publish_alone(row, parking)
                        self._on_wait("publishing one by one after a refusal")  # takes a while: stay alive
                    self._produce(left, parking)
                    refused, left = self._settle(left, parking)
            finally:
                if span.is_recording():
                    _describe(span, self._client_id, rows, parking.parked)
        _count_published(rows, parking.parked)
        metrics.OUTBOX_PUBLISH_BATCH_SECONDS.observe(time.perf_counter() - started)
        return [parking.parked[row[0]] for row in rows if row[0] in parking.parked]

    def _settle(self, rows: Sequence[Row], parking: "_Parking") -> tuple[list[Row], list[Row]]:
        """Wait for the reports on what was produced. Return, each in order, what was refused and what got no turn.

        The events of a topic that is refused are parked. Of a key, what was refused comes before what got no turn.
        """
        self._await_reports()
        self._note_known(parking)
        refused: list[Row] = []
        left: list[Row] = []
        if not self._errors and not self._broken:
            return refused, left
        for row in rows:
            error = self._errors.get(row[0])
            if row[0] in parking.parked:
                continue
            if row[0] in self._unsent:
                left.append(row)
            elif error is not None and error.code() in TOPIC_REFUSALS:
                parking.park(row, error)
            elif error is not None:
                (refused if error.code() in RECORD_REFUSALS else left).append(row)
        if left and not any(error.code() in RECORD_REFUSALS for error in self._errors.values()):
            raise ProducerBroken(self._broken or next(iter(self._errors.values())).str())
        self._forget_attempt()
        return refused or left[:1], left if refused else left[1:]

    def _forget_attempt(self) -> None:
        if self._broken:
            self.close()
        if self._errors:
            self._known_keys.clear()  # what was refused is not known to the broker
        self._errors.clear()
        self._unsent.clear()
        self._failed_topics.clear()

    def _publish_alone(self, row: Row, parking: "_Parking") -> None:
        self._produce([row], parking)
        self._await_reports()
        error = self._errors.get(row[0])
        self._forget_attempt()
        if error is not None and error.code() not in RECORD_REFUSALS:
            raise ProducerBroken(error.str())
        if error is not None and row[0] not in parking.parked:
            parking.park(row, error)

    def _produce(self, rows: Sequence[Row], parking: "_Parking") -> None:
        """Hand the rows to the producer; park those whose key is blocked, and what it refuses on the spot.

        Once something was refused, rows are set aside: they get their turn when it is settled what is parked.
        """
        wave, rest = self._next_wave(rows)
        for part in (wave, rest):
            if part is rest and rest:
                self._await_reports()
                self._note_known(parking)
            if self._errors or self._broken:
                self._unsent.update(row[0] for row in part)
            else:
                self._produce_wave(part, parking)

    def _next_wave(self, rows: Sequence[Row]) -> tuple[Sequence[Row], Sequence[Row]]:
        """Return what goes out now, the first event of each key that is new to this producer, and the rest.

        A broker that holds nothing of a producer in a partition takes any sequence number from it: what is under way
        behind a refused first record would get there, gapless or not. That is over when so many keys of a topic were
        taken that no partition was left out. Brokers forget a producer that is silent for a day.
        """
        if time.monotonic() > self._forgets_keys_at:
            self._known_keys.clear()
            self._forgets_keys_at = time.monotonic() + KNOWN_SECONDS
        enough = {topic for topic, keys in self._known_keys.items() if len(keys) > KEYS_THAT_MEET_EVERY_PARTITION}
        if enough and enough.issuperset({row[1] for row in rows}):
            return rows, []
        first: dict[tuple[str, bytes], Row] = {}
        rest: list[Row] = []
        for row in rows:
            if (
                row[1] in enough
                or row[2] in self._known_keys[row[1]]
                or first.setdefault((row[1], row[2]), row) is not row
            ):
                rest.append(row)
        self._new_to_broker = list(first.values())
        return (self._new_to_broker, rest) if first else (rest, [])

    def _note_known(self, parking: "_Parking") -> None:
        """Of the first events of new keys, those that the broker has taken make their keys known."""
        if not self._errors and not self._broken:
            for row in self._new_to_broker:
                if row[0] not in parking.parked:
                    self._known_keys[row[1]].add(row[2])
        self._new_to_broker = []

    def _produce_wave(self, rows: Sequence[Row], parking: "_Parking") -> None:
        producer = self._producer = self._producer or make_producer(self._on_trouble)
        produce, on_report = producer.produce, self._on_report
        for row in rows:
            if parking.is_needed and parking.blocks(row):
                parking.park_behind(row)
                continue
            if self._failed_topics and row[1] in self._failed_topics:
                self._errors[row[0]] = self._failed_topics[row[1]]
                continue
            while True:
                try:
                    report = partial(on_report, row[0])
                    produce(row[1], row[3], row[2], headers=headers_for(row[4:]), on_delivery=report)
                except BufferError:
                    # The local queue is full: let the broker take some of it.
                    self._poll(FLUSH_SECONDS)
                    self._waiting()
                    continue
                except KafkaException as error:
                    self._not_taken(row, error.args[0], parking)
                break

    def _not_taken(self, row: Row, error: KafkaError, parking: "_Parking") -> None:
        """Refused on the spot: for itself, and the key's next event must not go out; or for its topic; or broken."""
        if error.code() in RECORD_REFUSALS - TOPIC_REFUSALS:
            parking.park(row, error)
            return
        self._errors[row[0]] = error
        if error.code() in TOPIC_REFUSALS:
            self._failed_topics[row[1]] = error
        else:
            self._broken = self._broken or error.str()

    def _await_reports(self) -> None:
        while self._producer is not None and not self._broken:
            try:
                if not self._producer.flush(FLUSH_SECONDS):
                    self._trouble, self._undelivered, self._stuck_at = "", 0, float("inf")
                    return
            except (KafkaException, SystemError) as error:
                self._broken = _reason(error)
            else:
                self._waiting()
        gives_up_at = time.monotonic() + BROKEN_SECONDS
        while self._producer is not None and len(self._producer):
            if time.monotonic() > gives_up_at + BROKEN_SECONDS:
                raise ProducerBroken(
                    f"{self._broken}; and it does not say what became of {len(self._producer)} records"
                )
            if time.monotonic() > gives_up_at:
                self._producer.purge()  # reports what it knows nothing of as purged
            self._poll(0.05)

    def _poll(self, seconds: float) -> None:
        """Serve the producer's callbacks. A fatal error is raised between them: the next call serves the rest."""
        if self._producer is not None:
            try:
                self._producer.poll(seconds)
            except (KafkaException, SystemError) as error:
                self._broken = self._broken or _reason(error)

    def _waiting(self) -> None:
        self._on_wait(self._trouble or WAITING)
        undelivered = len(self._producer or ())
        if undelivered != self._undelivered or not undelivered:
            self._undelivered, self._stuck_at = undelivered, time.monotonic() + self._patience_seconds
        elif time.monotonic() > self._stuck_at:
            # librdkafka can miss that its only broker is back after a clean restart, and never ask it again.
            self._stuck_at = time.monotonic() + self._patience_seconds
            if can_publish_to(topics()):
                raise ProducerStuck("the broker answers others, but not this producer")

    def _on_report(self, outbox_id: int, error: KafkaError, _message: Message | None) -> None:
        """Delivery report of an event that was not delivered (`delivery.report.only.error`)."""
        self._errors[outbox_id] = error

    def _on_trouble(self, error: KafkaError) -> None:
        """librdkafka tells of lost connections and failed logins; it goes on trying by itself."""
        self._trouble = error.str()
        logger.warning("broker trouble", extra={"error_name": error.name(), "error": error.str()})

    def close(self) -> None:
        """Forget the producer and what it still holds; the next `publish()` makes a new one."""
        if self._producer is not None:
            self._producer.purge()
            self._poll(0)
        self._producer = None
        self._broken = ""
        self._known_keys.clear()


class _Parking:
    """What of a batch is parked, and which keys and topics are closed to the rest of it."""

    def __init__(self, blocked: set[Key]) -> None:
        self.parked: dict[int, Parked] = {}
        self.is_needed = bool(blocked)
        self._blocked = blocked
        self._refused_topics: dict[str, KafkaError] = {}

    def blocks(self, row: Row) -> bool:
        return row[1] in self._refused_topics or _key(row) in self._blocked

    def park_behind(self, row: Row) -> None:
        if _key(row) in self._blocked:
            reason = "behind an earlier undeliverable event of the same key"
            self.parked[row[0]] = Parked(row[0], *_key(row), BEHIND, reason)
        else:
            self.park(row, self._refused_topics[row[1]])

    def park(self, row: Row, error: KafkaError) -> None:
        if _key(row) in self._blocked:
            self.park_behind(row)
            return
        self._blocked.add(_key(row))
        self.is_needed = True
        if error.code() in TOPIC_REFUSALS:
            # All its events of this batch: permission given in the midst of it must not let a later one through.
            self._refused_topics[row[1]] = error
        self.parked[row[0]] = Parked(row[0], *_key(row), error.name(), error.str())
        metrics.OUTBOX_PUBLISH_FAILURES.labels(bounded("topic", row[1]), error.name()).inc()
        logger.error(
            "event undeliverable, parked",
            extra={"outbox_id": row[0], "topic": row[1], "reason": error.name(), "error": error.str()},
        )


def _key(row: Row) -> Key:
    return row[1], row[2].decode()


def _reason(error: BaseException) -> str:
    """What a fatal error says; the client library may wrap it while it serves its callbacks."""
    while isinstance(error, SystemError) and error.__cause__ is not None:
        error = error.__cause__
    return error.args[0].str() if isinstance(error, KafkaException) else str(error)


def _describe(span: Span, client_id: str, rows: Sequence[Row], parked: dict[int, Parked]) -> None:
    """Messaging attributes of the batch, and links to the requests that emitted its events."""
    topics_of_batch = {row[1] for row in rows}
    if len(topics_of_batch) == 1:
        span.update_name(f"send {rows[0][1]}")
        span.set_attribute("messaging.destination.name", rows[0][1])
    span.set_attribute("messaging.system", "kafka")
    span.set_attribute("messaging.client.id", client_id)
    span.set_attribute("messaging.operation.name", "send")
    span.set_attribute("messaging.operation.type", "send")
    span.set_attribute("messaging.batch.message_count", len(rows))
    refused = [one for one in parked.values() if one.reason != BEHIND]
    if refused:
        span.set_attribute("error.type", refused[0].reason)
        span.set_status(Status(StatusCode.ERROR, f"{len(refused)} of {len(rows)} events undeliverable"))
    # Links are dear: not for the many batches that nobody is going to see.
    if span.get_span_context().trace_flags.sampled or refused or sys.exception():
        for ids in span_contexts(_trace_carrier(row) for row in rows):
            span.add_link(ids)


def _trace_carrier(row: Row) -> dict[str, str]:
    return {name: value.decode() for name, value in zip(HEADER_FIELDS, row[4:], strict=True) if name in _TRACE_FIELDS}


def _count_published(rows: Sequence[Row], parked: dict[int, Parked]) -> None:
    by_topic: dict[str, int] = {}
    for row in rows:
        if row[0] not in parked:
            by_topic[row[1]] = by_topic.get(row[1], 0) + 1
    for topic, count in by_topic.items():
        metrics.OUTBOX_PUBLISHED.labels(bounded("topic", topic)).inc(count)
