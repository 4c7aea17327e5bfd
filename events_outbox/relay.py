"""The relay: lead, publish window by window, stop.

One relay leads, any number stand by. The leader reads the next window of committed events, publishes a batch, and
moves the cursor when the broker has acknowledged it. After a crash between acknowledgement and cursor the batch is
sent again: at least once in Kafka, which the consumers make effectively once.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import psycopg

from monitoring import metrics

from .conf import outbox_settings
from .exceptions import LeadershipLost
from .leader import Leader, open_session
from .models import OutboxEvent, RelayCursor
from .publisher import ProducerBroken, Publisher
from .window import read_page, take_snapshot, window_ids

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
STOP_GRACE_SECONDS = 2.0


class _Abandoned(Exception):
    """The batch in flight was given up, unacknowledged; the cursor still stands before it."""


class Relay:
    """Publishes the outbox to Kafka until told to stop.

    `batch_size`: events between two cursor moves; None takes EVENTS_OUTBOX["BATCH_SIZE"]. `on_tick` is called at
    least once a second while the relay works, waits or stands by: the sign of life for a health check.
    """

    def __init__(self, *, batch_size: int | None = None, on_tick: Callable[[], None] = lambda: None) -> None:
        self._conf = outbox_settings()
        self._batch_size = batch_size or self._conf.BATCH_SIZE
        self._on_tick = on_tick
        # A plain flag: an Event's lock can be held by the very wait that a signal handler interrupts.
        self._stopping = False
        self._gives_up_at = float("inf")
        self._last_heartbeat = 0.0
        self._last_redrive_look = 0.0

    def stop(self) -> None:
        """Ask the relay to stop; safe in a signal handler. The batch in flight is finished or abandoned."""
        self._gives_up_at = time.monotonic() + STOP_GRACE_SECONDS
        self._stopping = True

    def run(self, *, until_empty: bool = False) -> None:
        """Lead or stand by until `stop()`.

        `until_empty`: return once nothing is pending. A database that is away is waited for.
        Raises ImproperlyConfigured when librdkafka refuses the Kafka settings.
        """
        while not self._stopping:
            try:
                with open_session() as session:
                    leader = Leader(session)
                    if self._wait_for_lead(leader, until_empty):
                        self._lead(leader, until_empty)
                    return
            except (psycopg.OperationalError, psycopg.InterfaceError, LeadershipLost) as error:
                logger.warning("database session lost, trying again", extra={"error": str(error).strip()})
            except (_Abandoned, ProducerBroken) as error:
                logger.warning("batch abandoned, to be published again", extra={"error": str(error)})
            finally:
                metrics.OUTBOX_RELAY_LEADER.set(0)
            self._pause(self._conf.LEADER_POLL_SECONDS)

    def _wait_for_lead(self, leader: Leader, until_empty: bool) -> bool:
        """Stand by until the lock is ours (True), or until stopped or, with `until_empty`, nothing is pending."""
        standing_by = False
        while not self._stopping:
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
        publisher = Publisher(lambda what_for: self._wait_for_broker(leader, what_for))
        idle_seconds = self._conf.IDLE_POLL_MIN_SECONDS
        try:
            while not self._stopping:
                self._redrive(leader, publisher)
                if self.publish_window(leader, publisher):
                    idle_seconds = self._conf.IDLE_POLL_MIN_SECONDS
                elif until_empty:
                    leader.save()
                    return
                else:
                    self._pause(idle_seconds)
                    idle_seconds = min(idle_seconds * 2, self._conf.IDLE_POLL_MAX_SECONDS)
                self._heartbeat(leader)
        except ProducerBroken as error:
            leader.last_error = str(error)
            leader.save()
            raise
        finally:
            publisher.close()

    def publish_window(self, leader: Leader, publisher: Publisher) -> int:
        """Publish the window in progress, or the next one, and return how many events it had.

        Returns early, with the cursor inside the window, when the relay is stopped.
        Raises LeadershipLost when the database session is gone, ProducerBroken when the Kafka client is.
        """
        hi = leader.window or take_snapshot(leader.session)
        if hi == leader.published:
            return 0
        count = 0
        ids = window_ids(leader.session, leader.published, hi, leader.window_last_id)
        for batch, is_last in _batches(ids, self._batch_size):
            parked = publisher.publish(read_page(leader.session, batch), leader.parked_keys)
            leader.last_error = ""
            leader.advance(hi, None if is_last else batch[-1])
            leader.save(parked)
            self._beat()
            count += len(batch)
            if self._stopping and not is_last:
                return count
        if not count:
            leader.advance(hi, None)  # saved with the next heartbeat: nothing depends on it
        return count

    def _redrive(self, leader: Leader, publisher: Publisher) -> None:
        """Publish what an operator asked to redrive; looked for once a second."""
        if not leader.parked_keys or time.monotonic() - self._last_redrive_look < HEARTBEAT_SECONDS:
            return
        leader.widen_redrive_requests()
        while not self._stopping and (rows := leader.redrive_requests(self._batch_size)):
            refused = publisher.publish(rows, set())
            refused_ids = {parked.event_id for parked in refused}
            delivered_ids = [row[0] for row in rows if row[0] not in refused_ids]
            leader.close_redrive(delivered_ids, refused)
            self._heartbeat(leader)
            logger.info("redrive done", extra={"delivered": len(delivered_ids), "refused": len(refused)})
        self._last_redrive_look = time.monotonic()

    def _wait_for_broker(self, leader: Leader, what_for: str) -> None:
        """The broker is slow or away: stay alive, say so, and give up only when stopped."""
        leader.last_error = what_for
        self._heartbeat(leader)
        if self._stopping and time.monotonic() > self._gives_up_at:
            raise _Abandoned("stopped while the broker did not answer")

    def _heartbeat(self, leader: Leader) -> None:
        self._on_tick()
        if time.monotonic() - self._last_heartbeat >= HEARTBEAT_SECONDS:
            leader.save()
            self._last_heartbeat = time.monotonic()

    def _beat(self) -> None:
        """A saved cursor is a heartbeat too."""
        self._on_tick()
        self._last_heartbeat = time.monotonic()

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._stopping:
            self._on_tick()
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return
            time.sleep(min(remaining, 0.2))


def republish(leader: Leader, ids: Iterable[int], batch_size: int) -> int:
    """Publish these events once more, in the order of `ids`, without moving the cursor. Return how many.

    A broker that is away is waited for. Raises LeadershipLost and ProducerBroken as `Relay.publish_window()` does.
    """
    count = 0
    publisher = Publisher(lambda _what_for: leader.save())
    try:
        for batch, _ in _batches([ids], batch_size):
            leader.save(publisher.publish(read_page(leader.session, batch), leader.parked_keys))
            count += len(batch)
    finally:
        publisher.close()
    return count


def _batches(chunks: Iterable[Iterable[int]], size: int) -> Iterator[tuple[list[int], bool]]:
    """Cut chunks of ids into batches, each with whether it is the last one."""
    ids = (id_ for chunk in chunks for id_ in chunk)
    batch = list(islice(ids, size))
    while batch:
        following = list(islice(ids, size))
        yield batch, not following
        batch = following
