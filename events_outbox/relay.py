"""The relay: lead, publish window by window, stop.

One relay leads, any number stand by. The leader reads the next window of committed events, publishes a batch, and
moves the cursor when the broker has acknowledged it. After a crash between acknowledgement and cursor the batch is
sent again: at least once in Kafka, which the consumers make effectively once. While an operator has paused the relay,
whoever leads publishes nothing.
"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import psycopg

from monitoring import metrics

from .conf import outbox_settings
from .exceptions import CursorLost, LeadershipLost
from .heartbeats import Kind, State, Vitals
from .lag import LagWatch
from .leader import SESSION_LOST, Leader, Parked, open_session
from .models import OutboxEvent, RelayCursor
from .pruning import housekeeping
from .publisher import STUCK_SECONDS, WAITING, ProducerBroken, ProducerStuck, Publisher
from .rate import Pace
from .window import Pages, open_window, take_snapshot

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

HEARTBEAT_SECONDS = 1.0
ANSWER_SECONDS = 0.5
PAUSED_POLL_SECONDS = 0.5
HOUSE_ROUND_SECONDS = 60.0
HOUSE_STEP_SECONDS = 0.1
STOP_GRACE_SECONDS = 2.0


class _Abandoned(Exception):
    """The batch in flight was given up, unacknowledged; the cursor still stands before it."""


class Relay:
    """Publishes the outbox to Kafka until told to stop.

    `batch_size`: events between two cursor moves; None takes EVENTS_OUTBOX["BATCH_SIZE"]. `on_tick` is called at
    least once a second while the relay works, waits or stands by: the sign of life for a health check. `vitals`: what
    it says of itself, for whoever writes it down.
    """

    def __init__(
        self,
        *,
        batch_size: int | None = None,
        on_tick: Callable[[], None] = lambda: None,
        vitals: Vitals | None = None,
    ) -> None:
        self._conf = outbox_settings()
        self._batch_size = batch_size or self._conf.BATCH_SIZE
        self.vitals = vitals or Vitals(Kind.RELAY, "relay")
        self._on_tick = self.vitals.with_tick(on_tick)
        # A plain flag: an Event's lock can be held by the very wait that a signal handler interrupts.
        self._stopping = False
        self._gives_up_at = float("inf")
        self._last_heartbeat = 0.0
        self._last_redrive_look = 0.0
        # A thread beside the loop, to ask the database in: it may take long to answer.
        self._reader = ThreadPoolExecutor(1, "reader")
        self._pages: Pages | None = None
        self._is_idle = False
        self._patience_seconds = STUCK_SECONDS
        self._house: Iterator[int] = iter(())
        self._house_due = 0.0

    def stop(self) -> None:
        """Ask the relay to stop; safe in a signal handler. The batch in flight is finished or abandoned."""
        self._gives_up_at = time.monotonic() + STOP_GRACE_SECONDS
        self._stopping = True

    def run(self, *, until_empty: bool = False) -> None:
        """Lead or stand by until `stop()`.

        `until_empty`: return once nothing is pending. A database that is away, and the end of a pause, are waited for.
        Raises ImproperlyConfigured when librdkafka refuses the Kafka settings.
        """
        with self.vitals.life():
            while not self._stopping:
                self._pages = None
                try:
                    with open_session() as session:
                        leader = Leader(session)
                        if self._wait_for_lead(leader, until_empty):
                            with LagWatch():
                                self._lead(leader, until_empty)
                        return
                except (*SESSION_LOST, LeadershipLost) as error:
                    self._try_again("database session lost, trying again", error, State.WAITS_FOR_DATABASE)
                except CursorLost as error:
                    self._try_again("cursor not rebuilt, trying again", error, State.WAITS_FOR_KAFKA)
                except (_Abandoned, ProducerBroken) as error:
                    self._try_again("batch abandoned, to be published again", error, State.WAITS_FOR_KAFKA)
                finally:
                    metrics.OUTBOX_RELAY_LEADER.set(0)
                self._pause(self._conf.LEADER_POLL_SECONDS)

    def _try_again(self, what: str, error: Exception, state: State) -> None:
        logger.warning(what, extra={"error": str(error).strip()})
        if not isinstance(error, _Abandoned):
            self.vitals.failed(error)
        self.vitals.say(state)

    def _wait_for_lead(self, leader: Leader, until_empty: bool) -> bool:
        """Stand by until the lock is ours (True), or until stopped or, with `until_empty`, nothing is pending."""
        standing_by = False
        while not self._stopping:
            if self._ask(leader, leader.try_lead):
                logger.info("this relay leads", extra={"published": str(leader.published)})
                metrics.OUTBOX_RELAY_LEADER.set(1)
                self.vitals.say(State.LEADS)
                return True
            self.vitals.say(State.STANDS_BY)
            if not standing_by:
                logger.info("another relay leads, standing by")
                standing_by = True
            if until_empty and not OutboxEvent.objects.pending(RelayCursor.read()).exists():
                return False
            self._pause(self._conf.LEADER_POLL_SECONDS)
        return False

    def _lead(self, leader: Leader, until_empty: bool) -> None:
        publisher = Publisher(lambda what_for: self._wait_for_broker(leader, what_for), self._patience_seconds)
        pace = Pace(self._conf.IDLE_POLL_MIN_SECONDS, self._conf.IDLE_POLL_MAX_SECONDS)
        self._house, self._house_due = housekeeping(leader.session), 0.0
        try:
            while not self._stopping:
                self._wait_while_paused(leader)
                if leader.paused is not None:
                    continue  # told to stop
                redriven = self._redrive(leader, publisher)
                pace.begin()
                count = self.publish_window(leader, publisher)
                self._is_idle = not count
                if count or redriven:
                    self._patience_seconds = STUCK_SECONDS
                elif until_empty:
                    self._ask(leader, leader.save)
                    return
                if count < self._batch_size and not (redriven or until_empty):
                    self._pause(pace.pause_seconds(count))
                self._heartbeat(leader)
                self._keep_house(leader)
        except ProducerBroken as error:
            if isinstance(error, ProducerStuck):
                # Should it be something else: not one batch after the other into a line that does not answer.
                self._patience_seconds *= 2
            leader.last_error = str(error)
            self._ask(leader, leader.save)
            raise
        finally:
            publisher.close()

    def publish_window(self, leader: Leader, publisher: Publisher) -> int:
        """Publish the window in progress, or the next one, and return how many events it had.

        Returns early, with the cursor inside the window, when the relay is stopped.
        Raises LeadershipLost when the database session is gone, ProducerBroken when the Kafka client is.
        """
        session, lo = leader.session, leader.published
        if leader.window:
            pages = Pages(session, lo, leader.window, leader.window_last_id, self._batch_size)
        elif self._is_idle and self._ask(leader, take_snapshot, session) == lo:
            return 0  # to look into each of an outbox's partitions takes far longer than a snapshot
        else:
            pages = self._ask(leader, open_window, session, lo, self._batch_size)
        self._pages = pages
        count, is_read = 0, False
        while not is_read:
            page, is_read = self._ask(leader, pages.read)
            if not page:
                continue
            parked = publisher.publish(page, leader.parked_keys, lambda: self._read_ahead(leader, pages))
            leader.advance(pages.hi, None if is_read else page[-1][0])
            self._note_published(leader, len(page) - len(parked), parked)
            self._ask(leader, leader.save, parked, len(page) - len(parked))
            self._beat()
            count += len(page)
            self._keep_house(leader)
            self._wait_while_paused(leader)
            if self._stopping and not is_read:
                return count
        leader.advance(pages.hi, None)  # where nothing was in it, saved with the next heartbeat: nothing depends on it
        return count

    def _read_ahead(self, leader: Leader, pages: Pages) -> None:
        if pages.is_under_way:
            self._ask(leader, pages.receive)

    def _redrive(self, leader: Leader, publisher: Publisher) -> bool:
        """Publish a batch of what an operator asked to redrive, if anything; looked for once a second."""
        if not leader.parked_keys or time.monotonic() - self._last_redrive_look < HEARTBEAT_SECONDS:
            return False
        if not self._ask(leader, leader.take_up_operators_work):
            self._last_redrive_look = time.monotonic()
            return False
        page = self._ask(leader, leader.redrive_requests, self._batch_size)
        refused = publisher.publish(page, set())
        refused_ids = {parked.event_id for parked in refused}
        delivered_ids = [row[0] for row in page if row[0] not in refused_ids]
        self._note_published(leader, len(delivered_ids), refused)
        self._ask(leader, leader.close_redrive, delivered_ids, refused)
        logger.info("redrive done", extra={"delivered": len(delivered_ids), "refused": len(refused)})
        return True

    def _note_published(self, leader: Leader, count: int, refused: Sequence[Parked]) -> None:
        leader.last_error = ""
        self.vitals.say(State.LEADS)
        self.vitals.rate.count(count)
        if refused:
            self.vitals.failed(f"{refused[0].topic}, {refused[0].reason}: {refused[0].error}")

    def _wait_while_paused(self, leader: Leader) -> None:
        """Keep the lead, and house, and publish nothing, until the relay is resumed or told to stop."""
        if leader.paused is None:
            return
        logger.warning("the relay is paused", extra={"paused_by": leader.paused})
        while leader.paused is not None and not self._stopping:
            self.vitals.say(State.PAUSED)
            self._pause(PAUSED_POLL_SECONDS)
            self._heartbeat(leader)
            self._keep_house(leader)
        if leader.paused is None:
            logger.info("the relay goes on")
            self.vitals.say(State.LEADS)

    def _keep_house(self, leader: Leader) -> None:
        """One step of pruning and the like, a few milliseconds, when it is due."""
        if time.monotonic() < self._house_due:
            return
        pause_seconds = HOUSE_STEP_SECONDS
        if self._ask(leader, next, self._house, None) is None:
            self._house, pause_seconds = housekeeping(leader.session), HOUSE_ROUND_SECONDS
        self._house_due = time.monotonic() + pause_seconds

    def _ask(self, leader: Leader, question: Callable[..., Answer], *arguments: Any) -> Answer:
        """Ask the database in the other thread, and wait: the loop goes round meanwhile.

        Raises _Abandoned when the relay is to stop and no answer comes.
        """
        asked = self._reader.submit(self._answer, question, *arguments)
        while True:
            try:
                return asked.result(ANSWER_SECONDS)
            except TimeoutError:
                if asked.done():
                    return asked.result()
                self._on_tick()
                if self._stopping and time.monotonic() > self._gives_up_at:
                    _hang_up(leader.session)
                    wait([asked], ANSWER_SECONDS)
                    raise _Abandoned("stopped while the database did not answer") from None

    def _answer(self, question: Callable[..., Answer], *arguments: Any) -> Answer:
        if self._pages:
            self._pages.receive()  # it would be in the way of any other question
        return question(*arguments)

    def _wait_for_broker(self, leader: Leader, what_for: str) -> None:
        """The broker is slow or away: stay alive, say so, and give up only when stopped."""
        leader.last_error = what_for
        self.vitals.say(State.WAITS_FOR_KAFKA)
        if what_for != WAITING:
            self.vitals.failed(what_for)
        self._heartbeat(leader)
        if leader.paused is not None:  # what is under way must not be published when the broker is back
            raise _Abandoned("paused while the broker did not answer")
        if self._stopping and time.monotonic() > self._gives_up_at:
            raise _Abandoned("stopped while the broker did not answer")

    def _heartbeat(self, leader: Leader) -> None:
        self._on_tick()
        if time.monotonic() - self._last_heartbeat >= HEARTBEAT_SECONDS:
            self._ask(leader, leader.save)
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


def _hang_up(session: psycopg.Connection[Any]) -> None:
    """End the connection under a thread that waits for an answer: it sees the end, and no other socket's bytes."""
    if session.closed:
        return
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(session.pgconn.socket)) as line:
        line.shutdown(socket.SHUT_RDWR)
