"""What the author of a consumer writes against: `Consumer`, `Event`, `RetryPolicy`.

A consumer and its handlers are registered in an app's `event_handlers.py`, found by autodiscovery:

    analytics = Consumer("analytics", group_id="analytics-service")

    @analytics.handles("conversation.created")
    def count_conversation(event: Event) -> None:
        ...

A handler runs in a database transaction that also holds the mark "processed", so what it writes there happens
exactly once per event. Events of one aggregate are handled in the order they were published.
"""

import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, TypeVar

from google.protobuf.message import Message
from opentelemetry import trace
from opentelemetry.propagate import extract
from opentelemetry.trace import Link, SpanKind

from monitoring import context, metrics

from .catalog import topic_for, topics
from .exceptions import DuplicateRegistration


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """An event as a handler sees it: the specification's BaseEvent with its typed payload, and where it lay."""

    event_id: uuid.UUID
    event_type: str
    event_version: str
    aggregate_id: str
    tenant_id: str
    user_id: str
    timestamp: datetime
    payload: Message
    metadata: Mapping[str, str]
    correlation_id: str
    causation_id: str
    headers: Mapping[str, str] = field(default_factory=dict)
    topic: str = ""
    partition: int = -1
    offset: int = -1


current_event: ContextVar[Event | None] = ContextVar("current_event", default=None)
"""The event being handled: what `emit_event()` in a handler takes causation and correlation from."""


@contextmanager
def handling(event: Event) -> Iterator[None]:
    """Make `event` the current one, for `emit_event()` and for the log lines of its handler."""
    tokens = [
        (variable, variable.set(value))
        for variable, value in (
            (context.correlation_id, event.correlation_id),
            (context.tenant_id, event.tenant_id),
            (context.event_id, str(event.event_id)),
        )
    ]
    token = current_event.set(event)
    try:
        yield
    finally:
        current_event.reset(token)
        for variable, variable_token in tokens:
            variable.reset(variable_token)


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often and how patiently a failing event is tried again (specification, RetryHandler: 100, 200, 400 ms)."""

    max_retries: int = 3
    initial_delay_seconds: float = 0.1
    multiplier: float = 2.0
    max_delay_seconds: float = 30.0

    def delays_seconds(self) -> list[float]:
        """The pause before each retry."""
        return [
            min(self.initial_delay_seconds * self.multiplier**retry, self.max_delay_seconds)
            for retry in range(self.max_retries)
        ]


OnFailure = Literal["skip", "park_key", "stop"]
EventFunction = TypeVar("EventFunction", bound=Callable[[Event], None])
BatchFunction = TypeVar("BatchFunction", bound=Callable[[list[Event]], None])


@dataclass(frozen=True)
class Handler:
    """A registered function: of one event, or with `is_batch` of a list of events in order."""

    function: Callable[..., None]
    is_batch: bool

    @property
    def name(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}"


@dataclass(frozen=True)
class FailureGuard:
    max_failed_share: float = 0.5
    window_events: int = 100


@dataclass(frozen=True)
class Route:
    """Where an event goes: its handler, and the version that it is upcast to."""

    handler: Handler
    version: str


_tracer = trace.get_tracer(__name__)
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,99}")
_PATTERN = re.compile(r"\*|[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*(\.\*)?")
_consumers: dict[str, "Consumer"] = {}


class Consumer:
    """A named group of handlers, run by `python manage.py consume NAME`.

    `group_id`: the Kafka consumer group. `topics`: None derives them from the handlers. `on_failure`, once the
    retries are used up: "skip" keeps a dead letter and goes on; "park_key" also parks the later events of the same
    key behind it; "stop" ends the process with the event unhandled.

    Raises DuplicateRegistration for a name taken already, ValueError for a name that is not one.
    """

    def __init__(
        self,
        name: str,
        group_id: str,
        *,
        topics: Sequence[str] | None = None,
        on_failure: OnFailure = "skip",
        retry: RetryPolicy | None = None,
        start_at: Literal["earliest", "latest"] | datetime = "earliest",
        guard: FailureGuard | None = FailureGuard(),
    ) -> None:
        if not _NAME.fullmatch(name):
            raise ValueError(f"consumer name {name!r} must be lower-case letters, digits, - and _")
        if on_failure not in ("skip", "park_key", "stop"):
            raise ValueError(f'on_failure is {on_failure!r}: use "skip", "park_key" or "stop"')
        if name in _consumers:
            raise DuplicateRegistration(f"consumer {name} is registered twice")
        self.name = name
        self.group_id = group_id
        self.on_failure = on_failure
        self.retry = retry or RetryPolicy()
        self.start_at = start_at
        self.guard = guard
        self._topics = topics
        self._handlers: dict[str, Handler] = {}
        _consumers[name] = self

    def __repr__(self) -> str:
        return f"Consumer({self.name!r}, group_id={self.group_id!r})"

    def handles(self, *event_types: str) -> Callable[[EventFunction], EventFunction]:
        """Register a function of one event for event types or patterns ("conversation.*", "*").

        Of several that match an event the most specific one runs: the exact type, then the longest pattern.
        Raises DuplicateRegistration when one of them has a handler already.
        """

        def register(function: EventFunction) -> EventFunction:
            self._register(event_types, Handler(function, is_batch=False))
            return function

        return register

    def handles_batch(self, *event_types: str) -> Callable[[BatchFunction], BatchFunction]:
        """Register a function of many events, called with those of a batch that are its to handle, in order.

        An event it emits gets no causation or correlation by itself, as several may have caused it: give them.
        """

        def register(function: BatchFunction) -> BatchFunction:
            self._register(event_types, Handler(function, is_batch=True))
            return function

        return register

    def _register(self, event_types: tuple[str, ...], handler: Handler) -> None:
        if not event_types:
            raise ValueError(f"{handler.name}: name at least one event type")
        for event_type in event_types:
            if not _PATTERN.fullmatch(event_type):
                raise ValueError(f"{event_type!r} is neither an event type nor a pattern such as conversation.* or *")
            if event_type in self._handlers:
                raise DuplicateRegistration(
                    f"consumer {self.name} has two handlers of {event_type}: "
                    f"{self._handlers[event_type].name} and {handler.name}"
                )
            self._handlers[event_type] = handler

    def handler_for(self, event_type: str) -> Handler | None:
        """The handler of an event type; None when this consumer does not care for it."""
        if handler := self._handlers.get(event_type):
            return handler
        domain = event_type
        while "." in domain:
            domain = domain.rpartition(".")[0]
            if handler := self._handlers.get(f"{domain}.*"):
                return handler
        return self._handlers.get("*")

    def route(self, event_type: str, version: str) -> Route | None:
        handler = self.handler_for(event_type)
        return Route(handler, version) if handler else None

    @property
    def event_types(self) -> list[str]:
        """The registered event types and patterns."""
        return sorted(self._handlers)

    @property
    def topics(self) -> list[str]:
        """The topics to subscribe to."""
        if self._topics is not None:
            return list(self._topics)
        if "*" in self._handlers:
            return topics()
        return sorted({topic_for(event_type) for event_type in self._handlers})


def consumer_named(name: str) -> Consumer:
    """Return a registered consumer. Raises LookupError, naming those there are."""
    try:
        return _consumers[name]
    except KeyError:
        known = ", ".join(sorted(_consumers)) or "none"
        raise LookupError(f"no consumer named {name}; registered: {known}") from None


def consumers() -> list[Consumer]:
    """Return all registered consumers, by name."""
    return [_consumers[name] for name in sorted(_consumers)]


def call_handler(
    consumer_name: str, handler: Handler, events: list[Event], between: Callable[[], None] = lambda: None
) -> None:
    """Run a handler on events that are its to handle, in order, with their context, spans and duration.

    `between` is called before each call of the handler.
    """
    started = time.perf_counter()
    if handler.is_batch:
        between()
        with _batch_span(events):
            handler.function(events)
    else:
        for event in events:
            between()
            with handling(event), _event_span(event):
                handler.function(event)
    metrics.CONSUMER_HANDLER_SECONDS.labels(consumer_name, handler.name).observe(time.perf_counter() - started)


@contextmanager
def _event_span(event: Event) -> Iterator[None]:
    """The span `process <topic>`: child of the span that emitted the event, and linked to it."""
    parent = extract(event.headers)
    creation = trace.get_current_span(parent).get_span_context()
    with _tracer.start_as_current_span(
        f"process {event.topic}",
        context=parent,
        kind=SpanKind.CONSUMER,
        links=[Link(creation)] if creation.is_valid else [],
        attributes={
            "messaging.system": "kafka",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": event.topic,
            "messaging.destination.partition.id": str(event.partition),
            "messaging.kafka.offset": event.offset,
            "messaging.message.id": str(event.event_id),
        },
    ):
        yield


@contextmanager
def _batch_span(events: Sequence[Event]) -> Iterator[None]:
    """The span of a batch handler's call, linked to the spans that emitted its events."""
    with _tracer.start_as_current_span("process batch", kind=SpanKind.CONSUMER) as span:
        if span.is_recording():
            span.set_attribute("messaging.system", "kafka")
            span.set_attribute("messaging.operation.type", "process")
            span.set_attribute("messaging.batch.message_count", len(events))
            for event in events:
                span.add_link(trace.get_current_span(extract(event.headers)).get_span_context())
        yield
