"""The relay: lead, publish window by window, stop.

One relay leads, any number stand by. The leader reads the next window of committed events, publishes a batch, and
moves the cursor when the broker has acknowledged it. After a crash between acknowledgement and cursor the batch is
sent again: at least once in Kafka, which the consumers make effectively once.
"""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Self, TypeVar

import psycopg

from monitoring import metrics

from .conf import outbox_settings
from .exceptions import CursorLost, LeadershipLost
from .fields import PgSnapshot
from .leader import Leader, open_session
from .models import OutboxEvent, RelayCursor
from .pruning import housekeeping
from .publisher import ProducerBroken, Publisher, Row
from .window import PAGE_MAX_BYTES, read_pages, take_snapshot

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Page = list[Row]

PAGE_ROWS = 500
"""Rows read at a time. A batch is several pages: the first are on their way while the next ones are read."""

HEARTBEAT_SECONDS = 1.0
HOUSE_ROUND_SECONDS = 60.0
HOUSE_STEP_SECONDS = 0.1
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
        # A thread beside the loop: for what the database may take long to answer, and for reading ahead.
        self._reader = ThreadPoolExecutor(1, "reader")
        self._house: Iterator[int] = iter(())
        self._house_due = 0.0

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
            except CursorLost as error:
                logger.warning("cursor not rebuilt, trying again", extra={"error": str(error)})
            except (_Abandoned, ProducerBroken) as error:
                logger.warning("batch abandoned, to be published again", extra={"error": str(error)})
            finally:
                metrics.OUTBOX_RELAY_LEADER.set(0)
            self._pause(self._conf.LEADER_POLL_SECONDS)

    def _wait_for_lead(self, leader: Leader, until_empty: bool) -> bool:
        """Stand by until the lock is ours (True), or until stopped or, with `until_empty`, nothing is pending."""
        standing_by = False
        while not self._stopping:
            if self._answer(leader, self._reader.submit(leader.try_lead)):
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
        self._house, self._house_due = housekeeping(leader.session), 0.0
        try:
            while not self._stopping:
                redriven = self._redrive(leader, publisher)
                if self.publish_window(leader, publisher) or redriven:
                    idle_seconds = self._conf.IDLE_POLL_MIN_SECONDS
                elif until_empty:
                    leader.save()
                    return
                else:
                    self._pause(idle_seconds)
                    idle_seconds = min(idle_seconds * 2, self._conf.IDLE_POLL_MAX_SECONDS)
                self._heartbeat(leader)
                self._keep_house(leader)
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
        with self._read_ahead(leader, hi) as ahead:
            while ahead.has_more():
                rows, parked = publisher.publish(ahead.batch(), leader.parked_keys)
                leader.last_error = ""
                leader.advance(hi, rows[-1][0] if ahead.has_more() else None)
                leader.save(parked, published=len(rows) - len(parked))
                self._beat()
                count += len(rows)
                self._keep_house(leader)
                if self._stopping and ahead.has_more():
                    return count
        if not count:
            leader.advance(hi, None)  # saved with the next heartbeat: nothing depends on it
        return count

    def _read_ahead(self, leader: Leader, hi: PgSnapshot) -> "_ReadAhead":
        pages_a_batch = -(-self._batch_size // PAGE_ROWS)
        page_rows = self._batch_size // pages_a_batch
        pages = read_pages(leader.session, leader.published, hi, leader.window_last_id, page_rows)
        return _ReadAhead(
            lambda: self._reader.submit(next, pages, None), lambda asked: self._answer(leader, asked), pages_a_batch
        )

    def _redrive(self, leader: Leader, publisher: Publisher) -> bool:
        """Publish a batch of what an operator asked to redrive, if anything; looked for once a second."""
        if not leader.parked_keys or time.monotonic() - self._last_redrive_look < HEARTBEAT_SECONDS:
            return False
        if not leader.take_up_operators_work():
            self._last_redrive_look = time.monotonic()
            return False
        rows, refused = publisher.publish([leader.redrive_requests(self._batch_size)], set())
        refused_ids = {parked.event_id for parked in refused}
        delivered_ids = [row[0] for row in rows if row[0] not in refused_ids]
        leader.close_redrive(delivered_ids, refused)
        logger.info("redrive done", extra={"delivered": len(delivered_ids), "refused": len(refused)})
        return True

    def _keep_house(self, leader: Leader) -> None:
        """One step of pruning and the like, a few milliseconds, when it is due."""
        if time.monotonic() < self._house_due:
            return
        try:
            pause_seconds = HOUSE_ROUND_SECONDS if next(self._house, None) is None else HOUSE_STEP_SECONDS
        except psycopg.OperationalError:
            raise
        except psycopg.Error as error:
            # Of no matter for publishing: a missing right, say.
            logger.warning("housekeeping failed", extra={"error": str(error).strip()})
            pause_seconds = HOUSE_ROUND_SECONDS
        if pause_seconds == HOUSE_ROUND_SECONDS:
            self._house = housekeeping(leader.session)
        self._house_due = time.monotonic() + pause_seconds

    def _answer(self, leader: Leader, asked: Future[Answer]) -> Answer:
        """Wait for what the database was asked in the other thread; the loop goes round meanwhile."""
        while True:
            try:
                return asked.result(HEARTBEAT_SECONDS)
            except TimeoutError:
                if asked.done():
                    raise
                self._on_tick()
                if self._stopping and time.monotonic() > self._gives_up_at:
                    leader.session.cancel()

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


class _ReadAhead:
    """The pages of a window: while one is worked on, the next one is read in the other thread."""

    def __init__(
        self,
        ask: Callable[[], Future[Page | None]],
        wait: Callable[[Future[Page | None]], Page | None],
        pages_a_batch: int,
    ) -> None:
        self._ask, self._wait, self._pages_a_batch = ask, wait, pages_a_batch
        self._next = ask()

    def has_more(self) -> bool:
        return self._wait(self._next) is not None

    def batch(self) -> Iterator[Page]:
        """Yield the pages of one batch; fewer than usual where their rows are large."""
        size_bytes = 0
        for _ in range(self._pages_a_batch):
            page = self._wait(self._next)
            if page is None or size_bytes > PAGE_MAX_BYTES:
                return
            self._next = self._ask()
            size_bytes += sum(len(row[3]) for row in page)
            yield page

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        wait([self._next])  # the session may be closed now
