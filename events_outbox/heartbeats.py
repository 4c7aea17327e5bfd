"""Heartbeats: what each relay, consumer or other worker says of itself, in its row of `Worker`.

The work only sets plain attributes of its `Vitals`. A thread beside it writes them down on a session of its own, so
that a database that is away, slow or frozen costs the work nothing, and what a heartbeat fails with nobody but the
log hears of.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import psycopg
from psycopg.types.json import Json

from monitoring.worker import STALE_AFTER_SECONDS

from .leader import session_parameters
from .models import Worker
from .rate import Rate

logger = logging.getLogger(__name__)

Kind = Worker.Kind

BEAT_SECONDS = 5.0
LOOK_SECONDS = 1.0
"""How often a change of state is looked for, and so the most often that it is written."""
ANSWER_SECONDS = 3
"""How long the database may take for a heartbeat."""
FAREWELL_SECONDS = 1.0
"""How long an orderly stop waits until it is written down."""
KEEP_DAYS = 1
PRUNE_SECONDS = 3600.0
ERROR_CHARACTERS = 2000
APPLICATION_NAME = "worker_heartbeat"


class State(StrEnum):
    """What a worker does. In the database it is text: a later version may know others."""

    STARTS = "starts"
    LEADS = "leads"
    STANDS_BY = "stands by"
    WORKS = "works"
    PAUSED = "paused"
    WAITS_FOR_PARTITIONS = "waits for partitions"
    WAITS_FOR_KAFKA = "waits for Kafka"
    WAITS_FOR_DATABASE = "waits for the database"
    HANGS = "hangs"
    STOPPED = "stopped"


class Vitals:
    """What one worker says of itself. Saying it costs less than a microsecond, and raises nothing."""

    def __init__(
        self, kind: Kind, name: str, metrics_port: int = 0, *, stale_after_seconds: float | None = None
    ) -> None:
        """`metrics_port`: 0 when it serves no metrics.

        `stale_after_seconds`: without a tick for so long it hangs; None: for STALE_AFTER_SECONDS.
        """
        self.id = uuid4()
        self.kind = kind
        self.name = name
        self.metrics_port = metrics_port or None
        self.stale_after_seconds = STALE_AFTER_SECONDS if stale_after_seconds is None else stale_after_seconds
        self.started_at = self.state_since = self._ticked_at = time.monotonic()
        self.state = State.STARTS
        self.last_error = ""
        self.failed_at: float | None = None
        self.rate = Rate()
        self.assignment: Collection[tuple[str, int]] = ()

    def say(self, state: State) -> None:
        """Say what the worker does from now on, unless that is what it did already."""
        if state is not self.state:
            self.state, self.state_since = state, time.monotonic()

    def failed(self, error: str | BaseException) -> None:
        """Say what went wrong. It stays the last error, with its time, until there is another."""
        text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else error
        self.last_error, self.failed_at = text, time.monotonic()

    @contextmanager
    def life(self) -> Iterator[None]:
        """The worker's work, whole: after it the worker is stopped, and what it raised is the last error."""
        try:
            yield
        except BaseException as error:
            self.failed(error)
            raise
        finally:
            self.say(State.STOPPED)

    def tick(self) -> None:
        """Say that the loop goes round: without it for too long, as /livez has it, the worker hangs."""
        self._ticked_at = time.monotonic()

    def with_tick(self, on_tick: Callable[[], None]) -> Callable[[], None]:
        """Return what ticks here and there."""

        def tick() -> None:
            self.tick()
            on_tick()

        return tick

    def seen_state(self) -> tuple[State, float]:
        """The state as it is seen from beside it, and since when."""
        if self.state is not State.STOPPED and time.monotonic() - self._ticked_at >= self.stale_after_seconds:
            return State.HANGS, self._ticked_at
        return self.state, self.state_since


# One row by its primary key, which nobody else writes: nothing to wait for. Ages rather than times, as the clocks of
# hosts differ: all times are the database's. The row is made anew should it have been pruned meanwhile.
_BEAT_SQL = """
    INSERT INTO events_outbox_worker AS worker (id, kind, name, host, pid, started_at, seen_at, stopped_at, state,
           state_since, last_error, last_error_at, events_total, events_per_second, assignment, metrics_port)
    VALUES (%(id)s, %(kind)s, %(name)s, %(host)s, %(pid)s, now() - make_interval(secs => %(age)s), now(),
           CASE WHEN %(is_stopped)s THEN now() END, %(state)s, now() - make_interval(secs => %(state_age)s),
           %(last_error)s, now() - make_interval(secs => %(error_age)s), %(events_total)s, %(events_per_second)s,
           %(assignment)s, %(metrics_port)s)
    ON CONFLICT (id) DO UPDATE SET seen_at = excluded.seen_at, stopped_at = excluded.stopped_at,
           -- Not anew at each heartbeat: two clocks never agree to the millisecond.
           state_since = CASE WHEN worker.state = excluded.state THEN worker.state_since ELSE excluded.state_since END,
           state = excluded.state, last_error = excluded.last_error, last_error_at = excluded.last_error_at,
           events_total = excluded.events_total, events_per_second = excluded.events_per_second,
           assignment = excluded.assignment
"""
_PRUNE_SQL = "DELETE FROM events_outbox_worker WHERE seen_at < now() - make_interval(days => %s)"


class Heartbeats:
    """While it is entered, a thread writes the vitals of this process's workers down.

    Every BEAT_SECONDS, within a second of a change of state, and on leaving, when they are stopped. Leaving waits
    for the database FAREWELL_SECONDS at most.
    """

    def __init__(self, workers: Sequence[Vitals]) -> None:
        self._workers = workers
        self._host, self._pid = socket.gethostname()[:255], os.getpid()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._session: psycopg.Connection[Any] | None = None
        self._written: dict[Vitals, State] = {}
        self._beat_due = self._prune_due = float("-inf")
        self._is_failing = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for vitals in self._workers:
            vitals.say(State.STOPPED)
        self._ended.set()
        self._thread.join(FAREWELL_SECONDS)

    def _run(self) -> None:
        self._look()
        while not self._ended.wait(LOOK_SECONDS):
            self._look()
        self._look(is_last=True)
        self._hang_up()

    def _look(self, *, is_last: bool = False) -> None:
        """Write down what has changed, or all when it is time to. Raises nothing."""
        now = time.monotonic()
        is_due = is_last or now >= self._beat_due
        # The rate each time: it is that of its samples.
        seen = {vitals: (*vitals.seen_state(), vitals.rate.per_second()) for vitals in self._workers}
        if not is_due and (self._is_failing or all(self._written.get(v) is seen[v][0] for v in self._workers)):
            return
        try:
            self._write(seen, with_pruning=now >= self._prune_due)
        except Exception as error:
            self._hang_up()
            if not self._is_failing:
                logger.warning("heartbeat not written", extra={"error": str(error).strip()})
            self._is_failing = True
        else:
            if self._is_failing:
                logger.info("heartbeat written again")
            self._is_failing = False
            self._written = {vitals: state for vitals, (state, _, _) in seen.items()}
        self._beat_due = time.monotonic() + BEAT_SECONDS

    def _write(self, seen: dict[Vitals, tuple[State, float, float]], *, with_pruning: bool) -> None:
        session = self._session = self._session or _open_session()
        beats = [
            self._beat(vitals, state, since, per_second)
            for vitals, (state, since, per_second) in seen.items()
            if self._written.get(vitals) is not State.STOPPED
        ]
        with session.transaction(), session.cursor() as cursor:
            # For this transaction alone: a pooler in between may give the next one another session.
            cursor.execute("SELECT set_config('statement_timeout', %s, true)", [f"{ANSWER_SECONDS}s"])
            for beat in beats:
                cursor.execute(_BEAT_SQL, beat)
            if with_pruning:
                cursor.execute(_PRUNE_SQL, [KEEP_DAYS])
        if with_pruning:
            self._prune_due = time.monotonic() + PRUNE_SECONDS

    def _beat(self, vitals: Vitals, state: State, since: float, per_second: float) -> dict[str, Any]:
        now = time.monotonic()
        return {
            "id": vitals.id,
            "kind": vitals.kind.value,
            "name": vitals.name,
            "host": self._host,
            "pid": self._pid,
            "age": now - vitals.started_at,
            "is_stopped": state is State.STOPPED,
            "state": state.value,
            "state_age": now - since,
            "last_error": _storable(vitals.last_error),
            "error_age": None if vitals.failed_at is None else now - vitals.failed_at,
            "events_total": vitals.rate.total,
            "events_per_second": per_second,
            "assignment": Json(sorted(f"{topic}/{partition}" for topic, partition in tuple(vitals.assignment))),
            "metrics_port": vitals.metrics_port,
        }

    def _hang_up(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            with suppress(Exception):
                session.close()


def _storable(text: str) -> str:
    """What PostgreSQL takes as text, and a page shows."""
    return text[:ERROR_CHARACTERS].replace("\x00", "\ufffd").encode(errors="replace").decode()


def _open_session() -> psycopg.Connection[Any]:
    # Statements are not prepared: a pooler in between may not keep them.
    return psycopg.connect(**{**session_parameters(APPLICATION_NAME), "prepare_threshold": None})
