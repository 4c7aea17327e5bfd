"""Offsets of a consumer's group: what it has committed against what its topics hold, and setting them anew.

Nothing here joins the group, so it tells of a consumer that is dead as well.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, TypeVar

from django.core.exceptions import ImproperlyConfigured
from django.db import transaction

from .conf import outbox_settings
from .handlers import Consumer
from .kafka import (
    OFFSET_BEGINNING,
    OFFSET_END,
    Group,
    KafkaError,
    KafkaException,
    TopicPartition,
    describe_group,
    make_group_reader,
)
from .operators import note_action

FIRST_RECORD_SECONDS = 2.0
_NOT_THERE = (KafkaError._UNKNOWN_TOPIC, KafkaError.UNKNOWN_TOPIC_OR_PART)
_NO_ANSWER = (KafkaError._TIMED_OUT, KafkaError._TRANSPORT, KafkaError._WAIT_COORD, KafkaError.REQUEST_TIMED_OUT)
_HAS_MEMBERS = (KafkaError.UNKNOWN_MEMBER_ID, KafkaError.ILLEGAL_GENERATION, KafkaError.REBALANCE_IN_PROGRESS)

Place = tuple[str, int]
"""Topic and partition."""
Start = Literal["earliest", "latest"] | datetime
"""Where a group that never committed begins, as `Consumer(start_at=...)` says."""
Answer = TypeVar("Answer")


class OffsetsNotKnown(Exception):
    """Kafka did not tell: it is away, or refuses to."""


class ResetRefused(Exception):
    """Nothing was changed: the sentence says why."""


@dataclass(frozen=True)
class PartitionOffsets:
    """A partition as the group stands in it.

    `committed`: the next offset it reads, None when it never committed. `begins_at`: where a member would begin now.
    `start`, `end`: the first offset that Kafka still has, and the one after the last. `lag_seconds`: the age of the
    first record that is not committed, None when that cannot be told, 0 when there is none.
    """

    topic: str
    partition: int
    committed: int | None
    start: int
    end: int
    begins_at: int
    lag_events: int
    lag_seconds: float | None


class GroupReader:
    """Reads the offsets of a consumer's group. Close it; once it has failed, make a new one.

    Every method raises OffsetsNotKnown when Kafka does not tell in time.
    """

    def __init__(self, consumer: Consumer) -> None:
        """Raises ImproperlyConfigured when librdkafka refuses the Kafka settings."""
        self._consumer = consumer
        self._told: deque[KafkaError] = deque(maxlen=1)
        self._client = make_group_reader(consumer.group_id, self._told.append)
        self._first_records: dict[Place, tuple[int, float]] = {}  # offset, and when it was written

    def close(self) -> None:
        self._client.close()

    def read(self, timeout_seconds: float) -> list[PartitionOffsets]:
        """Return where the group stands in each partition of the topics that are there."""
        return self._asked(timeout_seconds, self._read)

    def offsets_at(self, places: Collection[Place], moment: datetime, timeout_seconds: float) -> dict[Place, int]:
        """Return the offset of the first record written at that time or later; the end where there is none."""
        return self._asked(timeout_seconds, lambda deadline: self._offsets_at(places, moment, deadline))

    def commit(self, offsets: Iterable[tuple[Place, int]]) -> list[str]:
        """Set the group's offsets and return what failed, by partition. Raises KafkaException when all of it did."""
        places = [TopicPartition(topic, partition, offset) for (topic, partition), offset in offsets]
        done = self._client.commit(offsets=places, asynchronous=False)
        return [f"{p.topic}/{p.partition}: {p.error.str()}" for p in done if p.error is not None]

    def _asked(self, timeout_seconds: float, question: Callable[[float], Answer]) -> Answer:
        self._told.clear()
        self._hear()
        try:
            return question(time.monotonic() + timeout_seconds)
        except KafkaException as error:
            self._hear()
            reason = error.args[0]
            # The answer that failed to come says less than what the client was told meanwhile.
            told = self._told[-1] if self._told and reason.code() in _NO_ANSWER else reason
            raise OffsetsNotKnown(told.str()) from None

    def _hear(self) -> None:
        """Take in what the client has to say; nobody else does, and it would pile up."""
        while (message := self._client.poll(0)) is not None:
            if (error := message.error()) is not None:
                self._told.append(error)

    def _read(self, deadline: float) -> list[PartitionOffsets]:
        places = self._places(deadline)
        if not places:
            return []
        asked = [TopicPartition(*place) for place in places]
        # The ends come last: a group that goes on meanwhile must not seem to be past them.
        committed = {
            place: offset if offset >= 0 else None
            for place, offset in _by_place(self._client.committed(asked, _left(deadline))).items()
        }
        starts = self._offsets_at(places, OFFSET_BEGINNING, deadline)
        starts_at: Start = self._consumer.start_at
        uncommitted = [place for place in places if committed[place] is None]
        begins = dict(starts)
        if starts_at != "earliest" and uncommitted:
            begins |= self._offsets_at(uncommitted, OFFSET_END if starts_at == "latest" else starts_at, deadline)
        ends = self._offsets_at(places, OFFSET_END, deadline)
        for place, offset in committed.items():
            # What was dropped since, or was never there in a topic that was made anew, is begun at the start.
            if offset is not None and starts[place] <= offset <= ends[place]:
                begins[place] = offset
        written_at = self._first_written(
            {place: begins[place] for place in places if begins[place] < ends[place]}, deadline
        )
        now = time.time()
        return [
            PartitionOffsets(
                *place,
                committed=committed[place],
                start=starts[place],
                end=ends[place],
                begins_at=begins[place],
                lag_events=(lag := max(ends[place] - begins[place], 0)),
                lag_seconds=(max(now - written_at[place], 0.0) if place in written_at else None) if lag else 0.0,
            )
            for place in places
        ]

    def _places(self, deadline: float) -> list[Place]:
        places = []
        for topic in self._consumer.topics:
            found = self._client.list_topics(topic, timeout=_left(deadline)).topics[topic]
            if found.error is None:
                places += [(topic, partition) for partition in sorted(found.partitions)]
            elif found.error.code() not in _NOT_THERE:
                raise KafkaException(found.error)
        return places

    def _offsets_at(self, places: Collection[Place], moment: int | datetime, deadline: float) -> dict[Place, int]:
        """One request for all of them; Kafka takes its numbers for the start and the end as times too."""
        timestamp = int(moment.timestamp() * 1000) if isinstance(moment, datetime) else moment
        asked = [TopicPartition(*place, timestamp) for place in places]
        found = _by_place(self._client.offsets_for_times(asked, _left(deadline)))
        after_the_last = [place for place, offset in found.items() if offset < 0]
        if after_the_last and moment != OFFSET_END:
            found |= self._offsets_at(after_the_last, OFFSET_END, deadline)
        return found

    def _first_written(self, begins: dict[Place, int], deadline: float) -> dict[Place, float]:
        """When the record at each offset, or the first one after it, was written, as far as it can be read in time.

        While a group stands still it is not read again.
        """
        known = {place: found for place, found in self._first_records.items() if begins.get(place) == found[0]}
        missing = {place for place in begins if place not in known}
        if missing:
            deadline = min(deadline, time.monotonic() + FIRST_RECORD_SECONDS)
            self._client.assign([TopicPartition(*place, begins[place]) for place in missing])
            try:
                while missing and time.monotonic() < deadline:
                    message = self._client.poll(0.1)
                    if message is None:
                        continue
                    place = (message.topic() or "", message.partition() or 0)
                    if place not in missing:
                        continue
                    missing.discard(place)
                    self._client.incremental_unassign([TopicPartition(*place)])
                    if message.error() is None:
                        known[place] = (begins[place], message.timestamp()[1] / 1000)
            finally:
                self._client.unassign()
        self._first_records = known
        return {place: written_at for place, (_, written_at) in known.items()}


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.1)


def _by_place(found: Sequence[TopicPartition]) -> dict[Place, int]:
    for partition in found:
        if partition.error is not None:
            raise KafkaException(partition.error)
    return {(partition.topic, partition.partition): partition.offset for partition in found}


def read_offsets(consumer: Consumer, timeout_seconds: float) -> list[PartitionOffsets]:
    """Read where a consumer's group stands. Raises OffsetsNotKnown, also when the Kafka settings are no good."""
    with _reader(consumer) as reader:
        return reader.read(timeout_seconds)


def read_group(consumer: Consumer, timeout_seconds: float) -> Group:
    """Ask who is in a consumer's group. Raises OffsetsNotKnown."""
    if outbox_settings().KAFKA_IS_EMBEDDED:
        raise OffsetsNotKnown("the embedded broker does not tell who is in a group")
    try:
        return describe_group(consumer.group_id, timeout_seconds)
    except KafkaException as error:
        raise OffsetsNotKnown(error.args[0].str()) from None
    except ImproperlyConfigured as error:
        raise OffsetsNotKnown(str(error)) from None


@contextlib.contextmanager
def _reader(consumer: Consumer) -> Iterator[GroupReader]:
    try:
        reader = GroupReader(consumer)
    except ImproperlyConfigured as error:
        raise OffsetsNotKnown(str(error)) from None
    with contextlib.closing(reader):
        yield reader


@dataclass(frozen=True)
class Move:
    """A partition's committed offset, and the one that takes its place. `from_offset` None: it never committed."""

    topic: str
    partition: int
    from_offset: int | None
    to_offset: int


Target = Literal["earliest", "latest"] | datetime | int
"""Where to: a time stands for the first record that was published then or later, a number for itself."""


def plan_reset(
    consumer: Consumer,
    to: Target,
    timeout_seconds: float,
    *,
    topic: str | None = None,
    partitions: Collection[int] = (),
) -> list[Move]:
    """Return how a reset would move the group's offsets. Changes nothing.

    `topic`, `partitions`: only these; all where none is named. Raises ResetRefused for what is not there and for an
    offset that the partition does not have, OffsetsNotKnown.
    """
    deadline = time.monotonic() + timeout_seconds
    with _reader(consumer) as reader:
        chosen = [
            p
            for p in reader.read(timeout_seconds)
            if topic in (None, p.topic) and (not partitions or p.partition in partitions)
        ]
        missing = set(partitions) - {p.partition for p in chosen}
        if missing or not chosen:
            what = f"partition {min(missing)} of " if missing else ""
            raise ResetRefused(f"{consumer.name} reads no {what}{topic or ', '.join(consumer.topics) or 'topic'}")
        if isinstance(to, int):
            for p in chosen:
                if not p.start <= to <= p.end:
                    raise ResetRefused(f"{p.topic}/{p.partition} has the offsets {p.start} to {p.end}, not {to}")
        at_time: dict[Place, int] = {}
        if isinstance(to, datetime):
            at_time = reader.offsets_at([(p.topic, p.partition) for p in chosen], to, _left(deadline))
    return [Move(p.topic, p.partition, p.committed, _target(p, to, at_time)) for p in chosen]


def _target(place: PartitionOffsets, to: Target, at_time: Mapping[Place, int]) -> int:
    if isinstance(to, int):
        return to
    if isinstance(to, datetime):
        return at_time[place.topic, place.partition]
    return place.start if to == "earliest" else place.end


def require_no_members(consumer: Consumer, timeout_seconds: float) -> None:
    """Raise ResetRefused while anybody is in the consumer's group, or when that cannot be told."""
    try:
        group = read_group(consumer, timeout_seconds)
    except OffsetsNotKnown as error:
        raise ResetRefused(f"it cannot be told whether group {consumer.group_id} has members: {error}") from None
    if group.members:
        who = ", ".join(f"{member.client_id} on {member.host}" for member in group.members)
        raise ResetRefused(
            f"group {consumer.group_id} has members: {who}. Stop them first; one that died is dropped after its "
            "session timeout"
        )
    if not group.is_empty:
        raise ResetRefused(f"group {consumer.group_id} is not at rest ({group.state}): its members come and go")


def reset(
    consumer: Consumer, moves: Sequence[Move], timeout_seconds: float, *, to: str, by: str, reason: str = ""
) -> None:
    """Set the group's offsets as planned, and note it in the audit trail. `to`: what was asked for, in words.

    Raises ResetRefused while the group has members, OffsetsNotKnown when Kafka did not say whether it is done.
    """
    require_no_members(consumer, timeout_seconds)
    failed: list[str] = []
    no_answer = ""
    with transaction.atomic():
        # First the trail: no offset is moved that it cannot tell of.
        note_action(
            "offsets.reset",
            consumer=consumer.name,
            subject=consumer.group_id,
            by=by,
            reason=reason,
            to=to,
            partitions=[
                {"topic": m.topic, "partition": m.partition, "from": m.from_offset, "to": m.to_offset} for m in moves
            ],
        )
        with _reader(consumer) as reader:
            try:
                failed = reader.commit(((m.topic, m.partition), m.to_offset) for m in moves)
            except KafkaException as error:
                code, said = error.args[0].code(), error.args[0].str()
                if code not in _NO_ANSWER:
                    why = "a member has joined meanwhile" if code in _HAS_MEMBERS else "Kafka refuses"
                    raise ResetRefused(f"{why}: {said}") from None
                no_answer = said
    if no_answer:
        raise OffsetsNotKnown(f"it is not known whether the offsets were set: {no_answer}")
    if failed:
        raise OffsetsNotKnown("not all offsets were set: " + "; ".join(failed))
