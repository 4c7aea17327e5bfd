"""Where an event is on its way: emitted, published, and what each consumer has made of it.

`read()` asks the database, `ask_kafka()` the topic and the groups; `assemble()` makes the life line of what they know,
and asks nobody.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import Literal

from django.utils import timezone

from . import pauses
from .handlers import Consumer, consumers
from .models import DeadLetter, OutboxEvent, ProcessedEvent, RelayCursor, UndeliverableEvent
from .offsets import OffsetsNotKnown, PartitionOffsets, read_offsets
from .record_search import CLOCK_SKEW, SEARCH_SECONDS, FoundRecord, RecordSearch, find_records
from .status import readable_seconds

Tone = Literal["good", "waiting", "bad", "off"]
"""good: it is done. waiting: it goes on by itself. bad: somebody must look. off: there is nothing to come."""

BEHIND = "behind"
NO_ANSWER = "Kafka does not answer now"


@dataclass(frozen=True)
class GroupOffsets:
    """Where a consumer's group stands in the event's topic. `not_known`: why Kafka did not tell, else empty."""

    partitions: Sequence[PartitionOffsets] = ()
    not_known: str = ""


@dataclass(frozen=True)
class KafkaKnows:
    """What Kafka tells of an event: its records, and by consumer where the group stands."""

    search: RecordSearch
    groups: Mapping[str, GroupOffsets] = field(default_factory=dict)


@dataclass(frozen=True)
class ConsumerKnows:
    """What the database tells of an event and a consumer. `not_for_it`: why it does not handle the event, else empty.

    `paused`: since when, by whom and why, empty when it is not.
    """

    name: str
    not_for_it: str = ""
    processed_at: datetime | None = None
    letter: DeadLetter | None = None
    paused: str = ""


@dataclass(frozen=True)
class Known:
    """All that is known of an event. `kafka`: None while Kafka was not asked.

    `is_past_cursor`: None when the cursor is of another cluster, and so does not tell. `relay_waits`: what keeps the
    relay from publishing, empty when nothing does.
    """

    emitted_at: datetime
    is_past_cursor: bool | None
    parked: UndeliverableEvent | None = None
    relay_waits: str = ""
    consumers: Sequence[ConsumerKnows] = ()
    kafka: KafkaKnows | None = None


@dataclass(frozen=True)
class Step:
    """One stage. `state` is for programs, `words` for people; `details` say more, a line each.

    `letter_id`, `undeliverable_id`: where an operator can do something about it.
    """

    name: str
    state: str
    tone: Tone
    words: str
    at: datetime | None = None
    details: Sequence[str] = ()
    letter_id: int | None = None
    undeliverable_id: int | None = None


@dataclass(frozen=True)
class LifeLine:
    """The stages in order. `is_settled`: nothing more comes by itself. `asks_again`: Kafka has told nothing yet."""

    emitted: Step
    published: Step
    consumers: Sequence[Step]
    asks_again: bool = False

    @property
    def is_settled(self) -> bool:
        return not self.asks_again and all(step.tone != "waiting" for step in (self.published, *self.consumers))

    @property
    def summary(self) -> str:
        """The event's state in one sentence, worst first."""
        if self.published.tone != "good":
            return self.published.words
        for tone in ("bad", "waiting"):
            if steps := [step for step in self.consumers if step.tone == tone]:
                return "; ".join(f"{step.name}: {step.words}" for step in steps)
        handled = [step.name for step in self.consumers if step.state == "handled"]
        return f"published, handled by {', '.join(handled)}" if handled else "published"


def read(event: OutboxEvent, cursor: RelayCursor, kafka: KafkaKnows | None = None) -> Known:
    """Ask the database. `kafka`: what Kafka told before, None when it was not asked."""
    registered = consumers()
    names = [consumer.name for consumer in registered]
    of_event = {"event_id": event.event_id, "consumer__in": names}
    marks = dict(ProcessedEvent.objects.filter(**of_event).values_list("consumer", "processed_at"))
    letters = {
        letter.consumer: letter
        for letter in DeadLetter.objects.filter(**of_event).defer("value", "headers", "traceback", "history")
    }
    paused = pauses.paused()
    relay_pause = pauses.relay_pause()
    return Known(
        emitted_at=event.created_at,
        is_past_cursor=cursor.has_published(event) if cursor.is_of_this_cluster() else None,
        parked=getattr(event, "undeliverable", None),
        relay_waits=f"the relay is paused {pauses.in_words(relay_pause)}" if relay_pause else cursor.last_error,
        consumers=[
            ConsumerKnows(
                consumer.name,
                not_for_it=_not_for(consumer, event),
                processed_at=marks.get(consumer.name),
                letter=letters.get(consumer.name),
                paused=paused.get(consumer.name, ""),
            )
            for consumer in registered
        ],
        kafka=kafka,
    )


def ask_kafka(event: OutboxEvent, timeout_seconds: float = SEARCH_SECONDS) -> KafkaKnows:
    """Ask Kafka for the event's records and for the groups of those who handle it, all at the same time."""
    asked = [consumer for consumer in consumers() if not _not_for(consumer, event)]
    with ThreadPoolExecutor(len(asked) + 1, "life line") as pool:
        search = pool.submit(find_records, event, timeout_seconds=timeout_seconds)
        groups = pool.map(partial(_group_offsets, event.topic, timeout_seconds), asked)
        return KafkaKnows(search.result(), {c.name: found for c, found in zip(asked, groups, strict=True)})


def _group_offsets(topic: str, timeout_seconds: float, consumer: Consumer) -> GroupOffsets:
    try:
        return GroupOffsets([place for place in read_offsets(consumer, timeout_seconds) if place.topic == topic])
    except OffsetsNotKnown as error:
        return GroupOffsets(not_known=str(error))


def _not_for(consumer: Consumer, event: OutboxEvent) -> str:
    if consumer.route(event.event_type, event.event_version) is None:
        return "does not handle this type"
    return "" if event.topic in consumer.topics else f"does not read {event.topic}"


def assemble(known: Known, *, shows_operation: bool = True) -> LifeLine:
    """The life line. `shows_operation`: with what is about the relay and the groups as a whole, all tenants' events."""
    if not shows_operation and known.kafka is not None:
        known = replace(known, kafka=without_operation(known.kafka))
    published = _published(known, shows_operation)
    return LifeLine(
        Step("emitted", "emitted", "good", "in the outbox", known.emitted_at),
        published,
        [_consumer(consumer, known, published, shows_operation) for consumer in known.consumers],
        asks_again=known.kafka is not None and bool(known.kafka.search.not_known),
    )


def without_operation(kafka: KafkaKnows) -> KafkaKnows:
    """The same without what names brokers, or tells how much others write."""
    groups = {
        name: replace(group, not_known=NO_ANSWER) if group.not_known else group for name, group in kafka.groups.items()
    }
    search = replace(
        kafka.search,
        not_known=NO_ANSWER if kafka.search.not_known else "",
        cut_short="not everything was read" if kafka.search.cut_short else "",
    )
    return KafkaKnows(search, groups)


def _published(known: Known, shows_operation: bool) -> Step:
    if known.parked is not None:
        return _parked(known.parked)
    search = known.kafka.search if known.kafka is not None else None
    if search is not None and search.records:
        return _found(known, search)
    if known.is_past_cursor is None:
        words = "not known: the database was restored, and no relay has led since"
        return Step("published", "not-known", "waiting", words)
    if known.is_past_cursor:
        return Step("published", "published", "good", "in Kafka", details=[_why_not_found(search)])
    details = [known.relay_waits] if known.relay_waits and shows_operation else []
    return Step("published", "pending", "waiting", "waits for the relay", details=[*_age(known.emitted_at), *details])


def _parked(parked: UndeliverableEvent) -> Step:
    if parked.discarded_at is not None:
        details = [f"by {parked.discarded_by}: {parked.discard_reason}", f"it had been refused: {parked.error}"]
        return Step(
            "published", "discarded", "off", "discarded: it will not be published", parked.discarded_at, details, None,
            parked.pk,
        )  # fmt: skip
    is_redriven = parked.redrive_requested_at is not None
    words = f"undeliverable: refused by Kafka ({parked.reason})"
    if parked.reason == BEHIND:
        words = "undeliverable: waits behind a refused event of its key"
    return Step(
        "published",
        "redriven" if is_redriven else "undeliverable",
        "waiting" if is_redriven else "bad",
        "undeliverable, a redrive is requested" if is_redriven else words,
        parked.parked_at,
        [parked.error] if parked.error else [],
        undeliverable_id=parked.pk,
    )


def _found(known: Known, search: RecordSearch) -> Step:
    first, *others = search.records
    if search.is_dropped:
        details = [f"Kafka holds {len(search.records)} of its records; an earlier one may have been dropped"]
        return Step("published", "published", "good", "in Kafka", details=details)
    details = []
    if first.published_at is not None:
        details.append(f"{_between(known.emitted_at, first.published_at)} after it was emitted")
    if others:
        details.append(f"published {len(others) + 1} times{'' if not search.cut_short else ' or more'}: replayed")
    if known.is_past_cursor is False:
        details.append("the relay has not noted it yet")
    return Step("published", "published", "good", "in Kafka", first.published_at, details)


def _why_not_found(search: RecordSearch | None) -> str:
    if search is None:
        return "when and where: Kafka is being asked"
    if search.not_known:
        return f"when and where is not known: {search.not_known}"
    if search.cut_short:
        return f"when and where is not known: {search.cut_short}"
    if search.is_dropped:
        return "when and where is not known: Kafka no longer holds its record"
    return f"Kafka holds no record of it from {CLOCK_SKEW.seconds} s before it was emitted on"


def _consumer(consumer: ConsumerKnows, known: Known, published: Step, shows_operation: bool) -> Step:
    if consumer.letter is not None and _was_handled_after(consumer.letter, consumer.processed_at):
        consumer = replace(consumer, letter=None)
    if consumer.letter is not None and consumer.letter.state != "replayed":
        return _letter(consumer.name, consumer.letter)
    if consumer.processed_at is not None:
        return _handled(consumer, consumer.processed_at, known, published)
    if consumer.letter is not None:  # its mark was pruned
        return _replayed(consumer.letter)
    if consumer.not_for_it:
        return Step(consumer.name, "not-for-it", "off", consumer.not_for_it)
    if published.state == "discarded":
        return Step(consumer.name, "never", "off", "never gets it")
    if published.state != "published":
        return Step(consumer.name, "waiting", "waiting" if published.tone == "waiting" else "off", "not published yet")
    step = _waiting(consumer, known, published, shows_operation)
    if consumer.paused and step.state == "waiting":
        details = [consumer.paused] if shows_operation else []
        return Step(consumer.name, "paused", "waiting", "waits: the consumer is paused", details=details)
    return step


def _was_handled_after(letter: DeadLetter, processed_at: datetime | None) -> bool:
    """Whether a discarded letter is an old story: its mark was pruned, and the event replayed and handled."""
    is_later = processed_at is not None and letter.resolved_at is not None and processed_at > letter.resolved_at
    return letter.state == "discarded" and is_later


def _letter(name: str, letter: DeadLetter) -> Step:
    details = [letter.error] if letter.error else []
    if letter.state == "discarded":
        details = [f"by {letter.resolved_by}: {letter.resolution_reason}", *details]
        return Step(name, "discarded", "off", "discarded: not handled", letter.resolved_at, details, letter.pk)
    if letter.state == "released":
        words = "parked, and released: handled within seconds"
        return Step(name, "released", "waiting", words, letter.released_at, [], letter.pk)
    if letter.reason == BEHIND:
        words = "parked behind an earlier dead letter of its key"
        return Step(name, "parked", "bad", words, letter.failed_at, [], letter.pk)
    failures = f"failed {letter.attempts} times" if letter.attempts > 1 else ""
    reason = f"dead letter: {letter.get_reason_display()}"
    return Step(
        name, "dead-letter", "bad", reason, letter.failed_at, [line for line in (failures, *details) if line], letter.pk
    )


def _replayed(letter: DeadLetter) -> Step:
    return Step(
        letter.consumer, "handled", "good", "handled on replay", letter.resolved_at, [f"by {letter.resolved_by}"],
        letter.pk,
    )  # fmt: skip


def _handled(consumer: ConsumerKnows, processed_at: datetime, known: Known, published: Step) -> Step:
    details = []
    if published.at is not None and published.state == "published":
        details.append(f"{_between(published.at, processed_at)} after it was published")
    details.append(f"{_between(known.emitted_at, processed_at)} after it was emitted")
    details += _copies(consumer.name, known)
    if consumer.letter is None:
        return Step(consumer.name, "handled", "good", "handled", processed_at, details)
    by = f"by {consumer.letter.resolved_by}, after it had been a dead letter"
    words = "handled on replay"
    return Step(consumer.name, "handled", "good", words, processed_at, [by, *details], consumer.letter.pk)


def _copies(name: str, known: Known) -> list[str]:
    """What became of further records of an event that is handled: whoever is past them has skipped them."""
    group = known.kafka.groups.get(name) if known.kafka is not None else None
    if known.kafka is None or group is None or group.not_known or len(known.kafka.search.records) < 2:
        return []
    passed = sum(_is_past(group, record) for record in known.kafka.search.records)
    ahead = len(known.kafka.search.records) - passed
    skipped = max(passed - 1, 0)
    lines = [f"{skipped} {'duplicate' if skipped == 1 else 'duplicates'} skipped"] if skipped else []
    if ahead:
        lines.append(f"{ahead} {'copy is' if ahead == 1 else 'copies are'} still to come, and will be skipped")
    return lines


def _waiting(consumer: ConsumerKnows, known: Known, published: Step, shows_operation: bool) -> Step:
    age = _age(published.at or known.emitted_at)
    if known.kafka is None:
        return Step(consumer.name, "waiting", "waiting", "not handled so far", details=age)
    group, records = known.kafka.groups.get(consumer.name, GroupOffsets()), known.kafka.search.records
    if group.not_known:
        details = [*age, f"how far its group is: {group.not_known}"]
        return Step(consumer.name, "waiting", "waiting", "not handled so far", details=details)
    if not records:
        if known.kafka.search.is_dropped:
            words = "not known: no mark of it, and Kafka no longer holds its record"
            return Step(consumer.name, "not-known", "off", words)
        return Step(consumer.name, "waiting", "waiting", "not handled so far", details=age)
    if all(_is_past(group, record) for record in records):
        # The mark is older than what is kept, or the group was set past it, or began after it.
        words = "no mark of it, though its group is past it"
        return Step(consumer.name, "passed", "off", words, details=["a mark that was pruned, or offsets that were set"])
    before = min(_before(group, record) for record in records if not _is_past(group, record))
    line = f"{before} {'record' if before == 1 else 'records'} before it" if before else "it is the next one"
    return Step(
        consumer.name, "waiting", "waiting", "waits for the consumer",
        details=[*age, line] if shows_operation else age,
    )  # fmt: skip


def _is_past(group: GroupOffsets, record: FoundRecord) -> bool:
    return _before(group, record) < 0


def _before(group: GroupOffsets, record: FoundRecord) -> int:
    """How many records the group reads before this one; below 0 when it is past it."""
    begins = {place.partition: place.begins_at for place in group.partitions}
    return record.offset - begins.get(record.partition, 0)


def _between(start: datetime, end: datetime) -> str:
    """A wait in words. Clocks of different machines may differ, so that it would be below 0."""
    seconds = max((end - start).total_seconds(), 0.0)
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else readable_seconds(seconds)


def _age(since: datetime) -> list[str]:
    return [f"for {_between(since, timezone.now())}"]
