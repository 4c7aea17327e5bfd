"""Running a consumer: poll a batch, one transaction, commit.

A batch is one database transaction: mark its events processed, run the handlers of those that were not marked yet,
commit; then commit the offsets to Kafka. If anything raises, the transaction is rolled back and the batch redone
one event at a time, so that one bad event costs only itself.
"""

import logging
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from django.db import OperationalError, connection, transaction

from monitoring import metrics

from . import dead_letters
from .catalog import event_types
from .conf import outbox_settings
from .exceptions import PermanentEventError
from .handlers import Consumer, Event, Handler, call_handler
from .kafka import KafkaException
from .membership import ClientBroken, Membership, Stopping
from .models import DeadLetter, ProcessedEvent
from .records import Delivery, Record, UnreadableRecord

logger = logging.getLogger(__name__)

RECONNECT_SECONDS = 1.0
DISTURBED_SECONDS = 0.05
# They say nothing about the event, so trying again costs it no retries: serialization failure, deadlock; server
# shutdown, crash and start, session ended; too many connections.
_DISTURBANCES = frozenset({"40001", "40P01", "57P01", "57P02", "57P03", "57P05", "53300"})
_MAX_DISTURBANCES = 20


class ConsumerStopped(Exception):
    """A consumer with on_failure="stop" met an event that it cannot handle; its offset is not committed."""


class ConsumerProcess:
    """Runs one `Consumer` until told to stop.

    `batch_size`: None takes EVENTS_OUTBOX["CONSUMER_BATCH_SIZE"]. `on_tick` is called at least once a second,
    but for the time that a single handler takes: the sign of life for a health check.
    """

    def __init__(
        self, consumer: Consumer, *, batch_size: int | None = None, on_tick: Callable[[], None] = lambda: None
    ) -> None:
        self.consumer = consumer
        self.group = Membership(consumer, on_tick)
        self._batch_size = batch_size or outbox_settings().CONSUMER_BATCH_SIZE
        self._start_counters()

    def _start_counters(self) -> None:
        """Counters begin at 0: one that is born with its first event shows no increase for it."""
        name = self.consumer.name
        for counter in (metrics.CONSUMER_DUPLICATES, metrics.CONSUMER_SKIPPED, metrics.CONSUMER_RETRIES):
            counter.labels(name)
        for entry in event_types():
            if self.consumer.route(entry.name, entry.version):
                metrics.CONSUMER_HANDLED.labels(name, entry.name)
        for reason in DeadLetter.Reason:
            metrics.CONSUMER_DEAD_LETTERED.labels(name, reason.value)

    def stop(self) -> None:
        """Ask the consumer to stop; safe in a signal handler. The batch in flight is finished or rolled back."""
        self.group.stopping = True

    def run(self, *, until_idle_seconds: float | None = None) -> None:
        """Consume until `stop()`. Brokers and databases that are away are waited for.

        `until_idle_seconds`: return when partitions are assigned and nothing came for so long.
        Raises ConsumerStopped when on_failure="stop" and an event cannot be handled, ImproperlyConfigured when
        librdkafka refuses the Kafka settings.
        """
        while not self.group.stopping:
            self.group.join()
            try:
                self._consume(until_idle_seconds)
                return
            except Stopping:
                return
            except (ClientBroken, KafkaException) as error:
                logger.warning("Kafka client failed, starting a new one", extra={"error": str(error)})
                time.sleep(RECONNECT_SECONDS)
            finally:
                self.group.leave()

    def _consume(self, until_idle_seconds: float | None) -> None:
        last_work = time.monotonic()
        while not self.group.stopping:
            records = self.group.poll_batch(self._batch_size)
            if records:
                self.handle_batch(records)
            self.group.commit()
            if records or not self.group.owned:
                last_work = time.monotonic()
            elif until_idle_seconds is not None and time.monotonic() - last_work >= until_idle_seconds:
                return
            self.group.measure_lag()

    def handle_batch(self, records: Sequence[Record]) -> None:
        """Handle records in order, effectively once, and note their offsets as done.

        Raises ConsumerStopped as `run()` does.
        """
        deliveries = [delivery for record in records if (delivery := self._read(record)) is not None]
        metrics.CONSUMER_SKIPPED.labels(self.consumer.name).inc(len(records) - len(deliveries))
        if deliveries and not self._try_transaction(deliveries):
            self._handle_one_by_one(deliveries)
        for record in records:
            self.group.note_done(record)

    def _read(self, record: Record) -> Delivery | None:
        """Parse a record. None: an event of a type that this consumer has no handler for."""
        try:
            base = record.envelope()
        except UnreadableRecord as error:
            return Delivery(record, record.placeholder_id(), unreadable=error)
        route = self.consumer.route(base.event_type, base.event_version)
        try:
            event = record.event(base)
        except UnreadableRecord as error:
            if route is None and error.reason == DeadLetter.Reason.PAYLOAD_MISMATCH:
                return None
            event_id = uuid.UUID(base.event_id)
            return Delivery(record, event_id, unreadable=error, event_type=base.event_type, tenant_id=base.tenant_id)
        if route is None:
            return None
        return Delivery(
            record,
            event.event_id,
            event=event,
            handler=route.handler,
            event_type=event.event_type,
            tenant_id=event.tenant_id,
        )

    def _try_transaction(self, deliveries: Sequence[Delivery]) -> bool:
        """The fast way: all in one transaction. False: something raised, and nothing was done."""
        try:
            self._transaction(deliveries)
        except (Stopping, ClientBroken):
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
            self.group.breathe()
            if self.group.has_lost(delivery.record):
                continue  # its new owner handles it
            self._handle_alone(delivery)
            self.group.note_done(delivery.record)

    def _handle_alone(self, delivery: Delivery) -> None:
        """One event with its retries; a dead letter when they are used up."""
        for attempts, delay_seconds in enumerate([*self.consumer.retry.delays_seconds(), None], start=1):
            try:
                self._transaction([delivery])
                return
            except (Stopping, ClientBroken):
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
            self.group.wait(delay_seconds)

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
            for new in fresh:
                delivery = self._upcast(new)
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
                call_handler(self.consumer.name, handler, events, between=self.group.breathe)

        self._in_transaction(work)
        self._count_dead_letters(dead)
        for delivery in fresh:
            if delivery.event is not None:
                metrics.CONSUMER_HANDLED.labels(self.consumer.name, delivery.event_type).inc()
        if duplicates := len(deliveries) - len(fresh):
            metrics.CONSUMER_DUPLICATES.labels(self.consumer.name).inc(duplicates)

    def _upcast(self, delivery: Delivery) -> Delivery:
        """In the handler's transaction, since an upcaster that raises is treated as a handler that does."""
        event = delivery.event
        if event is None:
            return delivery
        route = self.consumer.route(event.event_type, event.event_version)
        if route is None or route.version == event.event_version:
            return delivery
        try:
            upcast = delivery.record.event(delivery.record.envelope(), route.version)
        except UnreadableRecord as error:
            return replace(delivery, event=None, unreadable=error)
        return replace(delivery, event=upcast)

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
                self.group.wait(RECONNECT_SECONDS)
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
                self.group.wait(DISTURBED_SECONDS * disturbances)

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
