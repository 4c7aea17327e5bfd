"""Running a consumer: poll a batch, one transaction, commit.

A batch is one database transaction: mark its events processed, run the handlers of those that were not marked yet,
commit; then commit the offsets to Kafka. If anything raises, the transaction is rolled back and the batch redone
one event at a time, so that one bad event costs only itself.
"""

import logging
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from django.db import InternalError, OperationalError, connection

from monitoring import metrics

from . import dead_letters, letter_actions, pauses
from .catalog import event_types
from .conf import outbox_settings
from .consumer_spans import trace_failure
from .exceptions import PermanentEventError
from .guard import Guard
from .handlers import Consumer, Event, Handler, call_handler
from .heartbeats import Kind, State, Vitals
from .kafka import KafkaException
from .membership import ClientBroken, Membership, Stopping
from .models import DeadLetter, ProcessedEvent
from .records import Delivery, Record, UnreadableRecord
from .transactions import in_transaction, is_disturbance

logger = logging.getLogger(__name__)

T = TypeVar("T")

RECONNECT_SECONDS = 1.0
DISTURBED_SECONDS = 0.05
PAUSE_SECONDS = 1.0
RELEASE_SECONDS = 2.0
_MAX_DISTURBANCES = 20


class ConsumerStopped(Exception):
    """A consumer with on_failure="stop" met an event that it cannot handle; its offset is not committed."""


class ConsumerPaused(Exception):
    """The failure guard has paused the consumer; what is not done is to be handled when it is resumed."""


class TooManyFailures(Exception):
    """A batch holds more dead letters than the guard allows: go on one by one, so that it stops at the right one."""


class ConsumerProcess:
    """Runs one `Consumer` until told to stop.

    `batch_size`: None takes the consumer's, else EVENTS_OUTBOX["CONSUMER_BATCH_SIZE"]. `on_tick` is called at least
    once a second, but for the time that a single handler takes: the sign of life for a health check. `vitals`: what
    it says of itself, for whoever writes it down.
    """

    def __init__(
        self,
        consumer: Consumer,
        *,
        batch_size: int | None = None,
        on_tick: Callable[[], None] = lambda: None,
        vitals: Vitals | None = None,
    ) -> None:
        self.consumer = consumer
        self.vitals = vitals or Vitals(Kind.CONSUMER, consumer.name)
        self.group = Membership(consumer, self.vitals.with_tick(on_tick))
        self.vitals.assignment = self.group.owned
        self._batch_size = batch_size or consumer.batch_size or outbox_settings().CONSUMER_BATCH_SIZE
        self._guard = Guard(consumer.guard)
        self._session: Any = None
        self._is_redelivered = False  # most of the last batch was: look for marks before trying to insert them
        self._looked_at_pause = self._released = float("-inf")
        self._start_counters()

    def _start_counters(self) -> None:
        """Counters begin at 0: one that is born with its first event shows no increase for it."""
        name = self.consumer.name
        for counter in (metrics.CONSUMER_DUPLICATES, metrics.CONSUMER_SKIPPED, metrics.CONSUMER_RETRIES):
            counter.labels(name)
        metrics.CONSUMER_COMMIT_HOOK_FAILURES.labels(name)
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
        with self.vitals.life():
            while not self.group.stopping:
                self.group.join()
                try:
                    self._consume(until_idle_seconds)
                    return
                except Stopping:
                    return
                except (ClientBroken, KafkaException) as error:
                    logger.warning("Kafka client failed, starting a new one", extra={"error": str(error)})
                    self.vitals.failed(error)
                    self.vitals.say(State.WAITS_FOR_KAFKA)
                    time.sleep(RECONNECT_SECONDS)
                finally:
                    self.group.leave()

    def _consume(self, until_idle_seconds: float | None) -> None:
        last_work = time.monotonic()
        while not self.group.stopping:
            self._wait_while_paused()
            records = self.group.poll_batch(self._batch_size)
            self._say_how_it_is()
            if records:
                try:
                    self.handle_batch(records)
                except ConsumerPaused:
                    self.group.put_back(records)
            self._release_parked()
            self.group.commit()
            if records or not self.group.owned:
                last_work = time.monotonic()
            elif until_idle_seconds is not None and time.monotonic() - last_work >= until_idle_seconds:
                return
            self.group.measure_lag()

    def _say_how_it_is(self) -> None:
        if self.group.trouble:
            self.vitals.failed(self.group.trouble)
            self.vitals.say(State.WAITS_FOR_KAFKA)
        else:
            self.vitals.say(State.WORKS if self.group.owned else State.WAITS_FOR_PARTITIONS)

    def _wait_while_paused(self) -> None:
        """Look about once a second whether an operator or the guard has paused this consumer, and wait it out."""
        if time.monotonic() - self._looked_at_pause < PAUSE_SECONDS:
            return
        was_paused = False
        while self._with_database(lambda: pauses.is_paused(self.consumer.name)):
            if not was_paused:
                logger.warning("consumer is paused", extra={"consumer": self.consumer.name})
            was_paused = True
            self.vitals.say(State.PAUSED)
            self.group.commit()
            self.group.wait(PAUSE_SECONDS)
        if was_paused:
            logger.info("consumer goes on", extra={"consumer": self.consumer.name})
        self._looked_at_pause = time.monotonic()

    def _release_parked(self) -> None:
        """Handle what is parked behind dead letters that were replayed or discarded since."""
        if self.consumer.on_failure != "park_key" or time.monotonic() - self._released < RELEASE_SECONDS:
            return
        with self.group.busy():
            self._with_database(lambda: letter_actions.release(self.consumer, lambda: self.group.stopping))
        self._released = time.monotonic()

    def handle_batch(self, records: Sequence[Record]) -> None:
        """Handle records in order, effectively once, and note their offsets as done.

        Raises ConsumerStopped as `run()` does, and ConsumerPaused when the guard has had enough: what is not noted
        as done then is not handled.
        """
        deliveries = [delivery for record in records if (delivery := self._read(record)) is not None]
        if skipped := len(records) - len(deliveries):
            metrics.CONSUMER_SKIPPED.labels(self.consumer.name).inc(skipped)
        if deliveries:
            with self.group.busy():
                if not self._try_transaction(deliveries):
                    self._handle_one_by_one(deliveries)
        self.group.note_done(records)
        self._pause_when_too_many_fail()

    def _read(self, record: Record) -> Delivery | None:
        """Parse a record's envelope. None: an event of a type that this consumer has no handler for."""
        try:
            base = record.envelope()
        except UnreadableRecord as error:
            return Delivery(record, str(record.placeholder_id()), unreadable=error)
        route = self.consumer.route(base.event_type, base.event_version)
        return None if route is None else Delivery(record, base.event_id, base, route)

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
            self.group.check()
            if self.group.has_lost(delivery.record):
                continue  # its new owner handles it
            self._handle_alone(delivery)
            self.group.note_done([delivery.record])
            self._pause_when_too_many_fail()

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
                self.vitals.failed(error)
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
        self.vitals.failed(error)
        logger.error("event not handled", extra={**_fields(delivery), "attempts": attempts}, exc_info=error)
        if self.consumer.on_failure == "stop":
            raise ConsumerStopped(f"{delivery.event_type} {delivery.event_id}: {error}") from error
        reason = DeadLetter.Reason.PERMANENT if permanent else DeadLetter.Reason.FAILED

        def keep() -> bool:
            if not self._mark_processed([delivery]):
                return False
            dead_letters.keep(
                self.consumer.name,
                delivery,
                reason,
                f"{type(error).__name__}: {error}",
                traceback_text="".join(traceback.format_exception(error)),
                attempts=attempts,
            )
            return True

        if self._in_transaction(keep):
            self._count_dead_letters([reason])

    def _transaction(self, deliveries: Sequence[Delivery]) -> None:
        """Mark, handle the new ones, commit."""

        def work() -> tuple[Counter[str], list[DeadLetter.Reason]]:
            fresh = self._mark_processed(deliveries)
            handled: Counter[str] = Counter()
            dead: list[DeadLetter.Reason] = []
            calls: list[tuple[Record, Handler, Event]] = []
            parked = dead_letters.parked_keys(self.consumer, fresh)
            for delivery in fresh:
                if (delivery.record.topic, delivery.record.key) in parked:
                    reason, text = DeadLetter.Reason.BEHIND, "behind an earlier dead letter of the same key"
                else:
                    try:
                        handler, event = _event(delivery)
                    except UnreadableRecord as error:
                        reason, text = error.reason, str(error)
                    else:
                        calls.append((delivery.record, handler, event))
                        handled[event.event_type] += 1
                        continue
                dead_letters.keep(self.consumer.name, delivery, reason, text)
                dead.append(reason)
                if reason != DeadLetter.Reason.BEHIND:
                    self.vitals.failed(text)
                if self.consumer.on_failure == "park_key" and delivery.record.key is not None:
                    parked.add((delivery.record.topic, delivery.record.key))
            if len(deliveries) > 1 and self._guard.would_trip(_failures(dead)):
                raise TooManyFailures
            called[:] = [event for _, _, event in calls]
            for handler, events in _calls(calls):
                call_handler(
                    self.consumer.name,
                    handler,
                    events,
                    between=self.group.check,
                    is_first_try_of_many=len(deliveries) > 1,
                )
            return handled, dead

        called: list[Event] = []
        started_ns = time.time_ns()
        try:
            handled, dead = self._in_transaction(work)
        except (Stopping, ClientBroken):
            raise
        except Exception as error:
            if called and len(deliveries) == 1:  # a constraint checked at the commit: its handler had returned
                trace_failure(self.consumer.group_id, called, error, started_ns)
            raise
        for event_type, count in handled.items():
            metrics.CONSUMER_HANDLED.labels(self.consumer.name, event_type).inc(count)
        self.vitals.rate.count(handled.total())
        self._guard.note_handled(handled.total())
        self._count_dead_letters(dead)
        if duplicates := len(deliveries) - handled.total() - len(dead):
            metrics.CONSUMER_DUPLICATES.labels(self.consumer.name).inc(duplicates)

    def _in_transaction(self, work: Callable[[], T]) -> T:
        """Run `work` in one transaction and then what it gave to `transaction.on_commit()`."""

        def attempt() -> T:
            self._bound_idleness()
            return in_transaction(self.consumer.name, work)

        return self._with_database(attempt)

    def _with_database(self, work: Callable[[], T]) -> T:
        """Run `work`; wait for a database that is away, repeat what was merely disturbed.

        A connection lost in the middle is only a disturbance so often: an event whose handling ends the connection
        each time must not block its partition for ever.
        """
        disturbances = 0
        while True:
            try:
                connection.ensure_connection()
            except OperationalError as error:
                logger.warning("database away, waiting", extra={"error": str(error).strip()})
                self.vitals.failed(error)
                self.vitals.say(State.WAITS_FOR_DATABASE)
                self.group.wait(RECONNECT_SECONDS)
                continue
            if self.vitals.state is State.WAITS_FOR_DATABASE:
                self.vitals.say(State.WORKS)
            try:
                return work()
            except (OperationalError, InternalError) as error:
                if not is_disturbance(error) or disturbances == _MAX_DISTURBANCES:
                    raise
                disturbances += 1
                if not connection.in_atomic_block:
                    connection.close_if_unusable_or_obsolete()
                logger.warning("transaction disturbed, repeating it", extra={"error": str(error).strip()})
                self.group.wait(DISTURBED_SECONDS * disturbances)

    def _bound_idleness(self) -> None:
        """Let the database end our session when it stands still in a transaction.

        A frozen member would otherwise keep the marks of its batch locked, and the partitions' new owner waiting.
        """
        if self._session is not connection.connection and not connection.in_atomic_block:
            with connection.cursor() as cursor:
                seconds = outbox_settings().BATCH_TIMEOUT_SECONDS
                cursor.execute("SELECT set_config('idle_in_transaction_session_timeout', %s, false)", [f"{seconds}s"])
            self._session = connection.connection

    def _mark_processed(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Insert the processed marks; return the deliveries that had none, each event once, in order."""
        event_ids = [delivery.event_id for delivery in deliveries]
        if self._is_redelivered:
            known = ProcessedEvent.objects.marked(self.consumer.name, event_ids)
            event_ids = [event_id for event_id in event_ids if event_id not in known]
        new = ProcessedEvent.objects.mark(self.consumer.name, event_ids) if event_ids else set()
        self._is_redelivered = len(new) < len(deliveries) / 2
        fresh = []
        for delivery in deliveries:
            if delivery.event_id in new:
                new.discard(delivery.event_id)
                fresh.append(delivery)
        return fresh

    def _count_dead_letters(self, reasons: Sequence[DeadLetter.Reason]) -> None:
        for reason in reasons:
            metrics.CONSUMER_DEAD_LETTERED.labels(self.consumer.name, reason.value).inc()
        self._guard.note_failed(_failures(reasons))

    def _pause_when_too_many_fail(self) -> None:
        """Raise ConsumerPaused, having paused all members, when the guard has had enough."""
        if self._guard.is_tripped():
            reason = f"{self._guard}: mend the cause, then resume the consumer and replay the dead letters"
            self._guard.reset()
            logger.error("failure guard: the consumer pauses", extra={"consumer": self.consumer.name, "reason": reason})
            self._with_database(lambda: pauses.pause(self.consumer.name, by="failure guard", reason=reason))
            self._looked_at_pause = float("-inf")
            raise ConsumerPaused(reason)


def _failures(reasons: Sequence[DeadLetter.Reason]) -> int:
    """How many of the dead letters are failures of their own."""
    return len(reasons) - reasons.count(DeadLetter.Reason.BEHIND)


def _event(delivery: Delivery) -> tuple[Handler, Event]:
    """The event as its handler is to see it. Raises UnreadableRecord."""
    if delivery.unreadable is not None:
        raise delivery.unreadable
    assert delivery.base is not None and delivery.route is not None  # noqa: S101  (narrowing)
    return delivery.route.handler, delivery.record.event(delivery.base, delivery.route.version)


def _fields(delivery: Delivery) -> dict[str, Any]:
    return {
        "event_id": delivery.event_id,
        "event_type": delivery.event_type,
        "tenant_id": delivery.tenant_id,
        "place": f"{delivery.record.topic}/{delivery.record.partition}/{delivery.record.offset}",
    }


def _calls(work: Sequence[tuple[Record, Handler, Event]]) -> list[tuple[Handler, list[Event]]]:
    """Group events into handler calls, as large as the order of each key allows.

    Within a key the calls follow the order of the events. Events of different keys owe each other no order, so a
    key's next event may join a call that stands later than its previous one's, never an earlier one.
    """
    calls: dict[tuple[int, int], tuple[Handler, list[Event]]] = {}
    last: dict[tuple[str, bytes | None], tuple[int, Handler]] = {}
    for record, handler, event in work:
        key = (record.topic, record.key)
        wave, previous = last.get(key, (0, handler))
        if previous is not handler:
            wave += 1
        last[key] = (wave, handler)
        calls.setdefault((wave, id(handler)), (handler, []))[1].append(event)
    return [call for _, call in sorted(calls.items(), key=lambda item: item[0][0])]
