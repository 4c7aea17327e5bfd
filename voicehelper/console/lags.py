"""The consumers' lag, asked of Kafka beside the page: for when Prometheus does not know it."""

import os
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDone

from events_outbox.handlers import consumers
from events_outbox.lag import Lag, read_lags

ANSWER_SECONDS = 5.0
FRESH_SECONDS = 15.0
USABLE_SECONDS = 60.0


class LagReader:
    """Reads in a thread, one at a time; what was read before is shown meanwhile, up to USABLE_SECONDS old."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = 0
        self._running: Future[dict[str, Lag]] | None = None
        self._known: dict[str, Lag] = {}
        self._known_at = float("-inf")

    def lags(self, wait_seconds: float) -> dict[str, Lag]:
        """By consumer; empty when nothing is known yet. Waits only for a first answer."""
        with self._lock:
            if self._pid != os.getpid():  # a thread does not survive a fork
                self._pid, self._running = os.getpid(), None
            age = time.monotonic() - self._known_at
            if age > FRESH_SECONDS and self._running is None:
                self._running = Future()
                threading.Thread(target=self._read, args=(self._running,), name="overview-lag", daemon=True).start()
            running, known = self._running, self._known if age <= USABLE_SECONDS else {}
        if known or running is None:
            return known
        try:
            return running.result(max(wait_seconds, 0))
        except NotDone:
            return {}

    def _read(self, result: Future[dict[str, Lag]]) -> None:
        try:
            lags = read_lags(ANSWER_SECONDS)
        except Exception as error:
            lags = {consumer.name: Lag(None, None, str(error)) for consumer in consumers()}
        with self._lock:
            self._known, self._known_at = lags, time.monotonic()
            self._running = None
        result.set_result(lags)


LAGS = LagReader()
