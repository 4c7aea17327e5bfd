"""What the author of a consumer writes against: `Consumer` and `Event`. docs/handlers.md is the guide.

A consumer and its handlers are registered in an app's `event_handlers.py`, found by autodiscovery:

    analytics = Consumer("analytics", group_id="analytics-service")

    @analytics.handles("conversation.created")
    def count_conversation(event: Event[ConversationCreatedPayload]) -> None:
        ...

A handler runs in a database transaction that also holds the mark "processed", so what it writes there happens
exactly once per event. Events of one aggregate are handled in the order they were published.
"""

import inspect
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, Generic, Literal, Protocol

from google.protobuf.message import Message
from typing_extensions import TypeVar

from monitoring import context, metrics
from monitoring.tracing import may_record

from .catalog import check_version, topic_for, topics, versions_from
from .consumer_spans import handler_span
from .exceptions import DuplicateRegistration
from .policies import FailureGuard, RetryPolicy

Payload = TypeVar("Payload", bound=Message, default=Message)


# Not frozen, as others here are: one is made for each event, and a frozen one takes four times as long to make.
@dataclass(slots=True, kw_only=True)
class Event(Generic[Payload]):
    """An event as a handler sees it, to read only: the specification's BaseEvent, its payload, and where it lay.

    `Event[OrderPlacedPayload]` says of which message the payload is; the catalog sees to it. `event_version` is that
    of the payload, also where an upcaster made it. `timestamp`: when it happened, in UTC. `headers`: the record's,
    as text. `partition` and `offset`: -1 where it did not come out of Kafka.
    """

    event_id: uuid.UUID
    event_type: str
    event_version: str
    aggregate_id: str
    tenant_id: str
    user_id: str
    timestamp: datetime
    payload: Payload
    metadata: Mapping[str, str]
    correlation_id: str
    causation_id: str
    headers: Mapping[str, str] = field(default_factory=dict)
    topic: str = ""
    partition: int = -1
    offset: int = -1


current_event: ContextVar[Event | None] = ContextVar("current_event", default=None)
"""The event being handled: what `emit_event()` in a handler takes causation and correlation from."""


class handling:
    """Make `event` the current one in a block, for `emit_event()` and for the log lines of its handler.

    Not a generator: each event comes by here.
    """

    __slots__ = ("_correlation_id", "_current", "_event", "_event_id", "_tenant_id", "_trace_headers")

    _correlation_id: Token[str]
    _tenant_id: Token[str]
    _event_id: Token[str | uuid.UUID]
    _trace_headers: Token[Mapping[str, str]]
    _current: Token[Event | None]

    def __init__(self, event: Event[Any]) -> None:
        self._event = event

    def __enter__(self) -> None:
        event = self._event
        self._correlation_id = context.correlation_id.set(event.correlation_id)
        self._tenant_id = context.tenant_id.set(event.tenant_id)
        self._event_id = context.event_id.set(event.event_id)
        self._trace_headers = context.trace_headers.set(event.headers)
        self._current = current_event.set(event)

    def __exit__(self, *_: object) -> None:
        current_event.reset(self._current)
        context.trace_headers.reset(self._trace_headers)
        context.event_id.reset(self._event_id)
        context.tenant_id.reset(self._tenant_id)
        context.correlation_id.reset(self._correlation_id)


OnFailure = Literal["skip", "park_key", "stop"]
StartAt = Literal["earliest", "latest"] | datetime
EventFunction = TypeVar("EventFunction", bound=Callable[[Event[Any]], None])
BatchFunction = TypeVar("BatchFunction", bound=Callable[[list[Event[Any]]], None])


class EventHandler(Protocol):
    """A handler object (specification, EventHandler)."""

    def supported_event_types(self) -> Iterable[str]:
        """The event types, or patterns of them, that it handles."""

    def handle(self, event: Event[Any], /) -> None: ...


class BatchEventHandler(Protocol):
    """A handler object that takes the events of a batch at once."""

    def supported_event_types(self) -> Iterable[str]: ...

    def handle_batch(self, events: list[Event[Any]], /) -> None: ...


HandlerObject = TypeVar(
    "HandlerObject", bound=EventHandler | BatchEventHandler | type[EventHandler] | type[BatchEventHandler]
)


@dataclass(frozen=True)
class Handler:
    """A registered function: of one event, or with `is_batch` of a list of events in order."""

    function: Callable[..., None]
    is_batch: bool

    @property
    def name(self) -> str:
        function = self.function
        name = getattr(function, "__qualname__", None) or type(function).__qualname__
        return f"{function.__module__}.{name}"


@dataclass(frozen=True, slots=True)
class Route:
    """Who handles an event, and the version that its payload is upcast to for that."""

    handler: Handler
    version: str


_NAME = re.compile(r"[a-z][a-z0-9_-]{0,99}")
_PATTERN = re.compile(r"\*|[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*(\.\*)?")
_TOPIC = re.compile(r"[a-zA-Z0-9._-]{1,249}")
_ROUTES_KEPT = 1000  # more than there are types and versions; records of made-up types may not grow without end
_consumers: dict[str, "Consumer"] = {}


class Consumer:
    """A named group of handlers, run by `python manage.py consume NAME`.

    `group_id`: the Kafka consumer group.
    `topics`: None derives them from the handlers.
    `on_failure`, once the retries are used up: "skip" keeps a dead letter and goes on; "park_key" also parks the later
    events of the same key behind it; "stop" ends the process with the event unhandled.
    `retry`: None is the specification's 100, 200 and 400 ms.
    `start_at`: where a group that has committed nothing yet begins: "earliest", "latest", or at a time (aware).
    `guard`: pauses the consumer when too large a share of the last events fails; None for no guard.
    `batch_size`: events in one transaction, at most, where the command line does not say; None takes
    EVENTS_OUTBOX["CONSUMER_BATCH_SIZE"]. 1 is for handlers that take long, or lock what others wait for.

    Raises DuplicateRegistration for a name taken already, ValueError or TypeError for an option that is wrong.
    """

    def __init__(
        self,
        name: str,
        group_id: str,
        *,
        topics: Sequence[str] | None = None,
        on_failure: OnFailure = "skip",
        retry: RetryPolicy | None = None,
        start_at: StartAt = "earliest",
        guard: FailureGuard | None = FailureGuard(),  # noqa: B008  (it cannot be changed)
        batch_size: int | None = None,
    ) -> None:
        if not _NAME.fullmatch(name):
            raise ValueError(f"consumer name {name!r} must be lower-case letters, digits, - and _")
        if not isinstance(group_id, str) or not group_id:
            raise ValueError(f"consumer {name}: group_id is {group_id!r}; it must be text, and not empty")
        _check_topics(name, topics)
        if on_failure not in ("skip", "park_key", "stop"):
            raise ValueError(f'on_failure is {on_failure!r}: use "skip", "park_key" or "stop"')
        if retry is not None and not isinstance(retry, RetryPolicy):
            raise TypeError(f"consumer {name}: retry is {retry!r}: use RetryPolicy(...)")
        if guard is not None and not isinstance(guard, FailureGuard):
            raise TypeError(f"consumer {name}: guard is {guard!r}: use FailureGuard(...), or None for no guard")
        if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
            raise ValueError(f"consumer {name}: batch_size is {batch_size!r}; it must be a whole number, at least 1")
        _check_start(name, start_at)
        if name in _consumers:
            raise DuplicateRegistration(f"consumer {name} is registered twice")
        self.name = name
        self.group_id = group_id
        self.on_failure = on_failure
        self.retry = retry or RetryPolicy()
        self.start_at = start_at
        self.guard = guard
        self.batch_size = batch_size
        self._topics = topics
        self._handlers: dict[str, Handler] = {}  # of any version, by event type or pattern
        self._version_handlers: dict[str, dict[str, Handler]] = {}  # the same, of one version alone
        self._routes = lru_cache(_ROUTES_KEPT)(self._find_route)
        _consumers[name] = self

    @property
    def handlers(self) -> list[tuple[str, str | None, Handler]]:
        """What is registered: event type or pattern, the version it is for (None: any), the handler."""
        by_version: list[tuple[str | None, dict[str, Handler]]] = [(None, self._handlers)]
        by_version += sorted(self._version_handlers.items())
        return [
            (event_type, version, handlers[event_type])
            for version, handlers in by_version
            for event_type in sorted(handlers)
        ]

    def __repr__(self) -> str:
        return f"Consumer({self.name!r}, group_id={self.group_id!r})"

    def handles(self, *event_types: str, version: str | None = None) -> Callable[[EventFunction], EventFunction]:
        """Register a function of one event for event types or patterns ("conversation.*", "*").

        `version`: of the payload that it takes, e.g. "v2"; events of earlier versions come upcast to it. None takes
        those that no handler names the version of, upcast as far as upcasters lead. Of several that match an event
        the most specific one runs: the exact type, then the longest pattern.

        Raises DuplicateRegistration when one of them has a handler already, ValueError for what is no event type,
        pattern or version, TypeError for an `async` function: handlers run in a database transaction.
        """

        def register(function: EventFunction) -> EventFunction:
            self._register(event_types, version, Handler(function, is_batch=False))
            return function

        return register

    def handles_batch(self, *event_types: str, version: str | None = None) -> Callable[[BatchFunction], BatchFunction]:
        """Register a function of many events, called with those of a batch that are its to handle, in order.

        An event it emits gets no causation or correlation by itself, as several may have caused it: give them.
        Otherwise as `handles()`.
        """

        def register(function: BatchFunction) -> BatchFunction:
            self._register(event_types, version, Handler(function, is_batch=True))
            return function

        return register

    def register(self, handler: HandlerObject, *, version: str | None = None) -> HandlerObject:
        """Register a handler object, or a class of them that is made without arguments (specification, EventHandler).

        It has `supported_event_types()`, a list of event types or patterns, and either `handle(event)` or
        `handle_batch(events)`. Returns what it was given, so it can stand over a class. Raises as `handles()` does,
        and TypeError for an object that lacks a method.
        """
        one = handler() if isinstance(handler, type) else handler
        functions = [getattr(one, name, None) for name in ("handle", "handle_batch")]
        if sum(map(callable, functions)) != 1 or not callable(getattr(one, "supported_event_types", None)):
            raise TypeError(
                f"{handler!r} is no handler: it needs supported_event_types() and either handle(event) or "
                "handle_batch(events)"
            )
        event_types = one.supported_event_types()
        if isinstance(event_types, str):
            raise TypeError(f"{handler!r}: supported_event_types() returned text, not a list of event types")
        function = functions[0] or functions[1]
        assert function is not None  # noqa: S101  (narrowing)
        self._register(tuple(event_types), version, Handler(function, is_batch=function is functions[1]))
        return handler

    def _register(self, event_types: tuple[str, ...], version: str | None, handler: Handler) -> None:
        function = inspect.unwrap(handler.function)
        if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
            raise TypeError(f"{handler.name} would not run when it is called: a handler is neither async nor generator")
        if not event_types:
            raise ValueError(f"{handler.name}: name at least one event type")
        for event_type in event_types:
            if not isinstance(event_type, str) or not _PATTERN.fullmatch(event_type):
                raise ValueError(f"{event_type!r} is neither an event type nor a pattern such as conversation.* or *")
            if version is not None:
                check_version(event_type, version)
        handlers = self._handlers if version is None else self._version_handlers.setdefault(version, {})
        for event_type in event_types:
            if event_type in handlers:
                raise DuplicateRegistration(
                    f"consumer {self.name} has two handlers of {event_type}{f' {version}' if version else ''}: "
                    f"{handlers[event_type].name} and {handler.name}"
                )
            handlers[event_type] = handler
        self._routes.cache_clear()

    def route(self, event_type: str, version: str) -> Route | None:
        """Who handles an event of this type and version; None when this consumer does not care for it.

        Of the versions that upcasters lead to, from its own on, it is the first one that a handler names; else the
        last one, with a handler that names no version.
        """
        return self._routes(event_type, version)

    def _find_route(self, event_type: str, version: str) -> Route | None:
        versions = versions_from(event_type, version)
        for reached in versions:
            if handler := _most_specific(self._version_handlers.get(reached, {}), event_type):
                return Route(handler, reached)
        handler = _most_specific(self._handlers, event_type)
        return Route(handler, versions[-1]) if handler else None

    @property
    def event_types(self) -> list[str]:
        """The registered event types and patterns."""
        return sorted({*self._handlers}.union(*self._version_handlers.values()))

    @property
    def topics(self) -> list[str]:
        """The topics to subscribe to."""
        if self._topics is not None:
            return list(self._topics)
        event_types = self.event_types
        if "*" in event_types:
            return topics()
        return sorted({topic_for(event_type) for event_type in event_types})


def _most_specific(handlers: Mapping[str, Handler], event_type: str) -> Handler | None:
    """The handler of the exact type, else of the longest pattern."""
    if handler := handlers.get(event_type):
        return handler
    domain = event_type
    while "." in domain:
        domain = domain.rpartition(".")[0]
        if handler := handlers.get(f"{domain}.*"):
            return handler
    return handlers.get("*")


def _check_topics(consumer: str, topics: Sequence[str] | None) -> None:
    if topics is None:
        return
    if isinstance(topics, str) or not topics:
        raise TypeError(f"consumer {consumer}: topics is {topics!r}: use a list of topics, or None for the handlers'")
    for topic in topics:
        if not isinstance(topic, str) or not _TOPIC.fullmatch(topic):
            raise ValueError(f"consumer {consumer}: {topic!r} is no name of a topic")


def _check_start(consumer: str, start_at: StartAt) -> None:
    if isinstance(start_at, datetime):
        if start_at.utcoffset() is None:
            raise ValueError(f"consumer {consumer}: start_at needs a time zone, e.g. datetime(2026, 1, 31, tzinfo=UTC)")
    elif start_at not in ("earliest", "latest"):
        raise ValueError(f'consumer {consumer}: start_at is {start_at!r}: use "earliest", "latest" or a datetime')


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
    consumer_name: str,
    handler: Handler,
    events: list[Event],
    between: Callable[[], None] = lambda: None,
    *,
    is_first_try_of_many: bool = False,
) -> None:
    """Run a handler on events that are its to handle, in order, with their context, spans and duration.

    `between` is called before each call of the handler. `is_first_try_of_many`: events are handled alone, again, if
    anything fails; so no span is made of those that are not sampled, unless they are what fails.
    """
    started = time.perf_counter()
    function = handler.function
    # Where nobody records spans, none are made: they would cost more than all the rest. Trace ids still reach log lines
    # and emitted events, from the event's headers.
    is_traced = may_record()
    group_id = _consumers[consumer_name].group_id if consumer_name in _consumers else ""
    records_unsampled = context.records_unsampled.set(not is_first_try_of_many)
    try:
        if handler.is_batch:
            between()
            with handler_span(group_id, events, is_first_try_of_many) if is_traced else nullcontext():
                function(events)
        else:
            for event in events:
                between()
                with handling(event):
                    if is_traced:
                        with handler_span(group_id, [event], is_first_try_of_many):
                            function(event)
                    else:
                        function(event)
    finally:
        context.records_unsampled.reset(records_unsampled)
    metrics.CONSUMER_HANDLER_SECONDS.labels(consumer_name, handler.name).observe(time.perf_counter() - started)
