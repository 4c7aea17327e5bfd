"""The life line: what it says of what is known, as a table; and what is read from the database and from Kafka."""

from datetime import UTC, datetime, timedelta

import pytest

from events_outbox import pauses
from events_outbox.consumer import ConsumerProcess
from events_outbox.exceptions import PermanentEventError
from events_outbox.letter_actions import discard, replay_one
from events_outbox.life_line import ConsumerKnows, GroupOffsets, KafkaKnows, Known, ask_kafka, assemble, read
from events_outbox.models import DeadLetter, ProcessedEvent, RelayCursor, UndeliverableEvent
from events_outbox.offsets import PartitionOffsets
from events_outbox.record_search import FoundRecord, RecordSearch
from events_outbox.relay import Relay
from events_outbox.replay import Replay, Selection
from tests.events_outbox.conftest import eventually, in_thread

EMITTED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def after(seconds):
    return EMITTED + timedelta(seconds=seconds)


def records(*offsets):
    return [FoundRecord(1, offset, after(2 + number)) for number, offset in enumerate(offsets)]


def kafka(*offsets, begins_at=None, group="", **search):
    place = [] if begins_at is None else [PartitionOffsets("t", 1, begins_at, 0, 99, begins_at, 99 - begins_at, 1.0)]
    groups = {"billing": GroupOffsets(place, group)}
    return KafkaKnows(RecordSearch(records(*offsets), **search), groups)


def letter(**fields):
    fields = {"pk": 7, "consumer": "billing", "reason": "failed", "error": "KeyError: 'x'", "attempts": 4} | fields
    return DeadLetter(failed_at=after(3), failed_by="consumer", **fields)


def line(*, is_past_cursor=True, shows_operation=True, parked=None, relay_waits="", found=None, **consumer):
    known = Known(EMITTED, is_past_cursor, parked, relay_waits, [ConsumerKnows("billing", **consumer)], found)
    return assemble(known, shows_operation=shows_operation)


PARKED = {"pk": 3, "reason": "MSG_SIZE_TOO_LARGE", "error": "too large", "parked_at": after(1)}


@pytest.mark.parametrize(
    ("known", "state", "tone", "words", "detail"),
    [
        ({"is_past_cursor": False}, "pending", "waiting", "waits for the relay", "for "),
        (
            {"is_past_cursor": False, "relay_waits": "the relay is paused by alice"},
            "pending", "waiting", "waits for the relay", "the relay is paused by alice",
        ),
        ({"parked": PARKED}, "undeliverable", "bad", "refused by Kafka (MSG_SIZE_TOO_LARGE)", "too large"),
        ({"parked": PARKED | {"reason": "behind"}}, "undeliverable", "bad", "waits behind a refused event", ""),
        ({"parked": PARKED | {"redrive_requested_at": after(9)}}, "redriven", "waiting", "a redrive is requested", ""),
        (
            {"parked": PARKED | {"discarded_at": after(9), "discarded_by": "alice", "discard_reason": "old"}},
            "discarded", "off", "discarded", "by alice: old",
        ),
        ({}, "published", "good", "in Kafka", "Kafka is being asked"),
        ({"found": kafka(4)}, "published", "good", "in Kafka", "2.0 s after it was emitted"),
        ({"found": kafka(4, 9)}, "published", "good", "in Kafka", "published 2 times: replayed"),
        ({"found": kafka(4), "is_past_cursor": False}, "published", "good", "in Kafka", "has not noted it yet"),
        ({"found": kafka(not_known="Kafka does not answer: x")}, "published", "good", "in Kafka", "does not answer: x"),
        ({"found": kafka(cut_short="5 records were read")}, "published", "good", "in Kafka", "5 records were read"),
        ({"found": kafka(is_dropped=True)}, "published", "good", "in Kafka", "no longer holds its record"),
        ({"found": kafka(9, is_dropped=True)}, "published", "good", "in Kafka", "an earlier one may have been dropped"),
        ({"found": kafka()}, "published", "good", "in Kafka", "no record of it from 10 s before"),
        ({"is_past_cursor": None}, "not-known", "waiting", "the database was restored", ""),
        ({"is_past_cursor": None, "found": kafka(4)}, "published", "good", "in Kafka", "2.0 s after it was emitted"),
    ],
)  # fmt: skip
def test_publishing(known, state, tone, words, detail):
    if "parked" in known:
        known = known | {"parked": UndeliverableEvent(**known["parked"])}
    step = line(**known).published
    assert (step.state, step.tone) == (state, tone)
    assert words in step.words and detail in " ".join(step.details)


RESOLVED = {"resolved_at": after(8), "resolved_by": "alice", "resolution_reason": "no use"}


@pytest.mark.parametrize(
    ("known", "state", "tone", "words", "detail"),
    [
        ({"is_past_cursor": False}, "waiting", "waiting", "not published yet", ""),
        ({}, "waiting", "waiting", "not handled so far", "for "),
        ({"processed_at": after(5)}, "handled", "good", "handled", "5.0 s after it was emitted"),
        (
            {"processed_at": after(5), "found": kafka(4, begins_at=5)},
            "handled",
            "good",
            "handled",
            "3.0 s after it was published",
        ),
        (
            {"processed_at": after(1), "found": kafka(4, begins_at=5)},
            "handled",
            "good",
            "handled",
            "0 ms after it was published",
        ),
        (
            {"processed_at": after(5), "found": kafka(4, 8, 9, begins_at=9)},
            "handled",
            "good",
            "handled",
            "1 duplicate skipped 1 copy is still to come",
        ),
        ({"not_for_it": "does not handle this type"}, "not-for-it", "off", "does not handle this type", ""),
        (
            {"letter": letter(), "processed_at": after(5)},
            "dead-letter",
            "bad",
            "dead letter: out of retries",
            "failed 4 times KeyError: 'x'",
        ),
        (
            {"letter": letter(reason="behind"), "processed_at": after(5)},
            "parked",
            "bad",
            "parked behind an earlier",
            "",
        ),
        ({"letter": letter(reason="behind", released_at=after(6))}, "released", "waiting", "released", ""),
        (
            {"letter": letter(resolution="discarded", **RESOLVED), "processed_at": after(5)},
            "discarded",
            "off",
            "not handled",
            "by alice: no use",
        ),
        (
            {"letter": letter(resolution="replayed", **RESOLVED), "processed_at": after(8)},
            "handled",
            "good",
            "handled on replay",
            "by alice",
        ),
        ({"letter": letter(resolution="replayed", **RESOLVED)}, "handled", "good", "handled on replay", "by alice"),
        ({"paused": "since today by alice: a bug"}, "paused", "waiting", "paused", "by alice: a bug"),
        ({"found": kafka(4, begins_at=1)}, "waiting", "waiting", "waits for the consumer", "3 records before it"),
        ({"found": kafka(4, begins_at=4)}, "waiting", "waiting", "waits for the consumer", "it is the next one"),
        (
            {"found": kafka(4, begins_at=1), "shows_operation": False},
            "waiting",
            "waiting",
            "waits for the consumer",
            "for ",
        ),
        ({"found": kafka(4, begins_at=5)}, "passed", "off", "its group is past it", "pruned"),
        ({"found": kafka(4, group="no answer")}, "waiting", "waiting", "not handled so far", "no answer"),
        ({"found": kafka(is_dropped=True)}, "not-known", "off", "Kafka no longer holds its record", ""),
        ({"found": kafka(4, begins_at=5), "paused": "by alice: a bug"}, "passed", "off", "its group is past it", ""),
    ],
)
def test_a_consumer(known, state, tone, words, detail):
    (step,) = line(**known).consumers
    assert (step.state, step.tone) == (state, tone)
    assert words in step.words and detail in " ".join(step.details)
    assert (step.letter_id == 7) == ("letter" in known)


def test_what_concerns_all_tenants_is_left_out():
    hidden = line(is_past_cursor=False, relay_waits="paused", shows_operation=False)
    assert "paused" not in " ".join(hidden.published.details)
    (step,) = line(found=kafka(4, begins_at=1), shows_operation=False).consumers
    assert "before it" not in " ".join(step.details)
    (step,) = line(paused="by alice: a bug", shows_operation=False).consumers
    assert step.details == []
    away = line(found=kafka(not_known="Kafka does not answer: broker-1:9093", group="broker-1"), shows_operation=False)
    assert "broker-1" not in repr(away)


def test_a_dropped_first_record_leaves_out_how_long_it_took():
    whole = line(found=kafka(9, is_dropped=True), processed_at=after(5))
    assert whole.published.at is None
    assert "after it was published" not in " ".join(whole.consumers[0].details)


def test_what_was_handled_after_its_letter_was_discarded_is_handled():
    discarded = letter(resolution="discarded", resolved_at=after(10), resolved_by="alice", resolution_reason="old")
    assert line(letter=discarded, processed_at=after(9)).consumers[0].state == "discarded"
    assert line(letter=discarded, processed_at=after(11)).consumers[0].state == "handled"


@pytest.mark.parametrize(
    ("known", "is_settled", "summary"),
    [
        ({"is_past_cursor": False}, False, "waits for the relay"),
        ({}, False, "billing: not handled so far"),
        ({"processed_at": after(5)}, True, "published, handled by billing"),
        ({"processed_at": after(5), "found": kafka(not_known="busy")}, False, "published, handled by billing"),
        ({"letter": letter()}, True, "billing: dead letter: out of retries"),
        ({"not_for_it": "does not handle this type"}, True, "published"),
        ({"parked": UndeliverableEvent(**PARKED)}, True, "undeliverable: refused by Kafka (MSG_SIZE_TOO_LARGE)"),
    ],
)
def test_the_whole_in_words_and_whether_more_is_to_come(known, is_settled, summary):
    whole = line(**known)
    assert (whole.is_settled, whole.summary) == (is_settled, summary)


@pytest.fixture
def told_what_it_is(kafka, settings):
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "KAFKA_IS_EMBEDDED": kafka.kind != "apache"}


def whole_line(event):
    event.refresh_from_db()
    return assemble(read(event, RelayCursor.read(), ask_kafka(event)))


def step_of(event, consumer):
    return next(step for step in whole_line(event).consumers if step.name == consumer.name)


@pytest.mark.django_db(transaction=True)
def test_from_the_relay_to_the_consumer_and_again(kafka, told_what_it_is, emit, make_consumer, at_the_end):
    consumer = make_consumer()
    # It reads a second topic, whose partitions have the same numbers.
    consumer.handles("conversation.created", "document.uploaded")(lambda event: None)
    emit("c1")
    Relay().run(until_empty=True)
    at_the_end(consumer)
    event = emit("c1")
    assert whole_line(event).published.state == "pending"
    Relay().run(until_empty=True)
    step = step_of(event, consumer)
    assert (step.state, step.details[-1]) == ("waiting", "it is the next one")
    pauses.pause(consumer.name, by="alice", reason="a bug")
    assert step_of(event, consumer).state == "paused"
    pauses.resume(consumer.name, by="alice")
    with in_thread(ConsumerProcess(consumer)):
        eventually(lambda: step_of(event, consumer).state == "handled")
    with Replay(Selection(event_ids=[event.event_id])) as again:
        again.publish()
    whole = whole_line(event)
    assert "published 2 times: replayed" in whole.published.details
    assert whole.published.at >= whole.emitted.at - timedelta(seconds=1)
    assert "1 copy is still to come, and will be skipped" in step_of(event, consumer).details
    with in_thread(ConsumerProcess(consumer)):
        eventually(lambda: "1 duplicate skipped" in step_of(event, consumer).details)


@pytest.mark.django_db(transaction=True)
def test_a_dead_letter_has_a_mark_and_is_shown_as_what_it_is(kafka, told_what_it_is, emit, make_consumer, at_the_end):
    consumer = make_consumer()
    broken = [True]

    @consumer.handles("conversation.created")
    def handle(event):
        if broken:
            raise PermanentEventError("broken")

    at_the_end(consumer)
    one, other = emit("c1"), emit("c2")
    Relay().run(until_empty=True)
    with in_thread(ConsumerProcess(consumer)):
        eventually(lambda: DeadLetter.objects.filter(consumer=consumer.name).count() == 2)
    assert ProcessedEvent.objects.filter(consumer=consumer.name).count() == 2
    letters = {letter.event_id: letter for letter in DeadLetter.objects.all()}
    step = step_of(one, consumer)
    assert (step.state, step.letter_id) == ("dead-letter", letters[one.event_id].pk)
    assert "broken" in " ".join(step.details)
    discard([letters[other.event_id].pk], reason="no use", by="alice")
    assert step_of(other, consumer).state == "discarded"
    broken.clear()
    replay_one(letters[one.event_id].pk, by="bob")
    step = step_of(one, consumer)
    assert (step.state, step.words) == ("handled", "handled on replay") and "by bob" in step.details[0]


@pytest.mark.django_db(transaction=True)
def test_while_kafka_is_away_the_database_is_heard(kafka, told_what_it_is, emit, make_consumer):
    consumer = make_consumer()
    consumer.handles("conversation.created")(lambda event: None)
    event = emit("c1")
    Relay().run(until_empty=True)
    ProcessedEvent.objects.create(consumer=consumer.name, event_id=event.event_id)
    kafka.stop()
    whole = whole_line(event)
    assert (whole.published.state, whole.published.at) == ("published", None)
    assert "Kafka does not answer" in whole.published.details[0]
    assert step_of(event, consumer).state == "handled"


@pytest.mark.django_db
def test_a_consumer_of_other_types_or_topics_is_not_waited_for(emit, make_consumer):
    other_type, other_topic = make_consumer(), make_consumer(topics=["elsewhere"])
    other_type.handles("document.uploaded")(lambda event: None)
    other_topic.handles("conversation.created")(lambda event: None)
    known = {one.name: one for one in read(emit("c1"), RelayCursor.read()).consumers}
    assert known[other_type.name].not_for_it == "does not handle this type"
    assert known[other_topic.name].not_for_it == "does not read conversation.events"


@pytest.mark.django_db
def test_a_paused_relay_is_told(emit):
    pauses.pause_relay(by="alice", reason="maintenance")
    assert "by alice: maintenance" in read(emit("c1"), RelayCursor.read()).relay_waits
