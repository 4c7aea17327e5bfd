"""What operators do with undeliverable events, by command: list, redrive, discard, in order and all or nothing."""

import getpass
import json
import logging
import re
import uuid
from contextlib import ExitStack

import pytest
from django.core.management import CommandError, call_command
from django.db import connection, transaction

from events_outbox import emit_event, leader
from events_outbox.models import OutboxEvent, RelayCursor, UndeliverableEvent
from events_outbox.proto.base_event_pb2 import BaseEvent
from events_outbox.publisher import BEHIND
from events_outbox.relay import Relay
from events_outbox.status import read_status
from events_outbox.undeliverable import ActionRefused, Discarded, Redriven, discard, redrive
from tests.events_outbox.conftest import eventually, in_thread
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload

pytestmark = pytest.mark.django_db(transaction=True)

REFUSED = "MSG_SIZE_TOO_LARGE"


def publish():
    Relay().run(until_empty=True)


@pytest.fixture
def park(emit):
    """Park events of a key as a relay does that is past them; returns the undeliverable events."""

    def park(aggregate, *reasons):
        parked = []
        for number, reason in enumerate(reasons):
            row = emit(aggregate, number)
            parked.append(
                UndeliverableEvent.objects.create(
                    event=row,
                    topic=row.topic,
                    aggregate_id=aggregate,
                    reason=reason,
                    error=f"{reason}\nsays the broker",
                )
            )
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_current_snapshot()::text")
            (snapshot,) = cursor.fetchone()
        RelayCursor.objects.update(published=snapshot)
        return parked

    return park


def run(capsys, *arguments):
    call_command("undeliverable", *map(str, arguments))
    return capsys.readouterr().out


def requested():
    found = UndeliverableEvent.objects.filter(redrive_requested_at__isnull=False)
    return set(found.values_list("pk", flat=True))


def state():
    """Everything that an action may change."""
    rows = UndeliverableEvent.objects.order_by("id")
    return list(rows.values_list("id", "redrive_requested_at", "discarded_at", "discarded_by", "discard_reason"))


def numbers_by_key(messages):
    numbers = {}
    for message in messages:
        number = int(BaseEvent.FromString(message.value()).metadata["number"])
        numbers.setdefault(message.key().decode(), []).append(number)
    return numbers


# List


def test_the_list_shows_what_is_open(park, capsys):
    assert run(capsys, "list") == "0 undeliverable events\n"
    (head, follower), (other,) = park("c1", REFUSED, BEHIND), park("c2", "POLICY_VIOLATION")
    UndeliverableEvent.objects.filter(pk=follower.pk).update(redrive_requested_at="2026-01-01T00:00Z")
    lines = run(capsys, "list").splitlines()
    assert lines[-1] == "3 undeliverable events"
    assert re.split(r"  +", lines[0]) == [
        "id", "parked at", "reason", "state", "topic", "aggregate id", "event type", "event id", "why"
    ]  # fmt: skip
    assert [re.split(r"  +", line)[2:] for line in lines[1:-1]] == [
        [p.reason, state, "conversation.events", p.aggregate_id, "conversation.created", str(p.event.event_id), why]
        for p, state, why in (
            (head, "open", f"{REFUSED} says the broker"),
            (follower, "to be redriven", "behind says the broker"),
            (other, "open", "POLICY_VIOLATION says the broker"),
        )
    ]
    assert len({line.index("conversation.events") for line in lines[1:-1]}) == 1  # aligned


def test_the_list_is_filtered_and_limited(park, capsys):
    (head, follower), (other,) = park("c1", REFUSED, BEHIND), park("c2", REFUSED)
    UndeliverableEvent.objects.filter(pk=other.pk).update(topic="default.events")

    def listed(*arguments):
        return [row["id"] for row in json.loads(run(capsys, "list", "--json", *arguments))]

    assert listed() == [head.pk, follower.pk, other.pk]
    assert listed("--topic", "default.events") == [other.pk]
    assert listed("--aggregate-id", "c1") == [head.pk, follower.pk]
    assert listed("--reason", REFUSED) == [head.pk, other.pk]
    assert listed("--limit", "1") == [head.pk]
    assert run(capsys, "list", "--limit", "2").splitlines()[-1] == "2 of 3"
    run(capsys, "discard", other.pk, "--reason", "gone")
    assert listed() == [head.pk, follower.pk] and listed("--discarded") == [other.pk]


def test_json_tells_everything(park, capsys):
    (head,) = park("c1", REFUSED)
    run(capsys, "discard", head.pk, "--reason", "test data")
    (row,) = json.loads(run(capsys, "list", "--json", "--discarded"))
    head.refresh_from_db()
    assert row == {
        "id": head.pk,
        "state": "discarded",
        "reason": REFUSED,
        "error": f"{REFUSED}\nsays the broker",
        "parked_at": head.parked_at.isoformat(),
        "redrive_requested_at": None,
        "discarded_at": head.discarded_at.isoformat(),
        "discarded_by": head.discarded_by,
        "discard_reason": "test data",
        "topic": "conversation.events",
        "aggregate_id": "c1",
        "outbox_id": head.event_id,
        "event_id": str(head.event.event_id),
        "event_type": "conversation.created",
        "tenant_id": "t1",
        "created_at": head.event.created_at.isoformat(),
    }


# Redrive


def test_a_key_is_redriven_whole(park, capsys, caplog):
    (head, follower), (other,) = park("c1", REFUSED, BEHIND), park("c2", REFUSED)
    caplog.set_level(logging.INFO, "events_outbox.undeliverable")
    assert run(capsys, "redrive", follower.pk, "--dry-run") == "2 events of 1 keys would be redriven\n"
    assert requested() == set() and not caplog.records
    assert run(capsys, "redrive", follower.pk).startswith("2 events of 1 keys to be redriven: ")
    assert requested() == {head.pk, follower.pk}
    (record,) = [record for record in caplog.records if record.name == "events_outbox.undeliverable"]
    assert (record.events, record.keys) == (2, 1) and record.by.startswith(f"{getpass.getuser()}@")
    run(capsys, "redrive", other.event.event_id)
    assert requested() == {head.pk, follower.pk, other.pk}


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        (["--all"], {"c1", "c2", "c3"}),
        (["--aggregate-id", "c2"], {"c2"}),
        (["--reason", REFUSED], {"c1", "c3"}),
        (["--reason", REFUSED, "--topic", "default.events"], {"c3"}),
    ],
)
def test_keys_are_chosen_by_filters(park, capsys, arguments, chosen):
    park("c1", REFUSED, BEHIND), park("c2", "POLICY_VIOLATION", BEHIND), park("c3", REFUSED)
    UndeliverableEvent.objects.filter(aggregate_id="c3").update(topic="default.events")
    run(capsys, "redrive", *arguments)
    rows = UndeliverableEvent.objects.filter(redrive_requested_at__isnull=False)
    assert set(rows.values_list("aggregate_id", flat=True)) == chosen
    assert rows.count() == UndeliverableEvent.objects.filter(aggregate_id__in=chosen).count()


def test_the_same_aggregate_in_another_topic_is_another_key(park):
    first, second = park("c1", REFUSED, REFUSED)
    UndeliverableEvent.objects.filter(pk=second.pk).update(topic="default.events")
    assert redrive(UndeliverableEvent.objects.filter(pk=first.pk), by="alice") == Redriven(1, 1)
    assert requested() == {first.pk}


# Discard


def test_a_discarded_event_stays_visible_with_who_and_why(park, capsys, caplog):
    (head,) = park("c1", REFUSED)
    assert run(capsys, "discard", head.pk, "--reason", " test data ", "--dry-run") == "1 events would be discarded\n"
    assert UndeliverableEvent.objects.open().exists() and not caplog.records
    assert run(capsys, "discard", head.pk, "--reason", " test data ") == "1 events discarded\n"
    head.refresh_from_db()
    assert head.discarded_at and head.discard_reason == "test data"
    assert head.discarded_by.startswith(f"{getpass.getuser()}@") and head.redrive_requested_at is None
    (record,) = [record for record in caplog.records if record.name == "events_outbox.undeliverable"]
    assert (record.outbox_id, record.reason, record.by) == (head.event_id, "test data", head.discarded_by)
    assert f"{head.discarded_by}: test data" in run(capsys, "list", "--discarded")


def test_followers_of_a_discarded_head_are_redriven(park, capsys):
    head, follower, last = park("c1", REFUSED, BEHIND, BEHIND)
    (other, others_follower) = park("c2", REFUSED, BEHIND)
    assert "2 events of 1 keys waited for them and would be redriven" in run(
        capsys, "discard", head.pk, "--reason", "x", "--dry-run"
    )
    assert requested() == set()
    assert "2 events of 1 keys waited for them and are to be redriven" in run(
        capsys, "discard", head.pk, "--reason", "x"
    )
    assert requested() == {follower.pk, last.pk}
    assert others_follower.pk not in requested() and other.pk not in requested()


@pytest.mark.parametrize(
    ("reasons", "given_up", "redriven"),
    [
        ((REFUSED, BEHIND, BEHIND), [1], []),  # the head still holds the others back
        ((REFUSED, REFUSED, BEHIND), [0], []),  # so does the next one, which was refused itself
        ((REFUSED, REFUSED, BEHIND), [0, 1], [2]),
        ((REFUSED, BEHIND, REFUSED, BEHIND), [0], [1, 2, 3]),  # a key is redriven whole
        ((REFUSED, BEHIND), [0, 1], []),
    ],
)
def test_what_is_freed_depends_on_what_is_left(park, reasons, given_up, redriven):
    parked = park("c1", *reasons)
    discarded = discard([parked[index].pk for index in given_up], reason="x", by="alice")
    assert discarded == Discarded(len(given_up), Redriven(len(redriven), 1 if redriven else 0))
    assert requested() == {parked[index].pk for index in redriven}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["redrive", "{head}", "999999"], "no undeliverable event 999999"),
        (["redrive", "{head}", "{discarded}"], "discarded already: {discarded}"),
        (["redrive", "{head}", str(uuid.UUID(int=5))], f"event {uuid.UUID(int=5)} is not undeliverable"),
        (["redrive", "{head}", "five"], "'five' is neither an id nor an event id"),
        (["redrive"], "say what to redrive"),
        (["redrive", "{head}", "--all"], "say what to redrive"),
        (["discard", "{head}", "999999", "--reason", "x"], "no undeliverable event 999999"),
        (["discard", "{head}", "{discarded}", "--reason", "x"], "discarded already: {discarded}"),
        (["discard", "{head}", "{wanted}", "--reason", "x"], "a redrive is requested, .* {wanted}"),
        (["discard", "--all", "--reason", "x"], "a redrive is requested, .* {wanted}"),
        (["discard", "{head}", "--reason", " "], "say why"),
        (["discard", "--reason", "x"], "say what to discard"),
        (["discard", "{head}"], "--reason"),
        ([], "list | redrive | discard"),
    ],
)
def test_what_cannot_be_done_changes_nothing(park, arguments, says):
    head, discarded, wanted = park("c1", REFUSED)[0], park("c2", REFUSED)[0], park("c3", REFUSED)[0]
    discard([discarded.pk], reason="gone", by="alice")
    redrive(UndeliverableEvent.objects.filter(pk=wanted.pk), by="alice")
    ids = {"head": head.pk, "discarded": discarded.pk, "wanted": wanted.pk}
    before = state()
    with pytest.raises(CommandError, match=says.format(**ids)):
        call_command("undeliverable", *(argument.format(**ids) for argument in arguments))
    assert state() == before


def test_all_that_is_open_is_discarded(park, capsys):
    park("c1", REFUSED, BEHIND), park("c2", REFUSED)
    assert run(capsys, "discard", "--all", "--reason", "the topic is history") == "3 events discarded\n"
    assert not UndeliverableEvent.objects.open().exists()


class InThread:
    """A call to run in a thread, with what it returned or raised."""

    def __init__(self, call):
        self.call = call
        self.outcome = None

    def run(self):
        try:
            self.outcome = self.call()
        except ActionRefused as error:
            self.outcome = str(error)

    def stop(self):
        pass


def test_a_redrive_leaves_out_what_is_being_discarded(park):
    head, follower = park("c1", REFUSED, REFUSED)
    redriving = InThread(lambda: redrive(UndeliverableEvent.objects.filter(pk=follower.pk), by="bob"))
    with ExitStack() as waiting, transaction.atomic():
        discard([head.pk], reason="x", by="alice")
        waiting.enter_context(in_thread(redriving))
        eventually(waits_for_a_lock)
        # Committed: now it can go on.
    assert redriving.outcome == Redriven(1, 1) and requested() == {follower.pk}


def test_what_is_being_redriven_is_not_discarded(park):
    (head,) = park("c1", REFUSED)
    discarding = InThread(lambda: discard([head.pk], reason="x", by="alice"))
    with ExitStack() as waiting, transaction.atomic():
        redrive(UndeliverableEvent.objects.filter(pk=head.pk), by="bob")
        waiting.enter_context(in_thread(discarding))
        eventually(waits_for_a_lock)
    assert "a redrive is requested" in discarding.outcome
    assert UndeliverableEvent.objects.open().count() == 1


def waits_for_a_lock():
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_locks WHERE NOT granted")  # not cached in a transaction
        return cursor.fetchone()[0]


# With a relay


@pytest.fixture
def too_large(settings):
    """Emit an event that the producer refuses, as its limit is lower than that of emit_event()."""
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "MAX_EVENT_BYTES": 2_000_000}

    def emit_too_large(aggregate, number):
        with transaction.atomic():
            return emit_event(
                "conversation.created",
                ConversationCreatedPayload(title="x" * 1_100_000),
                aggregate_id=aggregate,
                tenant_id="t1",
                metadata={"number": str(number)},
            )

    return emit_too_large


@pytest.mark.parametrize("page_bytes", [16_000_000, 1])
def test_a_leading_relay_redrives_in_order(emit, too_large, topic_reader, settings, monkeypatch, page_bytes):
    monkeypatch.setattr(leader, "PAGE_MAX_BYTES", page_bytes)
    too_large("c1", 0)
    for number in range(1, 4):
        emit("c1", number)
    publish()
    assert UndeliverableEvent.objects.count() == 4
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "KAFKA_PRODUCER": {"message.max.bytes": 2_000_000}}
    with in_thread(Relay()):
        eventually(lambda: read_status().leader)
        emit("c1", 4)
        call_command("undeliverable", "redrive", "--aggregate-id", "c1")
        assert numbers_by_key(topic_reader.read(5)) == {"c1": [0, 1, 2, 3, 4]}
        eventually(lambda: not UndeliverableEvent.objects.exists())


def test_a_leading_relay_goes_on_behind_a_discarded_event(emit, too_large, topic_reader):
    with in_thread(Relay()):
        first = too_large("c1", 0)
        alone = too_large("c2", 0)
        for number in range(1, 4):
            emit("c1", number)
        eventually(lambda: UndeliverableEvent.objects.count() == 5)
        ids = [UndeliverableEvent.objects.get(event=row).pk for row in (first, alone)]
        call_command("undeliverable", "discard", *map(str, ids), "--reason", "too large for anybody")
        assert numbers_by_key(topic_reader.read(3)) == {"c1": [1, 2, 3]}
        # The key of an event that had no followers is free again too, once the relay has heard of it.
        emit("c2", 1)
        emit("c1", 4)
        assert numbers_by_key(topic_reader.read(5)) == {"c1": [1, 2, 3, 4], "c2": [1]}
        eventually(lambda: not UndeliverableEvent.objects.open().exists())
    assert set(UndeliverableEvent.objects.values_list("event_id", flat=True)) == {first.pk, alone.pk}
    assert OutboxEvent.objects.filter(pk__in=[first.pk, alone.pk]).count() == 2
