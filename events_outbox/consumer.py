"""Running a consumer: poll a batch, one transaction, commit.

A batch is one database transaction: mark its events processed, run the handlers of those that were not marked yet,
commit; then commit the offsets to Kafka. If anything raises, the transaction is rolled back and the batch redone
one event at a time, so that one bad event costs only itself.
"""

import logging
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from typing import Any, cast

from django.db import OperationalError, connection, transaction

from monitoring import metrics

from . import dead_letters
from .catalog import event_types
from .conf import outbox_settings
from .exceptions import PermanentEventError
from .handlers import Consumer, Event, Handler, call_handler
from .kafka import Consumer as KafkaClient
from .kafka import KafkaError, KafkaException, Message, TopicPartition, make_consumer
from .models import DeadLetter, ProcessedEvent
from .records import Delivery, Record, UnreadableRecord

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
RECONNECT_SECONDS = 1.0
LEAVE_SECONDS = 5.0
LAG_SECONDS = 2.0
DISTURBED_SECONDS = 0.05
# They say nothing about the event, so trying again costs it no retries: serialization failure, deadlock; server
# shutdown, crash and start, session ended; too many connections.
_DISTURBANCES = frozenset({"40001", "40P01", "57P01", "57P02", "57P03", "57P05", "53300"})
_MAX_DISTURBANCES = 20

Partition = tuple[str, int]


class ConsumerStopped(Exception):
    """A consumer with on_failure="stop" met an event that it cannot handle; its offset is not committed."""


class _Stopping(Exception):
    """Told to stop while waiting; the work in flight is not done."""


class _ClientBroken(Exception):
    """The Kafka client failed while waiting; the work in flight is not done. A new client begins at its offsets."""


class ConsumerProcess:
    """Runs one `Consumer` until told to stop.

    `batch_size`: None takes EVENTS_OUTBOX["CONSUMER_BATCH_SIZE"]. `on_tick` is called at least once a second,
    but for the time that a single handler takes: the sign of life for a health check.
    """

    def __init__(
        self, consumer: Consumer, *, batch_size: int | None = None, on_tick: Callable[[], None] = lambda: None
    ) -> None:
        self.consumer = consumer
        self._batch_size = batch_size or outbox_settings().CONSUMER_BATCH_SIZE
        self._on_tick = on_tick
        # A plain flag: an Event's lock can be held by the very wait that a signal handler interrupts.
        self._stopping = False
        self._client: KafkaClient | None = None
        self._owned: set[Partition] = set()
        # Partitions lost since the batch began. One that comes back begins again at its committed offset, so the
        # batch must leave it alone: its own idea of what is done there would run ahead of that.
        self._gone: set[Partition] = set()
        self._done: dict[Partition, int] = {}
        self._held: list[Message] = []
        self._last_poll = self._last_lag = 0.0
        self._start_counters()

    def _start_counters(self) -> None:
        """Counters begin at 0: one that is born with its first event shows no increase for it."""
        name = self.consumer.name
        for counter in (metrics.CONSUMER_DUPLICATES, metrics.CONSUMER_SKIPPED, metrics.CONSUMER_RETRIES):
            counter.labels(name)
        for entry in event_types():
            if self.consumer.handler_for(entry.name):
                metrics.CONSUMER_HANDLED.labels(name, entry.name)
        for reason in DeadLetter.Reason:
            metrics.CONSUMER_DEAD_LETTERED.labels(name, reason.value)

    def stop(self) -> None:
        """Ask the consumer to stop; safe in a signal handler. The batch in flight is finished or rolled back."""
        self._stopping = True

    def run(self, *, until_idle_seconds: float | None = None) -> None:
        """Consume until `stop()`. Brokers and databases that are away are waited for.

        `until_idle_seconds`: return when partitions are assigned and nothing came for so long.
        Raises ConsumerStopped when on_failure="stop" and an event cannot be handled.
        """
        while not self._stopping:
            self._client = make_consumer(self.consumer.group_id, self._broker_trouble, self._on_commit)
            try:
                self._client.subscribe(
                    self.consumer.topics, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
                )
                self._consume(until_idle_seconds)
                return
            except _Stopping:
                return
            except (KafkaException, _ClientBroken) as error:
                logger.warning("Kafka client failed, starting a new one", extra={"error": str(error)})
                time.sleep(RECONNECT_SECONDS)
            finally:
                self._leave(self._client)
                self._client = None
                self._owned.clear()
                self._done.clear()
                self._held.clear()

    def _leave(self, client: KafkaClient) -> None:
        """Leave the group. A broker that is frozen is not waited for: it drops the member by itself."""
        leaving = threading.Thread(target=client.close, name="leave-group", daemon=True)
        leaving.start()
        leaving.join(LEAVE_SECONDS)

    def _consume(self, until_idle_seconds: float | None) -> None:
        last_work = time.monotonic()
        while not self._stopping:
            records = self.poll_batch()
            if records:
                self.handle_batch(records)
                self._commit(self._require_client(), {_partition(record) for record in records})
            if records or not self._owned:
                last_work = time.monotonic()
            elif until_idle_seconds is not None and time.monotonic() - last_work >= until_idle_seconds:
                return
            self._on_tick()
            self._measure_lag()

    # -- reading -------------------------------------------------------------------------------------------------

    def poll_batch(self) -> list[Record]:
        """Return the next records, at most a batch; none when nothing came within half a second.

        Raises KafkaException when the client is broken beyond repair.
        """
        client = self._require_client()
        held, self._held = self._held, []
        messages = [m for m in held if self._owns(m)]
        if not messages:
            first = client.poll(POLL_SECONDS)
            if first is not None:
                # consume(n, t) would wait the whole t when fewer than n are there.
                messages = [first, *client.consume(self._batch_size - 1, 0)]
        self._last_poll = time.monotonic()
        return [_record(m) for m in messages if self._is_good(m) and self._owns(m)]

    def _is_good(self, message: Message) -> bool:
        error = message.error()
        if error is None:
            return True
        if error.fatal():
            raise KafkaException(error)
        if error.code() != KafkaError._PARTITION_EOF:
            logger.warning("record not read", extra={"error_name": error.name(), "error": error.str()})
        return False

    def _owns(self, message: Message) -> bool:
        # A rebalance inside poll() may have taken the partition of a message that was fetched before.
        return (message.topic(), message.partition()) in self._owned or message.error() is not None

    def _on_assign(self, _client: KafkaClient, partitions: list[TopicPartition]) -> None:
        self._owned |= {(p.topic, p.partition) for p in partitions}
        logger.info("partitions assigned", extra={"partitions": [f"{p.topic}/{p.partition}" for p in partitions]})

    def _on_revoke(self, client: KafkaClient, partitions: list[TopicPartition]) -> None:
        revoked = {(p.topic, p.partition) for p in partitions}
        self._commit(client, revoked)
        self._forget(revoked)
        logger.info("partitions revoked", extra={"partitions": [f"{t}/{p}" for t, p in sorted(revoked)]})

    def _on_lost(self, _client: KafkaClient, partitions: list[TopicPartition]) -> None:
        # Another member has them by now: committing would move its offsets.
        self._forget({(p.topic, p.partition) for p in partitions})
        logger.warning("partitions lost", extra={"partitions": [f"{p.topic}/{p.partition}" for p in partitions]})

    def _forget(self, partitions: set[Partition]) -> None:
        self._owned -= partitions
        self._gone |= partitions
        self._held = [m for m in self._held if (m.topic(), m.partition()) not in partitions]
        for topic, partition in partitions:
            self._done.pop((topic, partition), None)
            metrics.CONSUMER_LAG.remove(self.consumer.name, topic, str(partition))

    def _broker_trouble(self, error: KafkaError) -> None:
        logger.warning("broker trouble", extra={"error_name": error.name(), "error": error.str()})

    # -- handling ------------------------------------------------------------------------------------------------

    def handle_batch(self, records: Sequence[Record]) -> None:
        """Handle records in order, effectively once, and note their offsets as done.

        Raises ConsumerStopped as `run()` does.
        """
        self._gone.clear()
        deliveries = [delivery for record in records if (delivery := self._read(record)) is not None]
        metrics.CONSUMER_SKIPPED.labels(self.consumer.name).inc(len(records) - len(deliveries))
        if deliveries and not self._try_transaction(deliveries):
            self._handle_one_by_one(deliveries)
        for record in records:
            self._note_done(record)

    def _read(self, record: Record) -> Delivery | None:
        """Parse a record. None: an event of a type that this consumer has no handler for."""
        try:
            base = record.envelope()
        except UnreadableRecord as error:
            return Delivery(record, record.placeholder_id(), unreadable=error)
        handler = self.consumer.handler_for(base.event_type)
        try:
            event = record.event(base)
        except UnreadableRecord as error:
            if handler is None and error.reason == DeadLetter.Reason.PAYLOAD_MISMATCH:
                return None
            event_id = uuid.UUID(base.event_id)
            return Delivery(record, event_id, unreadable=error, event_type=base.event_type, tenant_id=base.tenant_id)
        if handler is None:
            return None
        return Delivery(
            record,
            event.event_id,
            event=event,
            handler=handler,
            event_type=event.event_type,
            tenant_id=event.tenant_id,
        )

    def _try_transaction(self, deliveries: Sequence[Delivery]) -> bool:
        """The fast way: all in one transaction. False: something raised, and nothing was done."""
        try:
            self._transaction(deliveries)
        except (_Stopping, _ClientBroken):
            raise
        except Exception as error:
            logger.info(
                "batch rolled back, going on event by event",
                extra={"events": len(deliveries), "error": f"{type(error).__name__}: {error}"},
            )
            return False
        return True

    def _handle_one_by_one(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self._breathe()
            if _partition(delivery.record) in self._gone:
                continue  # its new owner handles it
            self._handle_alone(delivery)
            self._note_done(delivery.record)

    def _handle_alone(self, delivery: Delivery) -> None:
        """One event with its retries; a dead letter when they are used up."""
        for attempts, delay_seconds in enumerate([*self.consumer.retry.delays_seconds(), None], start=1):
            try:
                self._transaction([delivery])
                return
            except (_Stopping, _ClientBroken):
                raise
            except Exception as error:
                permanent = isinstance(error, PermanentEventError)
                if permanent or delay_seconds is None:
                    self._give_up(delivery, error, attempts, permanent)
                    return
                metrics.CONSUMER_RETRIES.labels(self.consumer.name).inc()
                logger.warning(
                    "handler failed, trying again",
                    extra={
                        **_fields(delivery),
                        "attempt": attempts,
                        "delay_seconds": delay_seconds,
                        "error": f"{type(error).__name__}: {error}",
                    },
                )
            self._wait(delay_seconds)

    def _give_up(self, delivery: Delivery, error: Exception, attempts: int, permanent: bool) -> None:
        logger.error("event not handled", extra={**_fields(delivery), "attempts": attempts}, exc_info=error)
        if self.consumer.on_failure == "stop":
            raise ConsumerStopped(f"{delivery.event_type} {delivery.event_id}: {error}") from error
        reason = DeadLetter.Reason.PERMANENT if permanent else DeadLetter.Reason.FAILED

        def keep() -> None:
            if self._mark_processed([delivery]):
                dead_letters.keep(
                    self.consumer.name,
                    delivery,
                    reason,
                    f"{type(error).__name__}: {error}",
                    traceback_text="".join(traceback.format_exception(error)),
                    attempts=attempts,
                )

        self._in_transaction(keep)
        self._count_dead_letters([reason])

    def _transaction(self, deliveries: Sequence[Delivery]) -> None:
        """Mark, handle the new ones, commit."""
        dead: list[DeadLetter.Reason] = []
        fresh: list[Delivery] = []

        def work() -> None:
            dead.clear()
            fresh[:] = self._mark_processed(deliveries)
            parked = dead_letters.parked_keys(self.consumer, fresh)
            handled = []
            for delivery in fresh:
                if delivery.unreadable is not None:
                    reason, text = delivery.unreadable.reason, str(delivery.unreadable)
                elif (delivery.record.topic, delivery.record.key) in parked:
                    reason, text = DeadLetter.Reason.BEHIND, "behind an earlier dead letter of the same key"
                else:
                    handled.append(delivery)
                    continue
                dead_letters.keep(self.consumer.name, delivery, reason, text)
                dead.append(reason)
                if self.consumer.on_failure == "park_key":
                    parked.add((delivery.record.topic, delivery.record.key))
            for handler, events in _calls(handled):
                call_handler(self.consumer.name, handler, events, between=self._breathe)

        self._in_transaction(work)
        self._count_dead_letters(dead)
        for delivery in fresh:
            if delivery.event is not None:
                metrics.CONSUMER_HANDLED.labels(self.consumer.name, delivery.event_type).inc()
        if duplicates := len(deliveries) - len(fresh):
            metrics.CONSUMER_DUPLICATES.labels(self.consumer.name).inc(duplicates)

    def _in_transaction(self, work: Callable[[], None]) -> None:
        """Run `work` in one transaction; wait for a database that is away, repeat what was merely disturbed.

        A connection lost in the middle is only a disturbance so often: an event whose handling ends the connection
        each time must not block its partition for ever.
        """
        disturbances = 0
        while True:
            try:
                connection.ensure_connection()
            except OperationalError as error:
                logger.warning("database away, waiting", extra={"error": str(error).strip()})
                self._wait(RECONNECT_SECONDS)
                continue
            try:
                with transaction.atomic():
                    work()
                    with connection.cursor() as cursor:
                        # A handler that swallowed a database error has broken the transaction: its commit would
                        # be a silent rollback of the whole batch. This raises then.
                        cursor.execute("SELECT 1")
                return
            except OperationalError as error:
                if not _is_disturbance(error) or disturbances == _MAX_DISTURBANCES:
                    raise
                disturbances += 1
                logger.warning("transaction disturbed, repeating it", extra={"error": str(error).strip()})
                self._wait(DISTURBED_SECONDS * disturbances)

    def _mark_processed(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Insert the processed marks; return the deliveries that had none, each event once, in order."""
        new = ProcessedEvent.objects.mark(self.consumer.name, [delivery.event_id for delivery in deliveries])
        fresh = []
        for delivery in deliveries:
            if delivery.event_id in new:
                new.discard(delivery.event_id)
                fresh.append(delivery)
        return fresh

    def _count_dead_letters(self, reasons: Sequence[DeadLetter.Reason]) -> None:
        for reason in reasons:
            metrics.CONSUMER_DEAD_LETTERED.labels(self.consumer.name, reason.value).inc()

    # -- offsets and waiting -------------------------------------------------------------------------------------

    def _note_done(self, record: Record) -> None:
        if _partition(record) not in self._gone:
            self._done[_partition(record)] = record.offset + 1

    def _commit(self, client: KafkaClient, partitions: set[Partition]) -> None:
        """Send the offsets of what is done, without waiting: a broker that is frozen must not freeze us.

        It goes out ahead of what follows, such as leaving the group. Whatever fails costs a redelivery, which the
        processed marks absorb.
        """
        offsets = [TopicPartition(t, p, self._done[t, p]) for t, p in partitions if (t, p) in self._done]
        if not offsets:
            return
        try:
            client.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:
            self._on_commit(error.args[0], offsets)

    def _on_commit(self, error: KafkaError | None, offsets: list[TopicPartition]) -> None:
        errors = [error, *(offset.error for offset in offsets)]
        if failed := next((e for e in errors if e is not None), None):
            logger.warning("offsets not committed", extra={"error": failed.str()})

    def _breathe(self) -> None:
        """Between events: show life, and poll often enough to stay in the group. Raises _Stopping."""
        if time.monotonic() - self._last_poll > 1:
            self._wait(0)

    def _wait(self, seconds: float) -> None:
        """Wait without leaving the group: partitions are paused and polling goes on.

        Raises _Stopping when told to stop, _ClientBroken when the client fails.
        """
        deadline = time.monotonic() + seconds
        try:
            self._pause()
            try:
                while True:
                    if self._stopping:
                        raise _Stopping
                    self._poll_paused(min(max(deadline - time.monotonic(), 0), POLL_SECONDS))
                    self._on_tick()
                    if time.monotonic() >= deadline:
                        return
            finally:
                if self._client is not None:
                    self._client.resume(self._client.assignment())
        except KafkaException as error:
            raise _ClientBroken(str(error)) from error

    def _pause(self) -> None:
        if self._client is not None:
            self._client.pause(self._client.assignment())

    def _poll_paused(self, seconds: float) -> None:
        if self._client is None:
            time.sleep(seconds)
        elif (message := self._client.poll(seconds)) is not None:
            self._held.append(message)  # of a partition that was assigned during the wait
            self._pause()
        self._last_poll = time.monotonic()

    def _measure_lag(self) -> None:
        if time.monotonic() - self._last_lag < LAG_SECONDS or not self._owned:
            return
        self._last_lag = time.monotonic()
        client = self._require_client()
        for position in client.position([TopicPartition(t, p) for t, p in sorted(self._owned)]):
            _, high = client.get_watermark_offsets(position, cached=True)
            if position.offset >= 0 and high >= 0:
                metrics.CONSUMER_LAG.labels(self.consumer.name, position.topic, str(position.partition)).set(
                    max(high - position.offset, 0)
                )

    def _require_client(self) -> KafkaClient:
        if self._client is None:
            raise RuntimeError("the consumer is not running")
        return self._client


def _record(message: Message) -> Record:
    try:
        headers = cast("list[tuple[str, bytes | None]]", message.headers() or [])
    except (SystemError, UnicodeDecodeError):
        headers = []  # a name that is not UTF-8: the client cannot show them, but key and value are there
    # A consumed message has a place; only its type allows for one that has none.
    return Record(
        topic=message.topic() or "",
        partition=cast(int, message.partition()),
        offset=cast(int, message.offset()),
        key=message.key(),
        value=message.value(),
        headers=headers,
        timestamp_ms=message.timestamp()[1],
    )


def _partition(record: Record) -> Partition:
    return record.topic, record.partition


def _fields(delivery: Delivery) -> dict[str, Any]:
    return {
        "event_id": str(delivery.event_id),
        "event_type": delivery.event_type,
        "tenant_id": delivery.tenant_id,
        "place": f"{delivery.record.topic}/{delivery.record.partition}/{delivery.record.offset}",
    }


def _calls(deliveries: Sequence[Delivery]) -> list[tuple[Handler, list[Event]]]:
    """Group events into handler calls, as large as the order of each key allows.

    Within a key the calls follow the order of the events. Events of different keys owe each other no order, so a
    key's next event may join a call that stands later than its previous one's, never an earlier one.
    """
    calls: dict[tuple[int, Handler], list[Event]] = {}
    last: dict[tuple[str, bytes | None], tuple[int, Handler]] = {}
    for delivery in deliveries:
        assert delivery.event is not None and delivery.handler is not None  # noqa: S101  (narrowing)
        key = (delivery.record.topic, delivery.record.key)
        wave, handler = last.get(key, (0, delivery.handler))
        if handler is not delivery.handler:
            wave += 1
        last[key] = (wave, delivery.handler)
        calls.setdefault((wave, delivery.handler), []).append(delivery.event)
    return [(handler, events) for (_, handler), events in sorted(calls.items(), key=lambda call: call[0][0])]


def _is_disturbance(error: OperationalError) -> bool:
    """Whether the error speaks of the connection or of other transactions, and not of this one's statements.

    The connection itself cannot be asked: leaving the block, Django has replaced it already.
    """
    state = getattr(error.__cause__, "sqlstate", None)
    return state is None or state.startswith("08") or state in _DISTURBANCES
