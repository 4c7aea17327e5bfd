"""Ended spans on their way to the collector: queued, sent in batches by a thread, never waited for."""

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from multiprocessing.util import Finalize

from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from monitoring.metrics import TRACING_SPANS_DROPPED

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 3.0
"""How long a stopping process waits for the collector to take its last spans."""

DROP_REASONS = (
    "queue_full",
    "export_failed",
    "shutdown",
    "trace_too_large",
    "trace_too_old",
    "too_many_traces",
)
_told: set[str] = set()
_of_the_parent: list[object] = []  # exporters that a fork left behind: gRPC must not even be closed there


def dropped(reason: str, spans: int = 1) -> None:
    """Count spans that will not reach the collector; the log says so once for each of DROP_REASONS."""
    if spans:
        TRACING_SPANS_DROPPED.labels(reason).inc(spans)
        if reason not in _told:
            _told.add(reason)
            logger.warning("spans dropped (told once; tracing_spans_dropped_total counts them)", extra={"why": reason})


class SpanQueue(SpanProcessor):
    """Exports sampled spans in batches from a thread of its own.

    OpenTelemetry's BatchSpanProcessor neither counts what it drops nor ends within a bound, and starts its thread
    and connection before a fork that neither survives. Here both begin with the first span of each process, and what
    is dropped is counted.

    `make_exporter` is called in that thread. `prepare` gives a span the form in which it leaves the process.
    `size`: spans that can wait, further ones are dropped. `batch_size`: most spans of one export.
    `delay_seconds`: how long a span waits for others.
    """

    def __init__(
        self,
        make_exporter: Callable[[], SpanExporter],
        prepare: Callable[[ReadableSpan], ReadableSpan] = lambda span: span,
        *,
        size: int = 2048,
        batch_size: int = 512,
        delay_seconds: float = 5.0,
    ) -> None:
        self._make_exporter = make_exporter
        self._prepare = prepare
        self._size = size
        self._batch_size = batch_size
        self._delay_seconds = delay_seconds
        self._exporter: SpanExporter | None = None
        self._stopping = False
        self._reset()
        for reason in DROP_REASONS:  # counters begin at 0
            TRACING_SPANS_DROPPED.labels(reason)
        reset = weakref.WeakMethod(self._reset)
        os.register_at_fork(after_in_child=lambda: (method := reset()) and method())

    def _reset(self) -> None:
        """Begin anew, with nothing: what a fork copied is the parent's to send."""
        if self._exporter is not None:
            _of_the_parent.append(self._exporter)
        self._exporter = None
        self._queue: deque[ReadableSpan] = deque()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._in_flight = 0
        self._flushing = False

    def on_end(self, span: ReadableSpan) -> None:
        if span.context.trace_flags.sampled:
            self.put(span)

    def put(self, span: ReadableSpan) -> None:
        """Queue a span. Neither waits nor raises."""
        if self._stopping:
            dropped("shutdown")
            return
        # Two threads at once can overshoot by one: a bound, not a quota.
        if len(self._queue) >= self._size:
            dropped("queue_full")
            return
        self._queue.append(span)
        if self._thread is None:
            self._start()
        if len(self._queue) >= self._batch_size:
            self._wake.set()

    def _start(self) -> None:
        with self._lock:
            if self._thread is not None or self._stopping:
                return
            self._thread = threading.Thread(target=self._work, name="span-export", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # the interpreter is ending
                return
            # A process of multiprocessing ends without atexit; this runs in both kinds.
            Finalize(None, self.shutdown, exitpriority=0)

    def _work(self) -> None:
        with suppress_instrumentation():
            while not self._stopping:
                is_full = self._wake.wait(self._delay_seconds)
                self._wake.clear()
                self._export_waiting(self._batch_size if is_full and not self._flushing else 1)
            self._export_waiting(1)

    def _export_waiting(self, at_least: int) -> None:
        while len(self._queue) >= at_least:
            batch = [self._queue.popleft() for _ in range(min(self._batch_size, len(self._queue)))]
            self._in_flight = len(batch)
            try:
                if self._exporter is None:
                    self._exporter = self._make_exporter()
                result = self._exporter.export([self._prepare(span) for span in batch])
            except Exception:
                logger.exception("spans could not be exported")
                result = SpanExportResult.FAILURE
            if result is not SpanExportResult.SUCCESS and self._in_flight:
                dropped("export_failed", len(batch))
            self._in_flight = 0

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Wait until nothing waits any more; False when that took too long."""
        deadline = time.monotonic() + timeout_millis / 1000
        self._flushing = True
        try:
            while self._queue or self._in_flight:
                if time.monotonic() > deadline or self._thread is None:
                    return False
                self._wake.set()
                time.sleep(0.005)
            return True
        finally:
            self._flushing = False

    def shutdown(self) -> None:
        """Send the last spans, for FLUSH_SECONDS at most. Spans that end later are dropped."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            thread = self._thread
        if thread is None:
            return
        self._wake.set()
        thread.join(FLUSH_SECONDS)
        if thread.is_alive():
            left, self._in_flight = len(self._queue) + self._in_flight, 0
            self._queue.clear()
            dropped("shutdown", left)
            logger.warning("the last %s spans could not be exported within %s s", left, FLUSH_SECONDS)
        if self._exporter is not None:
            self._exporter.shutdown()
