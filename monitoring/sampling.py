"""Which traces are exported: a share of them, and every one in which something failed."""

import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, StatusCode, TraceState
from opentelemetry.util.types import Attributes

from monitoring import context
from monitoring.span_queue import SpanQueue, dropped
from monitoring.spans import as_sampled, with_sampled_flag

_RANDOM_BITS = (1 << 64) - 1  # of a trace id: as OpenTelemetry's TraceIdRatioBased, so that services agree
_SAMPLED_DIGITS = frozenset("13579bdf")

MAX_TRACES = 2_000
MAX_SPANS = 20_000
MAX_SPANS_OF_TRACE = 1_000
MAX_AGE_SECONDS = 600.0


def is_sampled(traceparent: str) -> bool:
    """Whether a W3C traceparent says that its trace is recorded; False for none."""
    # Of the two digits of flags the last one decides; the bit next to it says that the id is random.
    return traceparent[54:55] in _SAMPLED_DIGITS


class ShareSampler(Sampler):
    """Samples `rate` of the new traces and follows whoever began the others.

    `follows_caller`: False decides anew where the trace came from another process. `keeps_unsampled`: spans that are
    not sampled are recorded all the same, unflagged, for a processor that may want them.
    """

    def __init__(self, rate: float, *, follows_caller: bool = True, keeps_unsampled: bool = False) -> None:
        self._bound = round(rate * (_RANDOM_BITS + 1))
        self._follows_caller = follows_caller
        self._keeps_unsampled = keeps_unsampled

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        parent = trace.get_current_span(parent_context).get_span_context()
        trace_state = parent.trace_state if parent.is_valid else None
        if parent.is_valid and (self._follows_caller or not parent.is_remote):
            sampled = bool(parent.trace_flags.sampled)
        elif not parent.is_valid and (traceparent := context.trace_headers.get().get("traceparent", "")):
            # Work on a trace that has no span here, since it is not recorded: what it does inside is not either.
            sampled = is_sampled(traceparent)
        else:
            sampled = trace_id & _RANDOM_BITS < self._bound
        if sampled:
            return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes, trace_state)
        if self._keeps_unsampled and context.records_unsampled.get():
            return SamplingResult(Decision.RECORD_ONLY, attributes, trace_state)
        return SamplingResult(Decision.DROP, None, trace_state)

    def get_description(self) -> str:
        return f"ShareSampler{{{self._bound / (_RANDOM_BITS + 1)}}}"


def has_failed(span: ReadableSpan) -> bool:
    """Whether an ended span says that what it stands for failed; a request answered 4xx has not."""
    status = span.status.status_code is StatusCode.ERROR
    if span.kind is SpanKind.SERVER:
        attributes = span.attributes or {}
        answered = attributes.get("http.response.status_code", attributes.get("http.status_code"))
        if isinstance(answered, int):
            return answered >= 500 or (status and answered < 400)
    return status


Deferred = Callable[[], None]
"""Makes a span of something that is over."""


def _make_sampled(parent: SpanContext, make: Callable[[Context], None]) -> None:
    make(trace.set_span_in_context(NonRecordingSpan(with_sampled_flag(parent))))


@dataclass(slots=True)
class _Held:
    """The unsampled spans of a trace in this process, until its last open one ends or one has failed."""

    since: float
    open: int = 0
    failed: bool = False
    spans: list[ReadableSpan | Deferred] = field(default_factory=list)


class FailedTraces(SpanProcessor):
    """Passes sampled spans on, and unsampled ones too once a span of their trace in this process has failed.

    Until then they are held; when the last open span of the trace has ended well, they are forgotten. What is held is
    bounded: MAX_SPANS_OF_TRACE in a trace, beyond which only failed ones are kept; MAX_TRACES, MAX_SPANS in all and
    MAX_AGE_SECONDS, beyond which the oldest trace is given up. What is given up counts as dropped, and a failed span
    of it is still exported, alone.
    """

    def __init__(self, queue: SpanQueue) -> None:
        self._queue = queue
        self._reset()
        reset = weakref.WeakMethod(self._reset)
        os.register_at_fork(after_in_child=lambda: (method := reset()) and method())

    def _reset(self) -> None:
        # Reentrant: the garbage collector may end a span anywhere, here too.
        self._lock = threading.RLock()
        self._traces: dict[int, _Held] = {}  # by trace id, oldest first
        self._spans_held = 0

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        ids = span.get_span_context()
        if ids.trace_flags.sampled:
            return
        with self._lock:
            held = self._traces.get(ids.trace_id)
            if held is None:
                now = time.monotonic()
                self._give_up_oldest(now)
                held = self._traces[ids.trace_id] = _Held(now)
            held.open += 1

    def on_end(self, span: ReadableSpan) -> None:
        ids = span.context
        if ids.trace_flags.sampled:
            self._queue.put(span)
            return
        failed = has_failed(span)
        with self._lock:
            held = self._traces.get(ids.trace_id)
            kept: list[ReadableSpan | Deferred] = []
            if held is not None:
                kept = self._hold(held, span, failed)
                held.open -= 1
                if held.open <= 0 and self._traces.get(ids.trace_id) is held:
                    del self._traces[ids.trace_id]
                    self._spans_held -= len(held.spans)
            elif failed:  # its trace was given up, or begun before a fork
                kept = [span]
        for one in kept:
            if isinstance(one, ReadableSpan):
                self._queue.put(as_sampled(one))
            else:
                one()

    def defer(self, parent: SpanContext, make: Callable[[Context], None]) -> bool:
        """Hold what makes a span that is over, in the context of its parent, instead of the span: it is much cheaper.

        False where the trace is not held here, or has failed: the span is to be made now.
        """
        if parent.trace_flags.sampled:
            return False
        with self._lock:
            held = self._traces.get(parent.trace_id)
            if held is None or held.failed:
                return False
            self._hold(held, partial(_make_sampled, parent, make), False)
        return True

    def _hold(self, held: _Held, span: ReadableSpan | Deferred, failed: bool) -> list[ReadableSpan | Deferred]:
        """Hold a span, or return what of its trace can go out now."""
        if failed or held.failed:
            held.failed = True
            kept: list[ReadableSpan | Deferred] = [*held.spans, span]
            self._spans_held -= len(held.spans)
            held.spans = []
            return kept
        if len(held.spans) >= MAX_SPANS_OF_TRACE:
            dropped("trace_too_large")
            return []
        held.spans.append(span)
        self._spans_held += 1
        if self._spans_held > MAX_SPANS:
            self._give_up_oldest(time.monotonic())
        return []

    def _give_up_oldest(self, now: float) -> None:
        while self._traces:
            trace_id, oldest = next(iter(self._traces.items()))
            if now - oldest.since > MAX_AGE_SECONDS:
                reason = "trace_too_old"
            elif len(self._traces) >= MAX_TRACES or self._spans_held > MAX_SPANS:
                reason = "too_many_traces"
            else:
                return
            del self._traces[trace_id]
            self._spans_held -= len(oldest.spans)
            dropped(reason, len(oldest.spans))
            oldest.spans = []

    def shutdown(self) -> None:
        self._queue.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._queue.force_flush(timeout_millis)
