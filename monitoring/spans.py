"""A span in the form in which it leaves the process: flagged as sampled, without what must not be seen outside."""

import re
from collections.abc import Sequence

from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

_FRAME = re.compile(r'[ |]*File ".*", line \d+, in \S+$')
_CHAINING = (
    "Traceback (most recent call last):",
    "The above exception was the direct cause of the following exception:",
    "During handling of the above exception, another exception occurred:",
)


class _Changed(ReadableSpan):
    """A copy of an ended span with another context, status or events."""

    def __init__(
        self,
        span: ReadableSpan,
        *,
        context: SpanContext | None = None,
        status: Status | None = None,
        events: Sequence[Event] | None = None,
    ) -> None:
        super().__init__(
            name=span.name,
            context=context or span.context,
            parent=span.parent,
            resource=span.resource,
            attributes=span.attributes,
            events=span.events if events is None else events,
            links=span.links,
            kind=span.kind,
            status=status or span.status,
            start_time=span.start_time,
            end_time=span.end_time,
            instrumentation_scope=span.instrumentation_scope,
        )
        # The SDK reads these off its own containers, which a copy does not have.
        self._dropped = (span.dropped_attributes, span.dropped_events, span.dropped_links)

    @property
    def dropped_attributes(self) -> int:
        return self._dropped[0]

    @property
    def dropped_events(self) -> int:
        return self._dropped[1]

    @property
    def dropped_links(self) -> int:
        return self._dropped[2]


def as_sampled(span: ReadableSpan) -> ReadableSpan:
    """The span with the sampled flag, without which no processor and no collector takes it."""
    return _Changed(span, context=with_sampled_flag(span.context))


def with_sampled_flag(ids: SpanContext) -> SpanContext:
    flags = TraceFlags(ids.trace_flags | TraceFlags.SAMPLED)
    return SpanContext(ids.trace_id, ids.span_id, ids.is_remote, flags, ids.trace_state)


def answered_well(span: ReadableSpan) -> ReadableSpan:
    """The span of a request answered 4xx without the error that the instrumentation sees in Django's Http404.

    The conventions: the client's mistakes are not errors of the server.
    """
    if span.status.status_code is StatusCode.ERROR and span.kind is SpanKind.SERVER and span.attributes:
        answered = span.attributes.get("http.response.status_code")
        if isinstance(answered, int) and 400 <= answered < 500:
            return _Changed(span, status=Status(StatusCode.UNSET))
    return span


def without_messages(span: ReadableSpan) -> ReadableSpan:
    """The span with the type and the place of its exceptions, without their text.

    What somebody has written to an assistant turns up in the messages of exceptions: a KeyError, a unique constraint.
    """
    if not any(event.name == "exception" for event in span.events):
        return span
    status, events = span.status, []
    for event in span.events:
        if event.name != "exception":
            events.append(event)
            continue
        attributes = dict(event.attributes or {})
        name, message = str(attributes.get("exception.type", "")), str(attributes.pop("exception.message", ""))
        if status.description and status.description == f"{name.rpartition('.')[2]}: {message}":
            status = Status(status.status_code, name)
        attributes["exception.stacktrace"] = _frames(str(attributes.get("exception.stacktrace", "")))
        events.append(Event(event.name, attributes, event.timestamp))
    return _Changed(span, status=status, events=events)


def _frames(stacktrace: str) -> str:
    """The frames of a traceback: files, lines and functions. Source lines look like those of a message."""
    lines = stacktrace.splitlines()
    return "\n".join(line for line in lines if _FRAME.match(line) or line.strip(" |+-") in _CHAINING)
