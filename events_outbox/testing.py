"""The test kit: what did this code emit, and what do the consumers make of it; without Kafka.

    with capture_events() as events:
        place_order(...)
    assert [event.payload.order_id for event in events.of("order.placed")] == ["o1"]

    handle_now("billing")  # all that was emitted, through the code that runs in production
    assert Invoice.objects.get().order_id == "o1"

It works within a test's transaction (`TestCase`, pytest-django's `db`). As fixtures: `events_outbox.pytest_plugin`.
docs/handlers.md shows it all.
"""

import copy
import itertools
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import TracebackType
from typing import Any, overload

from asgiref.sync import sync_to_async
from django.conf import settings
from django.db.models import Max
from django.test.utils import override_settings
from google.protobuf.message import Message

from .catalog import EventType, event_type_for, event_types, topics
from .conf import outbox_settings
from .consumer import ConsumerProcess, ConsumerStopped
from .embedded_broker import EmbeddedBroker
from .emit import COLUMNS, NewEvent, columns_of
from .handlers import Consumer, Event, consumer_named
from .handlers import consumers as all_consumers
from .models import DeadLetter, OutboxEvent, ProcessedEvent
from .policies import RetryPolicy
from .records import HEADER_FIELDS, Record, headers_for

_MAX_ROUNDS = 100
_offsets = itertools.count()


class CapturedEvents(Sequence[Event[Any]]):
    """Events emitted since a moment, in order, as they were emitted: no upcaster has touched them.

    What was rolled back is not among them; what another thread has committed is. `after_id`: id of the outbox row to
    begin after; None means now.
    """

    def __init__(self, after_id: int | None = None) -> None:
        self._after = _last_id() if after_id is None else after_id
        self._kept: list[Event[Any]] | None = None

    def of(self, *event_types: str) -> list[Event[Any]]:
        """Those of the event types. Raises UnknownEventType for one that is not in the catalog."""
        for event_type in event_types:
            _versions(event_type)
        return [event for event in self if event.event_type in event_types]

    def keep(self) -> None:
        """Take no further ones."""
        self._kept = self._read()

    def _read(self) -> list[Event[Any]]:
        if self._kept is not None:
            return self._kept
        return [record.event(record.envelope()) for record in map(_record_of, _rows_after(self._after))]

    def __len__(self) -> int:
        return len(self._read())

    @overload
    def __getitem__(self, index: int) -> Event[Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[Event[Any]]: ...
    def __getitem__(self, index: int | slice) -> Event[Any] | list[Event[Any]]:
        return self._read()[index]

    def __iter__(self) -> Iterator[Event[Any]]:
        return iter(self._read())

    def __repr__(self) -> str:
        return f"<emitted: {', '.join(event.event_type for event in self) or 'nothing'}>"


class capture_events:
    """`with capture_events() as events:`, or `async with`: the events that the block emits, as `CapturedEvents`.

    Within the block they are those so far (not in async code, where the database cannot be asked on the way).
    """

    def __enter__(self) -> CapturedEvents:
        self._events = CapturedEvents()
        return self._events

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:  # else the transaction may be broken
            self._events.keep()

    async def __aenter__(self) -> CapturedEvents:
        return await sync_to_async(self.__enter__)()

    async def __aexit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await sync_to_async(self.__exit__)(error, value, traceback)


@dataclass(frozen=True)
class Handled:
    """What `handle_now()` came to. `events`: those that were handled, by consumer, in order."""

    events: dict[str, list[Event[Any]]] = field(default_factory=dict)
    dead_letters: list[DeadLetter] = field(default_factory=list)


def handle_now(
    *consumers: Consumer | str, events: Iterable[Event[Any]] | None = None, raise_errors: bool = False
) -> Handled:
    """Have consumers handle events as `consume` would, but without Kafka, and what their handlers emit as well.

    `consumers`: by name or themselves; none means all. `events`: captured or made ones; None means all in the outbox
    that they have not handled yet, which in a test is what it has emitted. It is the code that runs in production,
    with processed marks, retries (at once instead of after a while), dead letters and each consumer's `on_failure`.
    `raise_errors`: raise what a handler raises, without retries, instead of making a dead letter of it.

    Functions given to `transaction.on_commit()` run as they do in a view under test: in a `TestCase` only within
    `captureOnCommitCallbacks(execute=True)`. Raises ConsumerStopped where on_failure="stop" says so, RuntimeError when
    handlers emit events that make handlers emit events, and so on without end.
    """
    chosen = [consumer_named(one) if isinstance(one, str) else one for one in consumers] or all_consumers()
    last = _last_id() if events is not None else 0
    records = [] if events is None else [make_record(event) for event in events]
    handled = Handled()
    for _ in range(_MAX_ROUNDS):
        rows = _rows_after(last)
        records += map(_record_of, rows)
        if not records:
            return handled
        last = rows[-1].id if rows else last
        for consumer in chosen:
            _handle(consumer, records, handled, raise_errors)
        records = []
    raise RuntimeError(f"after {_MAX_ROUNDS} rounds the handlers still emit events: {rows[-1].event_type}, last of all")


def _handle(consumer: Consumer, records: Sequence[Record], handled: Handled, raise_errors: bool) -> None:
    todo = [record for record in records if record.topic in consumer.topics]
    ours = {uuid.UUID(record.envelope().event_id): record for record in todo}
    marks = ProcessedEvent.objects.filter(consumer=consumer.name, event_id__in=ours)
    before = set(marks.values_list("event_id", flat=True))
    last_letter = DeadLetter.objects.aggregate(last=Max("id"))["last"] or 0
    like = copy.copy(consumer)
    like.guard = None  # the failures of a test are wanted
    like.retry = replace(consumer.retry, initial_delay_seconds=0)
    if raise_errors:
        like.retry, like.on_failure = RetryPolicy(max_retries=0), "stop"
    process, size = ConsumerProcess(like), consumer.batch_size or outbox_settings().CONSUMER_BATCH_SIZE
    try:
        for start in range(0, len(todo), size):
            process.handle_batch(todo[start : start + size])
    except ConsumerStopped as stopped:
        if raise_errors and stopped.__cause__ is not None:
            raise stopped.__cause__ from None
        raise
    letters = list(DeadLetter.objects.filter(consumer=consumer.name, id__gt=last_letter).order_by("id"))
    new = set(marks.all().values_list("event_id", flat=True)) - before - {letter.event_id for letter in letters}
    handled.dead_letters.extend(letters)
    handled.events.setdefault(consumer.name, []).extend(
        record.event(record.envelope()) for event_id, record in ours.items() if event_id in new
    )


def make_event(
    event_type: str,
    payload: Message | None = None,
    *,
    aggregate_id: str | uuid.UUID | None = None,
    tenant_id: str | uuid.UUID | None = None,
    user_id: str | uuid.UUID = "",
    event_version: str | None = None,
    metadata: Mapping[str, str] | None = None,
    correlation_id: str | None = None,
    causation_id: str | None = None,
    event_id: uuid.UUID | None = None,
    timestamp: datetime | None = None,
) -> Event[Any]:
    """Return an event that a handler can be called with, as if it had come out of Kafka; nothing is stored.

    What is left out is made up: `payload` an empty message, `event_version` that of the payload, else the newest one;
    `aggregate_id` and `tenant_id` new UUIDs; the rest as `emit_event()` does, whose errors it raises.
    """
    entries = _versions(event_type)
    if event_version is None:
        fitting = [entry for entry in entries if payload is None or isinstance(payload, entry.payload)]
        event_version = (fitting or entries)[-1].version
    if payload is None:
        payload = event_type_for(event_type, event_version).payload()
    new = NewEvent(
        event_type=event_type,
        payload=payload,
        aggregate_id=uuid.uuid4() if aggregate_id is None else aggregate_id,
        tenant_id=uuid.uuid4() if tenant_id is None else tenant_id,
        user_id=user_id,
        event_version=event_version,
        metadata=metadata or {},
        correlation_id=correlation_id,
        causation_id=causation_id,
        event_id=event_id,
        timestamp=timestamp,
    )
    record = _record(dict(zip(COLUMNS, columns_of(new, ("", "", "")), strict=True)), next(_offsets))
    return record.event(record.envelope())


def make_record(event: Event[Any]) -> Record:
    """Return the record that the relay would publish of this event (timestamps of events are in microseconds).

    Raises what `emit_event()` raises.
    """
    names = ("event_type", "payload", "aggregate_id", "tenant_id", "user_id", "event_version", "metadata")
    more = ("correlation_id", "causation_id", "event_id", "timestamp")
    new = NewEvent(**{name: getattr(event, name) for name in (*names, *more)})
    trace_fields = [event.headers.get(name, "") for name in ("traceparent", "tracestate", "baggage")]
    columns = columns_of(new, (trace_fields[0], trace_fields[1], trace_fields[2]))
    return _record(dict(zip(COLUMNS, columns, strict=True)), max(event.offset, 0))


@contextmanager
def embedded_kafka() -> Iterator[EmbeddedBroker]:
    """A Kafka broker of its own for the block, empty, with all topics; the settings point to it.

    Its relay and consumers need the emitted events committed: `TransactionTestCase`, `django_db(transaction=True)`.
    Raises EmbeddedBrokerError when it does not start.
    """
    with EmbeddedBroker(topics(), partitions=outbox_settings().TOPIC_PARTITIONS) as broker:
        kafka = {"bootstrap.servers": broker.bootstrap_servers}
        ours = {**getattr(settings, "EVENTS_OUTBOX", {}), "KAFKA": kafka, "KAFKA_IS_EMBEDDED": True}
        with override_settings(EVENTS_OUTBOX=ours):
            yield broker


def _last_id() -> int:
    last: int | None = OutboxEvent.objects.aggregate(last=Max("id"))["last"]
    return last or 0


def _rows_after(outbox_id: int) -> list[OutboxEvent]:
    return list(OutboxEvent.objects.filter(id__gt=outbox_id).order_by("id"))


def _record_of(row: OutboxEvent) -> Record:
    return _record({name: getattr(row, name) for name in COLUMNS}, row.id)


def _record(columns: Mapping[str, Any], offset: int) -> Record:
    headers = headers_for([str(columns[name]).encode() for name in HEADER_FIELDS])
    return Record(
        topic=columns["topic"],
        partition=0,
        offset=offset,
        key=columns["aggregate_id"].encode(),
        value=bytes(columns["value"]),
        headers=[(name, value if isinstance(value, bytes) else None) for name, value in headers.items()],
    )


def _versions(event_type: str) -> list[EventType]:
    """The catalog's entries of an event type, oldest version first. Raises UnknownEventType when there are none."""
    entries = [entry for entry in event_types() if entry.name == event_type]
    if not entries:
        event_type_for(event_type, "v1")  # raises, naming near misses
    return sorted(entries, key=lambda entry: int(entry.version[1:]))
