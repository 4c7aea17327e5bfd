"""Counting again from the events themselves, into a fresh table, and comparing that with the live totals.

The cut: all of it is read in one transaction that sees the database as it was at one moment. A batch's processed marks
are committed together with what it added to the totals, so the live totals of that moment are the sum of exactly those
events that have a mark of the consumer then and are no dead letter of it. These are counted again, wherever they still
are: in the outbox, and what has been pruned there in Kafka. Events that arrive or are handled meanwhile are on neither
side of the comparison.

The swap puts in what was found as differences, added under the rows' locks: what consumers have added since the cut
stays, and nobody has to stop.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from typing import Any
from uuid import UUID

from django.core.exceptions import ImproperlyConfigured
from django.db import connection, transaction
from django.db.models import Exists, OuterRef, Q

from events_outbox import PermanentEventError
from events_outbox.handlers import Consumer
from events_outbox.kafka import KafkaError, KafkaException, TopicPartition, make_consumer
from events_outbox.models import DeadLetter, OutboxEvent, ProcessedEvent, RelayCursor, visible_in
from events_outbox.proto.base_event_pb2 import BaseEvent
from events_outbox.records import Record, UnreadableRecord
from events_outbox.replay import of_types

from .counting import Counts
from .event_handlers import analytics
from .models import COUNTED, KEY, MEASURES
from .services import LIVE_TABLE, add_to_totals

FRESH_TABLE = "analytics_dailytotal_rebuilt"
GROUP_ID = "analytics-rebuild"
CHUNK_EVENTS = 500
ASK_SECONDS = 5.0
BROKER_SECONDS = 30.0
"""How long the broker may say nothing before it is given up."""
_ONE_AT_A_TIME = 0x616E_6C79_7473
_NOT_THERE = (KafkaError._UNKNOWN_TOPIC, KafkaError.UNKNOWN_TOPIC_OR_PART)

_DELTAS = "analytics_rebuild_deltas"
_FROM_KAFKA = "analytics_rebuild_from_kafka"
_MAKE_FRESH = f"DROP TABLE IF EXISTS {FRESH_TABLE}; CREATE TABLE {FRESH_TABLE} (LIKE {LIVE_TABLE} INCLUDING ALL)"
# Of no use to the sum: an event that a consumer has given up, or an operator has discarded.
_IS_DEAD = """EXISTS (SELECT FROM events_outbox_deadletter d
                       WHERE d.consumer = %(consumer)s AND d.event_id = {event_id} AND d.resolution <> 'replayed')"""
# The first record of each event that is no more in the outbox and counts: later ones are copies.
_TAKE_FROM_KAFKA = f"""
INSERT INTO {_FROM_KAFKA} (event_id)
SELECT came.event_id FROM unnest(%(ids)s::uuid[], %(moments)s::timestamptz[]) AS came (event_id, moment)
 WHERE NOT EXISTS (SELECT FROM events_outbox_outboxevent o WHERE o.event_id = came.event_id)
   AND (came.moment < %(unmarked_before)s::timestamptz
        OR EXISTS (SELECT FROM events_outbox_processedevent p
                    WHERE p.consumer = %(consumer)s AND p.event_id = came.event_id))
   AND NOT {_IS_DEAD.format(event_id="came.event_id")}
ON CONFLICT DO NOTHING RETURNING event_id
"""  # noqa: S608  (names of this module)
_NOT_FOUND = f"""
SELECT count(*) FROM events_outbox_processedevent p
 WHERE p.consumer = %(consumer)s AND p.processed_at >= %(since)s
   AND NOT EXISTS (SELECT FROM events_outbox_outboxevent o WHERE o.event_id = p.event_id)
   AND NOT EXISTS (SELECT FROM {_FROM_KAFKA} k WHERE k.event_id = p.event_id)
   AND NOT {_IS_DEAD.format(event_id="p.event_id")}
"""  # noqa: S608
_DIFFERENCES = f"""
CREATE TEMP TABLE {_DELTAS} AS
SELECT {", ".join(KEY)},
       {", ".join(f"coalesce(live.{m}, 0) AS live_{m}, coalesce(fresh.{m}, 0) AS fresh_{m}" for m in MEASURES)}
  FROM {LIVE_TABLE} live FULL JOIN {FRESH_TABLE} fresh USING ({", ".join(KEY)})
 WHERE day >= %(since)s
   AND ({", ".join(f"coalesce(live.{m}, 0)" for m in MEASURES)})
       IS DISTINCT FROM ({", ".join(f"coalesce(fresh.{m}, 0)" for m in MEASURES)})
"""  # noqa: S608
# Rows that would lose counts of a day of which no event is left, or of one whose marks may be pruned.
_LOSING = f"""
SELECT count(*) FROM {_DELTAS} delta
 WHERE ({" OR ".join(f"live_{m} > fresh_{m}" for m in COUNTED)})
   AND (day <= %(unmarked_until)s::date
        OR NOT EXISTS (SELECT FROM {FRESH_TABLE} fresh
                        WHERE fresh.tenant_id = delta.tenant_id AND fresh.day = delta.day))
"""  # noqa: S608
# In the order in which the consumers lock them (Python's, hence the collation).
_ORDER = 'tenant_id, day, mode COLLATE "C", model COLLATE "C"'
_SWAP = f"""
INSERT INTO {LIVE_TABLE} AS total ({", ".join((*KEY, *MEASURES))})
SELECT {", ".join(KEY)}, {", ".join(f"fresh_{m} - live_{m}" for m in MEASURES)} FROM {_DELTAS} ORDER BY {_ORDER}
ON CONFLICT ({", ".join(KEY)}) DO UPDATE SET {", ".join(f"{m} = total.{m} + excluded.{m}" for m in MEASURES)}
"""  # noqa: S608
_DROP_EMPTY = f"""
DELETE FROM {LIVE_TABLE} total USING {_DELTAS} delta
 WHERE {" AND ".join(f"total.{name} = delta.{name}" for name in KEY)}
   AND {" AND ".join(f"total.{name} = 0" for name in MEASURES)}
"""  # noqa: S608


_LOST = (
    " any more: the totals would lose what they added. Give --since with the first day from which on all of them are "
    "there; nothing was changed"
)


class RebuildFailed(Exception):
    """The events could not all be read or counted: the sentence says why. Nothing was changed."""


@dataclass(frozen=True)
class Difference:
    """A row that is not the same: each measure that differs, as it is live and as it was counted again."""

    tenant_id: UUID
    day: date
    mode: str
    model: str
    measures: Mapping[str, tuple[int | Decimal, int | Decimal]]


class Rebuild:
    """One rebuild: `with Rebuild(...) as rebuild: rebuild.count(); rebuild.swap()`. One at a time.

    `since`: only this UTC day and later ones, None: all. `unmarked_before`: events that happened before then and have
    no processed mark count as handled, because their marks were pruned (PROCESSED_KEEP_DAYS); None: none do.

    After `count()`: `from_outbox` and `from_kafka`, how many events were counted; `not_found`, how many were handled
    and are in neither any more; `rows`, of the fresh table; `differing_rows`, and some of them in `differences`.

    Entering raises RebuildFailed while another one runs.
    """

    def __init__(self, *, since: date | None = None, unmarked_before: datetime | None = None) -> None:
        self._since = since or date.min
        self._is_of_all = since is None
        self._unmarked_before = unmarked_before
        self._counts = Counts()
        self.from_outbox = self.from_kafka = self.not_found = self.rows = self.differing_rows = 0
        self.differences: list[Difference] = []

    def __enter__(self) -> "Rebuild":
        if _value("SELECT pg_try_advisory_lock(%s)", [_ONE_AT_A_TIME]) is not True:
            raise RebuildFailed("another rebuild is running")
        return self

    def __exit__(self, *_: object) -> None:
        connection.close_if_unusable_or_obsolete()
        with connection.cursor() as cursor:
            cursor.execute(f"DROP TABLE IF EXISTS {_DELTAS}")
            cursor.execute("SELECT pg_advisory_unlock(%s)", [_ONE_AT_A_TIME])

    def count(self, *, compare: bool = True, shown: int = 100) -> None:
        """Fill the fresh table and, with `compare`, find what differs; `shown`: how many of them to keep.

        Raises RebuildFailed when Kafka is needed and cannot be read, and for an event that cannot be counted now.
        """
        with _one_moment(), connection.cursor() as cursor:
            cursor.execute(_MAKE_FRESH)
            cursor.execute(f"CREATE TEMP TABLE {_FROM_KAFKA} (event_id uuid PRIMARY KEY) ON COMMIT DROP")
            self._count_outbox()
            self.not_found = self._ask_not_found()
            if self.not_found or self._unmarked_before is not None:
                self._count_kafka()
                self.not_found = self._ask_not_found()
            self._write()
            self.rows = int(_value(f"SELECT count(*) FROM {FRESH_TABLE}"))  # noqa: S608
            if compare:
                cursor.execute(_DIFFERENCES, {"since": self._since})
                self.differing_rows = cursor.rowcount
                self.differences = _differences(shown)

    def swap(self) -> None:
        """Put the rebuilt totals in the place of the live ones. Needs `count()` with `compare`.

        Raises RebuildFailed when handled events were not found, or seem to be gone together with their marks: what they
        added would be lost. With `since`, whoever gives it knows that all events from that day on are still there.
        """
        if self.not_found:
            raise RebuildFailed(
                f"{self.not_found} events that were counted are neither in the outbox nor in Kafka{_LOST}"
            )
        if self._is_of_all:
            unmarked_until = self._unmarked_before and self._unmarked_before.astimezone(UTC).date()
            if losing := _value(_LOSING, {"unmarked_until": unmarked_until}):
                raise RebuildFailed(f"of {losing} rows the events, or their processed marks, seem to be pruned{_LOST}")
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(_SWAP)
            cursor.execute(_DROP_EMPTY)

    @staticmethod
    def drop_fresh_table() -> None:
        """Drop what was counted, when nobody needs to look at it."""
        with connection.cursor() as cursor:
            cursor.execute(f"DROP TABLE IF EXISTS {FRESH_TABLE}")

    def _count_outbox(self) -> None:
        letters = DeadLetter.objects.filter(consumer=analytics.name, event_id=OuterRef("event_id"))
        is_handled = Q(Exists(ProcessedEvent.objects.filter(consumer=analytics.name, event_id=OuterRef("event_id"))))
        if self._unmarked_before is not None:
            is_published = Q(visible_in(RelayCursor.read().published))
            is_handled |= Q(created_at__lt=self._unmarked_before) & is_published
        events = OutboxEvent.objects.filter(of_types(analytics.event_types)).filter(is_handled)
        events = events.exclude(Exists(letters.exclude(resolution=DeadLetter.Resolution.REPLAYED)))
        values = events.order_by().values_list("topic", "value")
        for topic, value in values.iterator(chunk_size=CHUNK_EVENTS):
            self._add(Record(topic, -1, -1, None, bytes(value)))
            self.from_outbox += 1

    def _count_kafka(self) -> None:
        for records in _records_in_kafka(analytics):
            came: dict[str, Record] = {}
            moments: list[datetime | None] = []
            for record in records:
                base = _envelope(record)
                if base is not None and base.event_id not in came:
                    came[base.event_id] = record
                    moments.append(_moment(base))
            with connection.cursor() as cursor:
                cursor.execute(
                    _TAKE_FROM_KAFKA,
                    {
                        "ids": list(came),
                        "moments": moments,
                        "unmarked_before": self._unmarked_before,
                        "consumer": analytics.name,
                    },
                )
                taken = [str(event_id) for (event_id,) in cursor.fetchall()]
            for event_id in taken:
                self._add(came[event_id])
                self.from_kafka += 1

    def _add(self, record: Record) -> None:
        try:
            base = record.envelope()
            route = analytics.route(base.event_type, base.event_version)
            if route is None:
                raise PermanentEventError(f"{base.event_type} {base.event_version} is not counted")
            event = record.event(base, route.version)
            if event.timestamp.astimezone(UTC).date() >= self._since:
                self._counts.add(event)
        except (UnreadableRecord, PermanentEventError) as error:
            raise RebuildFailed(f"an event that was handled cannot be counted again: {record!r}: {error}") from error
        if len(self._counts) >= CHUNK_EVENTS:
            self._write()

    def _write(self) -> None:
        if self._counts:
            add_to_totals(counts=self._counts, table=FRESH_TABLE)
            self._counts = Counts()

    def _ask_not_found(self) -> int:
        # An event of that day was not handled before it: but for what the clocks may differ by.
        day = max(self._since, date.min + timedelta(days=1)) - timedelta(days=1)
        since = datetime.combine(day, time_of_day(), UTC)
        return int(_value(_NOT_FOUND, {"consumer": analytics.name, "since": since}))


def _envelope(record: Record) -> BaseEvent | None:
    """The record's envelope. None: it is no event, or none that the consumer handles."""
    try:
        base = record.envelope()
    except UnreadableRecord:
        return None
    return base if analytics.route(base.event_type, base.event_version) else None


def _moment(base: BaseEvent) -> datetime | None:
    try:
        moment: datetime = base.timestamp.ToDatetime(UTC)
    except (ValueError, OverflowError):
        return None
    return moment


def _differences(limit: int) -> list[Difference]:
    names = [f"{side}_{name}" for name in MEASURES for side in ("live", "fresh")]
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT {', '.join((*KEY, *names))} FROM {_DELTAS} ORDER BY {_ORDER} LIMIT %s",  # noqa: S608
            [limit],
        )
        rows = cursor.fetchall()
    found = []
    for row in rows:
        values = dict(zip(names, row[len(KEY) :], strict=True))
        pairs = {name: (values[f"live_{name}"], values[f"fresh_{name}"]) for name in MEASURES}
        differing = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        tenant_id, on_day, mode, model = row[: len(KEY)]
        found.append(Difference(tenant_id, on_day, mode, model, differing))
    return found


def _records_in_kafka(consumer: Consumer) -> Iterator[list[Record]]:
    """Yield all that the consumer's topics hold now, by a reader of a group of its own that commits nothing."""
    told: list[KafkaError] = []
    try:
        client = make_consumer(GROUP_ID, told.append, lambda error, partitions: None)
        with closing(client):
            ends = _ends(client, consumer.topics)
            client.assign([TopicPartition(*place, low) for place, (low, _) in ends.items()])
            unread = {place: high for place, (_, high) in ends.items()}
            heard = time.monotonic()
            while unread:
                messages = client.consume(CHUNK_EVENTS, 1.0)
                records = [record for message in messages if (record := _record(message)) is not None]
                if records:
                    heard = time.monotonic()
                    yield records
                elif time.monotonic() - heard > BROKER_SECONDS:
                    raise RebuildFailed(f"Kafka says nothing any more: {told[-1].str() if told else 'no record comes'}")
                # By position and not by the last record: what lies between may be no record.
                for place in client.position([TopicPartition(*one) for one in unread]):
                    if place.offset >= unread[place.topic, place.partition]:
                        del unread[place.topic, place.partition]
    except ImproperlyConfigured as error:
        raise RebuildFailed(str(error)) from None
    except KafkaException as error:
        raise RebuildFailed(f"Kafka cannot be read: {(told[-1] if told else error.args[0]).str()}") from None


def _ends(client: Any, topics: Sequence[str]) -> dict[tuple[str, int], tuple[int, int]]:
    """The first offset and the one after the last, of the partitions that hold something."""
    ends = {}
    for topic in topics:
        found = client.list_topics(topic, timeout=ASK_SECONDS).topics[topic]
        if found.error is not None:
            if found.error.code() in _NOT_THERE:
                continue
            raise KafkaException(found.error)
        for partition in sorted(found.partitions):
            low, high = client.get_watermark_offsets(TopicPartition(topic, partition), ASK_SECONDS)
            if low < high:
                ends[topic, partition] = low, high
    return ends


def _record(message: Any) -> Record | None:
    if (error := message.error()) is not None:
        # The client looks for its group though it joins none, and may not be allowed to.
        if error.retriable() or error.code() in (KafkaError._PARTITION_EOF, KafkaError.GROUP_AUTHORIZATION_FAILED):
            return None
        raise KafkaException(error)
    return Record(message.topic(), message.partition(), message.offset(), message.key(), message.value())


def _value(statement: str, parameters: Any = None) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(statement, parameters)
        ((value,),) = cursor.fetchall()
    return value


@contextmanager
def _one_moment() -> Iterator[None]:
    """A transaction that sees the database as it is at its first statement. Raises RuntimeError within another one."""
    if connection.in_atomic_block:
        raise RuntimeError("a rebuild needs a transaction of its own, to see one moment")
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            cursor.execute("SELECT pg_current_snapshot()")  # this is the moment
        yield
