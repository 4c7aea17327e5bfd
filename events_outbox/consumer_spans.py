"""The spans of handlers' calls: `process <topic>`, after OpenTelemetry's conventions for messaging and Kafka."""

import time
from collections.abc import Sequence
from contextlib import suppress
from contextvars import Token
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from opentelemetry import trace
from opentelemetry.context import Context, attach, detach, get_current
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode

from monitoring import context
from monitoring.tracing import may_record

from .trace_context import W3C, span_contexts

if TYPE_CHECKING:
    from .handlers import Event

_tracer = trace.get_tracer(__name__)


class handler_span:
    """The span of a call in a block: with one event child of the span that emitted it, and linked to it; else linked.

    `is_first_try_of_many`: only a sampled trace gets a span then. One that is not, and fails, gets it afterwards.
    Not a generator: each event comes by here.
    """

    __slots__ = ("_events", "_group_id", "_is_first_try_of_many", "_span", "_started_ns", "_token")

    _span: Span | None
    _token: Token[Context]

    def __init__(self, group_id: str, events: Sequence["Event[Any]"], is_first_try_of_many: bool = False) -> None:
        self._group_id = group_id
        self._events = events
        self._is_first_try_of_many = is_first_try_of_many

    def __enter__(self) -> Self:
        events = self._events
        traceparent = events[0].headers.get("traceparent", "") if len(events) == 1 else ""
        if may_record(traceparent, if_failed=not self._is_first_try_of_many):
            parent = _parent(events)
            self._span = _start(self._group_id, events, parent)
            self._token = attach(trace.set_span_in_context(self._span, parent))
        else:
            self._span = None
            self._started_ns = time.time_ns()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        span = self._span
        if span is not None:
            detach(self._token)
        if isinstance(error, Exception):
            if span is not None and span.is_recording():
                _fail(span, error)
            else:
                started_ns = self._started_ns if span is None else time.time_ns()
                trace_failure(self._group_id, self._events, error, started_ns)
        if span is not None:
            span.end()


def trace_failure(group_id: str, events: Sequence["Event[Any]"], error: Exception, started_ns: int) -> None:
    """Make the span of what failed without one. Does nothing for an error that a span has been made of."""
    if not may_record() or getattr(error, "_is_traced", False):
        return
    records_unsampled = context.records_unsampled.set(True)
    try:
        span = _start(group_id, events, _parent(events), started_ns)
        _fail(span, error)
        span.end()
    finally:
        context.records_unsampled.reset(records_unsampled)


def _parent(events: Sequence["Event[Any]"]) -> Context:
    """With the baggage too: what the handler emits carries it on."""
    return W3C.extract(events[0].headers, context=get_current()) if len(events) == 1 else get_current()


def _start(group_id: str, events: Sequence["Event[Any]"], parent: Context, started_ns: int | None = None) -> Span:
    topics = {event.topic for event in events}
    topic = topics.pop() if len(topics) == 1 else ""
    attributes: dict[str, str | int] = {
        "messaging.system": "kafka",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
    }
    if group_id:
        attributes["messaging.consumer.group.name"] = group_id
    if topic:
        attributes["messaging.destination.name"] = topic
    links: list[Link] = []
    if len(events) == 1:
        event = events[0]
        attributes |= {
            "messaging.message.id": str(event.event_id),
            "messaging.kafka.message.key": event.aggregate_id,
            "messaging.message.conversation_id": event.correlation_id,
        }
        if event.partition >= 0:
            attributes["messaging.destination.partition.id"] = str(event.partition)
            attributes["messaging.kafka.offset"] = event.offset
        links = [Link(ids) for ids in span_contexts([event.headers])]
    else:
        attributes["messaging.batch.message_count"] = len(events)
    span = _tracer.start_span(
        f"process {topic}".rstrip(), parent, SpanKind.CONSUMER, attributes, links, start_time=started_ns
    )
    if len(events) > 1 and span.is_recording():  # links are dear: not for a span that is not recorded
        for ids in span_contexts(event.headers for event in events):
            span.add_link(ids)
    return span


def _fail(span: Span, error: Exception) -> None:
    kind = type(error)
    span.set_attribute("error.type", f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins."))
    span.record_exception(error)
    span.set_status(Status(StatusCode.ERROR, f"{kind.__name__}: {error}"))
    with suppress(Exception):
        error._is_traced = True  # type: ignore[attr-defined]
