"""Lag of the consumers' groups: what they have committed against what the topics hold, whether they run or not.

The leading relay measures it in a thread beside its loop, for the metrics; `outbox_status` asks once.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

from django.core.exceptions import ImproperlyConfigured

from monitoring import metrics

from .handlers import Consumer, consumers
from .offsets import GroupReader, OffsetsNotKnown, PartitionOffsets, read_offsets

logger = logging.getLogger(__name__)

FIRST_SECONDS = 2.0
"""A relay that leads for a moment only needs no Kafka clients for it."""
INTERVAL_SECONDS = 15.0
ANSWER_SECONDS = 5.0

Series = tuple[str, str, str]
"""Consumer, topic, partition: the labels."""


@dataclass(frozen=True)
class Lag:
    """How far a consumer is behind, over all its partitions. `not_known`: why there are no figures, else empty.

    `seconds`: age of the oldest record that is not committed; None also when only that cannot be told.
    """

    events: int | None
    seconds: float | None
    not_known: str = ""


def total(offsets: Sequence[PartitionOffsets]) -> Lag:
    """Sum up a consumer's partitions."""
    seconds = [p.lag_seconds for p in offsets if p.lag_seconds is not None]
    is_whole = len(seconds) == len(offsets)
    return Lag(sum(p.lag_events for p in offsets), max(seconds, default=0.0) if is_whole else None)


def read_lags(timeout_seconds: float) -> dict[str, Lag]:
    """Ask Kafka for the lag of every registered consumer, all at the same time."""
    names = [consumer.name for consumer in consumers()]
    with ThreadPoolExecutor(max(len(names), 1), "lag") as pool:
        return dict(zip(names, pool.map(partial(_read_lag, timeout_seconds), consumers()), strict=True))


def _read_lag(timeout_seconds: float, consumer: Consumer) -> Lag:
    try:
        return total(read_offsets(consumer, timeout_seconds))
    except OffsetsNotKnown as error:
        return Lag(None, None, str(error))


class LagWatch:
    """While it is entered, a thread measures the lag of every registered consumer and shows it as metrics.

    What cannot be measured has no series, and is counted. Leaving it waits for no broker: the series go at once, the
    thread ends when it gets to it.
    """

    def __init__(self) -> None:
        self._thread = threading.Thread(target=self._run, name="lag", daemon=True)
        self._ended = threading.Event()
        self._lock = threading.Lock()  # between showing series and taking them all away
        self._shown: dict[str, set[Series]] = {}
        self._readers: dict[str, GroupReader] = {}
        self._failing: set[str] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        with self._lock:
            for name in list(self._shown):
                self._show(name, [])

    def _run(self) -> None:
        pause_seconds = FIRST_SECONDS
        while not self._ended.wait(pause_seconds):
            started = time.monotonic()
            for consumer in consumers():
                if not self._ended.is_set():
                    self.measure(consumer)
            pause_seconds = max(started + INTERVAL_SECONDS - time.monotonic(), 1.0)
        for name in list(self._readers):
            self._drop_reader(name)

    def measure(self, consumer: Consumer) -> None:
        """Measure one consumer's lag, and show it. Raises nothing: the relay must not care."""
        name = consumer.name
        # It begins at 0: a counter that is born with its first event shows no increase for it.
        failures = metrics.CONSUMER_GROUP_LAG_FAILURES.labels(name)
        try:
            if name not in self._readers:
                self._readers[name] = GroupReader(consumer)
            offsets = self._readers[name].read(ANSWER_SECONDS)
        except Exception as error:
            # A client may lose a broker that is there: the next round has a new one.
            self._drop_reader(name)
            failures.inc()
            if name not in self._failing:
                self._failing.add(name)
                is_expected = isinstance(error, OffsetsNotKnown | ImproperlyConfigured)
                extra = {"consumer": name, "error": str(error)}
                logger.warning("lag not measured", extra=extra, exc_info=None if is_expected else error)
            offsets = []
        else:
            if name in self._failing:
                self._failing.discard(name)
                logger.info("lag measured again", extra={"consumer": name})
        with self._lock:
            if not self._ended.is_set():
                self._show(name, offsets)

    def _show(self, name: str, offsets: Sequence[PartitionOffsets]) -> None:
        shown: set[Series] = set()
        for place in offsets:
            series = (name, place.topic, str(place.partition))
            shown.add(series)
            metrics.CONSUMER_GROUP_LAG.labels(*series).set(place.lag_events)
            if place.lag_seconds is not None:
                metrics.CONSUMER_GROUP_LAG_SECONDS.labels(*series).set(place.lag_seconds)
            else:
                metrics.CONSUMER_GROUP_LAG_SECONDS.remove(*series)
        for series in self._shown.pop(name, set()) - shown:
            metrics.CONSUMER_GROUP_LAG.remove(*series)
            metrics.CONSUMER_GROUP_LAG_SECONDS.remove(*series)
        if shown:
            self._shown[name] = shown

    def _drop_reader(self, name: str) -> None:
        with contextlib.suppress(Exception):
            if (reader := self._readers.pop(name, None)) is not None:
                reader.close()
