"""Reading, at scrape time, state that may take long: a database that hangs must not make the scrape hang."""

import threading
from collections.abc import Iterable
from concurrent.futures import Future, wait

from django.db import connections
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

READ_SECONDS = 5.0
"""How long a scrape waits for what its collectors read; Prometheus by default waits 10 s for the scrape."""


class Reader:
    """Reads a collector in threads, one after the other: while a read hangs, no further one is begun."""

    def __init__(self, collector: Collector) -> None:
        self.collector = collector
        self._lock = threading.Lock()
        self._running: Future[list[Metric]] | None = None

    def start(self) -> Future[list[Metric]]:
        """Return the read that is under way, having begun one if there was none."""
        with self._lock:
            if self._running is None or self._running.done():
                self._running = Future()
                threading.Thread(target=self._read, args=(self._running,), name="collector", daemon=True).start()
            return self._running

    def _read(self, result: Future[list[Metric]]) -> None:
        try:
            metrics = list(self.collector.collect())
        except BaseException as error:  # whatever it was: who waits must hear of it
            connections.close_all()
            result.set_exception(error)
        else:
            connections.close_all()  # of this thread, which ends here
            result.set_result(metrics)


def read_all(readers: Iterable[Reader]) -> dict[Reader, Future[list[Metric]]]:
    """Read all at the same time. Return the reads after READ_SECONDS at the latest: one that hangs is not done."""
    reads = {reader: reader.start() for reader in readers}
    wait(reads.values(), READ_SECONDS)
    return reads
