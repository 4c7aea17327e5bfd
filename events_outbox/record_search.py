"""Finding an event's records in Kafka: where it was published, and when, which its row cannot tell.

Rows are never updated, so the truth is in the topic: the first record with the event's bytes is its publication, each
further one a replay or a copy after a crash.
"""

import contextlib
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from django.core.exceptions import ImproperlyConfigured

from .conf import outbox_settings
from .kafka import (
    OFFSET_BEGINNING,
    OFFSET_END,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
    make_record_reader,
    producer_settings,
)
from .models import OutboxEvent
from .records import Headers

SEARCH_SECONDS = 2.0
SEARCH_RECORDS = 100_000
"""How much of a topic is read for one event."""
CLOCK_SKEW = timedelta(seconds=10)
"""How far the relay's clock may be behind the database's and its records still be found."""
_NO_TIME = datetime.max.replace(tzinfo=UTC)
_NOT_THERE = (KafkaError._UNKNOWN_TOPIC, KafkaError.UNKNOWN_TOPIC_OR_PART)


@dataclass(frozen=True)
class FoundRecord:
    """A record that holds the event. `published_at`: the record's own time; None when it has none."""

    partition: int
    offset: int
    published_at: datetime | None
    headers: Headers = ()


@dataclass(frozen=True)
class RecordSearch:
    """What a search found: the records, the earliest first, and what is to be said of it.

    `not_known`: why Kafka told nothing, else empty. `cut_short`: why there may be more records than these, empty when
    all were read. `is_dropped`: Kafka no longer holds everything that was written since the event.
    """

    records: Sequence[FoundRecord] = ()
    records_read: int = 0
    not_known: str = ""
    cut_short: str = ""
    is_dropped: bool = False


def find_records(
    event: OutboxEvent, *, timeout_seconds: float = SEARCH_SECONDS, max_records: int = SEARCH_RECORDS
) -> RecordSearch:
    """Read the event's partition from just before it was emitted, up to its end or these limits."""
    told: list[KafkaError] = []
    try:
        client = make_record_reader(told.append)
    except ImproperlyConfigured as error:
        return RecordSearch(not_known=str(error))
    with contextlib.closing(client):
        search = _Search(client, event, timeout_seconds, max_records)
        try:
            search.run()
        except KafkaException as error:
            client.poll(0)
            reason = told[-1] if told else error.args[0]
            return RecordSearch(not_known=f"Kafka does not answer: {reason.str()}")
    return search.result()


class _Search:
    def __init__(self, client: Consumer, event: OutboxEvent, timeout_seconds: float, max_records: int) -> None:
        self._client = client
        self._event = event
        self._value = bytes(event.value)
        self._event_id = str(event.event_id).encode()
        self._deadline = time.monotonic() + timeout_seconds
        self._timeout_seconds = timeout_seconds
        self._max_records = max_records
        self._found: list[FoundRecord] = []
        self._read = 0
        self._cut_short = ""
        self._is_dropped = False

    def result(self) -> RecordSearch:
        found = sorted(self._found, key=lambda r: (r.published_at or _NO_TIME, r.partition, r.offset))
        return RecordSearch(found, self._read, cut_short=self._cut_short, is_dropped=self._is_dropped)

    def run(self) -> None:
        topic = self._client.list_topics(self._event.topic, timeout=self._left()).topics[self._event.topic]
        if topic.error is not None:
            if topic.error.code() in _NOT_THERE:
                self._cut_short = f"there is no topic {self._event.topic}"
                return
            raise KafkaException(topic.error)
        numbers = sorted(topic.partitions)
        by_key = self._partition_of_key(len(numbers))
        likely = numbers if by_key is None else [by_key]
        self._read_partitions(likely)
        if not self._found and not self._cut_short:
            # A topic that has got more partitions since, or somebody else's partitioner.
            self._read_partitions([number for number in numbers if number not in likely])

    def _partition_of_key(self, partitions: int) -> int | None:
        """Where the relay's producer puts the event; None when that is not by murmur2."""
        if not self._event.aggregate_id or not str(producer_settings()["partitioner"]).startswith("murmur2"):
            return None
        return (murmur2(self._event.aggregate_id.encode()) & 0x7FFFFFFF) % partitions

    def _left(self) -> float:
        return max(self._deadline - time.monotonic(), 0.1)

    def _read_partitions(self, numbers: Collection[int]) -> None:
        starts = self._offsets(numbers, OFFSET_BEGINNING)
        ends = self._offsets(numbers, OFFSET_END)
        begins = starts
        if not outbox_settings().KAFKA_IS_EMBEDDED:  # that one knows no times
            since = self._event.created_at - CLOCK_SKEW
            begins = self._offsets(numbers, int(since.timestamp() * 1000))
        # Nothing is as late as that where the offset is below 0.
        unread = {number for number in numbers if 0 <= begins[number] < ends[number]}
        self._is_dropped |= any(starts[n] > 0 and starts[n] in (begins[n], ends[n]) for n in numbers)
        if not unread:
            return
        self._client.assign([self._place(number, begins[number]) for number in unread])
        while unread:
            if time.monotonic() > self._deadline or self._read >= self._max_records:
                self._cut_short = f"{self._read} records were read in {self._timeout_seconds:.0f} s, not all there are"
                return
            for message in self._client.consume(500, min(self._left(), 0.1)):
                self._take(message, unread, ends)
        self._client.unassign()

    def _take(self, message: Message, unread: set[int], ends: dict[int, int]) -> None:
        number, offset = message.partition(), message.offset()
        if (error := message.error()) is not None:
            if error.code() == KafkaError._PARTITION_EOF and number is not None:
                unread.discard(number)
            # The client looks for its group though it joins none, and may not be allowed to.
            elif not (error.retriable() or error.code() == KafkaError.GROUP_AUTHORIZATION_FAILED):
                raise KafkaException(error)
            return
        assert number is not None and offset is not None  # noqa: S101  (narrowing)
        self._read += 1
        if message.value() == self._value and (headers := self._own_headers(message)) is not None:
            kind, milliseconds = message.timestamp()
            published_at = datetime.fromtimestamp(milliseconds / 1000, UTC) if kind and milliseconds >= 0 else None
            self._found.append(FoundRecord(number, offset, published_at, headers))
        if offset >= ends[number] - 1:
            unread.discard(number)

    def _own_headers(self, message: Message) -> Headers | None:
        """None where they name another event: bytes that are no event may be those of several rows."""
        headers: Any = message.headers() or []
        return headers if dict(headers).get("event_id", self._event_id) == self._event_id else None

    def _offsets(self, numbers: Collection[int], moment: int) -> dict[int, int]:
        """Kafka takes its numbers for the start and the end as times too."""
        if not numbers:
            return {}
        asked = [self._place(number, moment) for number in numbers]
        found = self._client.offsets_for_times(asked, self._left())
        for place in found:
            if place.error is not None:
                raise KafkaException(place.error)
        return {place.partition: place.offset for place in found}

    def _place(self, number: int, offset: int) -> TopicPartition:
        return TopicPartition(self._event.topic, number, offset)


def murmur2(key: bytes) -> int:
    """Kafka's hash of keys, an unsigned 32-bit number: a key's partition is its lower 31 bits modulo their number."""
    multiplier, mask = 0x5BD1E995, 0xFFFFFFFF
    length = len(key)
    hashed = 0x9747B28C ^ length
    for at in range(0, length - length % 4, 4):
        k = int.from_bytes(key[at : at + 4], "little") * multiplier & mask
        hashed = (hashed * multiplier & mask) ^ ((k ^ (k >> 24)) * multiplier & mask)
    if rest := key[length - length % 4 :]:
        hashed = (hashed ^ int.from_bytes(rest, "little")) * multiplier & mask
    hashed = (hashed ^ (hashed >> 13)) * multiplier & mask
    return hashed ^ (hashed >> 15)
