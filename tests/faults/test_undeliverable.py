"""Refusals by a real broker: what is parked, what flows on, and in which order all of it arrives in the end."""

import random
import time
from contextlib import contextmanager

import pytest
from django.db import transaction
from django.utils import timezone

from events_outbox import NewEvent, emit_events
from events_outbox.models import OutboxEvent, RelayCursor, UndeliverableEvent
from events_outbox.relay import Relay
from events_outbox.status import read_status
from tests.events_outbox.conftest import eventually, in_thread
from tests.events_outbox.test_relay import numbers_by_key
from tests.services import free_ports
from tests.topics import TopicReader
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload
from voicehelper.proto.document_pb2 import DocumentUploadedPayload

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.apache_kafka,
    pytest.mark.needs_tool("openssl"),
]

PAYLOADS = {
    "conversation.created": ConversationCreatedPayload(title="hello"),
    "document.uploaded": DocumentUploadedPayload(),
}


class Emitter:
    """Emits events of either topic, numbered per key, and knows what must arrive."""

    def __init__(self):
        self.expected = {}

    def new(self, event_type, key, payload=None):
        numbers = self.expected.setdefault(key, [])
        numbers.append(len(numbers))
        return NewEvent(
            event_type=event_type,
            payload=payload or PAYLOADS[event_type],
            aggregate_id=key,
            tenant_id="t1",
            metadata={"number": str(numbers[-1])},
        )

    def conversation(self, key, count=1, **fields):
        self.emit([self.new("conversation.created", key, **fields) for _ in range(count)])

    def document(self, key, count=1):
        self.emit([self.new("document.uploaded", key) for _ in range(count)])

    def large(self, key):
        """An event of 8000 characters that do not compress."""
        self.conversation(key, payload=ConversationCreatedPayload(title=random.randbytes(4000).hex()))

    def emit(self, events):
        with transaction.atomic():
            emit_events(events)


@pytest.fixture
def emitter():
    return Emitter()


@pytest.fixture
def topics(secure_kafka, settings):
    """The test's own topics for conversations and documents."""
    number = random.randrange(10**9)
    names = {"conversation": f"conversation.{number}.events", "document": f"document.{number}.events"}
    secure_kafka.create_topics(*names.values())
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "TOPICS": names}
    return names


@pytest.fixture
def relay_user(secure_kafka, settings):
    """The name of a broker user that has no permission yet; relays log in as it."""
    name, password = f"relay-{random.randrange(10**9)}", "right-password"
    secure_kafka.set_password(name, password)
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "KAFKA": secure_kafka.login(name, password)}
    return name


@pytest.fixture
def reader(secure_kafka, topics):
    reader = TopicReader(secure_kafka.bootstrap_servers, topics.values(), from_start=True)
    yield reader
    reader.close()


@contextmanager
def running_relay(**options):
    with in_thread(Relay(**options)):
        yield


def publish(**options):
    Relay(**options).run(until_empty=True)


def redrive():
    """What the operator does."""
    UndeliverableEvent.objects.filter(redrive_requested_at=None).update(redrive_requested_at=timezone.now())


def redrive_until_delivered():
    """Ask again and again: the broker's metadata may lag behind what was mended there."""

    def attempt():
        redrive()
        publish()
        return not UndeliverableEvent.objects.exists()

    eventually(attempt, 30)


def redrive_while_it_runs():
    """Ask for what is not asked for, until the relay has delivered all."""
    eventually(lambda: (redrive(), not UndeliverableEvent.objects.exists())[-1], 40)


def parked():
    """Of each key the reasons, in the order of parking."""
    reasons = {}
    for key, reason in UndeliverableEvent.objects.order_by("id").values_list("aggregate_id", "reason"):
        reasons.setdefault(key, []).append(reason)
    return reasons


def all_parked_or_published():
    return read_status().pending == 0


def assert_parked_in_order():
    """Parking went in the order of the outbox, per key."""
    by_key = {}
    for key, event_id in UndeliverableEvent.objects.order_by("id").values_list("aggregate_id", "event_id"):
        by_key.setdefault(key, []).append(event_id)
    assert all(ids == sorted(ids) for ids in by_key.values())


def test_a_topic_without_permission_parks_its_events_and_redrive_publishes_them_in_order(
    secure_kafka, topics, relay_user, reader, emitter
):
    secure_kafka.allow(relay_user, topics["conversation"])
    for _ in range(5):
        emitter.emit(
            emitter.new(event_type, f"{event_type[0]}{key}")
            for key in range(3)
            for event_type in ("conversation.created", "document.uploaded")
        )
    with running_relay():
        eventually(all_parked_or_published)
        emitter.document("d0", 2)  # behind those of the batches before
        emitter.conversation("c0", 2)
        eventually(all_parked_or_published)
        assert numbers_by_key(reader.read(17)) == {key: emitter.expected[key] for key in ("c0", "c1", "c2")}
        reasons = parked()
        assert {key: len(reasons[key]) for key in reasons} == {"d0": 7, "d1": 5, "d2": 5}
        assert all(names[0] == "TOPIC_AUTHORIZATION_FAILED" for names in reasons.values())
        assert {name for names in reasons.values() for name in names} <= {"TOPIC_AUTHORIZATION_FAILED", "behind"}
        assert_parked_in_order()

        redrive()  # too early: refused again, and nothing overtakes
        eventually(lambda: not UndeliverableEvent.objects.filter(redrive_requested_at__isnull=False).exists())
        assert UndeliverableEvent.objects.count() == 17

        secure_kafka.allow(relay_user, topics["document"])
        redrive_while_it_runs()
        emitter.document("d0")
        eventually(all_parked_or_published)
    assert numbers_by_key(reader.read_rest()) == emitter.expected


def test_permission_taken_and_given_while_events_flow_keeps_every_keys_order(
    secure_kafka, topics, relay_user, reader, emitter, settings
):
    """The client learns of it from the answer to a produce request, with more requests of the same key under way."""
    # One record a request and one partition, so that many requests are under way when the first one is refused.
    documents = topics["document"] + ".narrow"
    secure_kafka.create_topics(documents, partitions=1)
    settings.EVENTS_OUTBOX = {
        **settings.EVENTS_OUTBOX,
        "TOPICS": {**topics, "document": documents},
        "KAFKA_PRODUCER": {"batch.num.messages": 1},
    }
    secure_kafka.allow(relay_user, topics["conversation"], documents)
    for number in range(30):
        # Keys of their own each time: those before may be parked already.
        emitter.emit(
            emitter.new(event_type, f"{event_type[0]}{number}-{key}")
            for _ in range(10)
            for key in range(5)
            for event_type in ("conversation.created", "document.uploaded")
        )
    with running_relay(batch_size=200):
        while (pending := read_status().pending) > 0:
            secure_kafka.forbid_for_a_moment(relay_user, documents)
            eventually(lambda pending=pending: read_status().pending <= max(pending - 200, 0), 60)
        refused = UndeliverableEvent.objects.values_list("topic", "reason").distinct()
        assert set(refused) <= {(documents, "TOPIC_AUTHORIZATION_FAILED"), (documents, "behind")}
        count = UndeliverableEvent.objects.count()
        assert 0 < count < 1500, "some documents were to be refused, and some to get through"
        assert_parked_in_order()
        redrive_while_it_runs()
    later = TopicReader(secure_kafka.bootstrap_servers, [documents], from_start=True)
    assert numbers_by_key(later.read_rest()) | numbers_by_key(reader.read_rest()) == emitter.expected
    later.close()


def test_with_no_permission_at_all_nothing_is_lost_and_nothing_overtakes(
    secure_kafka, topics, relay_user, reader, emitter
):
    """Without any topic to write to, the broker refuses the idempotent producer itself."""
    with running_relay():
        for _ in range(3):
            emitter.conversation("c1", 3)
            emitter.document("d1", 3)
        eventually(lambda: all_parked_or_published() or RelayCursor.read().last_error)
        secure_kafka.allow(relay_user, *topics.values())
        redrive_while_it_runs()
        emitter.conversation("c1", 3)
        eventually(all_parked_or_published)
    assert numbers_by_key(reader.read_rest()) == emitter.expected


@pytest.mark.parametrize("records_a_request", [1, 10_000])
def test_a_record_the_broker_finds_too_large_parks_its_key_only_and_is_redriven_in_order(
    secure_kafka, topics, relay_user, reader, emitter, settings, records_a_request
):
    """The client takes it, the broker refuses it: in the midst of a batch, with its key's events on both sides.

    They are under way in requests of their own, which the broker would take, or in the same one.
    """
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "KAFKA_PRODUCER": {"batch.num.messages": records_a_request}}
    secure_kafka.allow(relay_user, *topics.values())
    secure_kafka.configure_topic(topics["conversation"], max_message_bytes="5000")
    for number in range(40):
        emitter.conversation(f"small-{number % 4}")
        if number in (10, 11, 25):
            emitter.large("big")
        elif number % 5 == 0:
            emitter.conversation("big")
            emitter.document("d1")
    publish()
    emitter.conversation("big", 2)
    emitter.conversation("small-0", 5)
    publish()
    small = [f"small-{key}" for key in range(4)]
    assert set(parked()) == {"big"}
    assert parked()["big"][0] == "MSG_SIZE_TOO_LARGE" and set(parked()["big"][1:]) == {"behind"}
    assert_parked_in_order()
    published = numbers_by_key(reader.read_rest())
    assert {key: published[key] for key in (*small, "d1")} == {key: emitter.expected[key] for key in (*small, "d1")}
    assert published["big"] == [0, 1]  # what came before the refused one

    secure_kafka.configure_topic(topics["conversation"], max_message_bytes="100000")
    redrive_until_delivered()
    emitter.conversation("big")
    publish()
    assert numbers_by_key(reader.read_rest()) == emitter.expected


def test_nothing_overtakes_the_first_record_of_a_new_producer_when_it_is_refused(
    secure_kafka, topics, relay_user, reader, emitter, settings
):
    """A broker that has nothing of a producer yet takes any sequence number: also that of the record after."""
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "KAFKA_PRODUCER": {"batch.num.messages": 1}}
    secure_kafka.allow(relay_user, *topics.values())
    secure_kafka.configure_topic(topics["conversation"], max_message_bytes="5000")
    emitter.large("big")
    emitter.conversation("big", 5)
    publish()
    assert parked() == {"big": ["MSG_SIZE_TOO_LARGE", *["behind"] * 5]}
    assert reader.read_rest() == []

    secure_kafka.configure_topic(topics["conversation"], max_message_bytes="100000")
    redrive_until_delivered()
    assert numbers_by_key(reader.read_rest()) == emitter.expected


def test_nothing_overtakes_in_a_redrive_by_a_producer_that_has_sent_nothing_yet(
    secure_kafka, topics, relay_user, reader, emitter, settings
):
    """It has seen the key go by, parked behind its first event; the broker has still nothing of it."""
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "KAFKA_PRODUCER": {"batch.num.messages": 1}}
    secure_kafka.allow(relay_user, *topics.values())
    secure_kafka.configure_topic(topics["conversation"], max_message_bytes="5000")
    emitter.large("big")
    publish()
    with running_relay():
        emitter.conversation("big", 5)
        eventually(lambda: len(parked()["big"]) == 6)
        redrive()
        eventually(lambda: not UndeliverableEvent.objects.filter(redrive_requested_at__isnull=False).exists())
        assert parked() == {"big": ["MSG_SIZE_TOO_LARGE", *["behind"] * 5]}
        assert_parked_in_order()
    assert reader.read_rest() == []


def test_a_topic_that_takes_no_record_at_all_parks_its_events_and_takes_them_later(
    secure_kafka, topics, relay_user, reader, emitter
):
    """A broker that finds every record's timestamp too old, as one with a wrong clock does."""
    secure_kafka.allow(relay_user, *topics.values())
    secure_kafka.configure_topic(topics["document"], message_timestamp_before_max_ms="0")
    for _ in range(10):
        emitter.document("d1", 2)
        emitter.conversation("c1", 2)
    publish()
    assert set(parked()) == {"d1"} and parked()["d1"][0] in {"INVALID_TIMESTAMP", "INVALID_RECORD"}
    assert numbers_by_key(reader.read(20)) == {"c1": emitter.expected["c1"]}

    secure_kafka.configure_topic(topics["document"], message_timestamp_before_max_ms=str(2**63 - 1))
    redrive_until_delivered()
    assert numbers_by_key(reader.read_rest()) == emitter.expected


def test_a_topic_that_is_not_there_parks_its_events_only(secure_kafka, topics, relay_user, reader, emitter, settings):
    secure_kafka.allow(relay_user, *topics.values())
    missing = topics["document"] + ".missing"
    secure_kafka.allow(relay_user, missing)
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "TOPICS": {**topics, "document": missing}}
    for _ in range(3):
        emitter.document("d1", 2)
        emitter.conversation("c1", 2)
    started = time.monotonic()
    publish()
    assert time.monotonic() - started < 20, "the other topics waited for it"
    emitter.document("d1", 2)
    publish()
    assert set(parked()) == {"d1"} and len(parked()["d1"]) == 8
    assert_parked_in_order()
    assert numbers_by_key(reader.read(6)) == {"c1": emitter.expected["c1"]}

    secure_kafka.create_topics(missing)
    redrive_until_delivered()
    later = TopicReader(secure_kafka.bootstrap_servers, [missing], from_start=True)
    assert numbers_by_key(later.read(8)) == {"d1": emitter.expected["d1"]}
    later.close()


def test_a_wrong_broker_password_parks_nothing_and_is_waited_out(
    secure_kafka, topics, relay_user, reader, emitter, settings
):
    secure_kafka.allow(relay_user, *topics.values())
    login = secure_kafka.login(relay_user, "changed-password")
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "KAFKA": login}
    with running_relay():
        emitter.conversation("c1", 5)
        emitter.document("d1", 5)
        eventually(lambda: "Authentication failed" in RelayCursor.read().last_error)
        emitter.conversation("c1", 5)  # the business goes on
        assert read_status().pending == OutboxEvent.objects.count() == 15
        assert not UndeliverableEvent.objects.exists()
        secure_kafka.set_password(relay_user, "changed-password")
        eventually(all_parked_or_published)
        eventually(lambda: not RelayCursor.read().last_error)
    assert not UndeliverableEvent.objects.exists()
    assert numbers_by_key(reader.read_rest()) == emitter.expected


@pytest.mark.parametrize("why", ["unreachable", "unknown authority", "another host's certificate", "no TLS there"])
def test_a_broker_that_cannot_be_reached_or_trusted_parks_nothing(
    secure_kafka, topics, relay_user, emitter, settings, why
):
    port = secure_kafka.sasl_servers.partition(":")[2]
    changes, says = {
        "unreachable": ({"bootstrap.servers": f"127.0.0.1:{free_ports(1)[0]}"}, "refused"),
        "unknown authority": ({"ssl.ca.location": str(secure_kafka.certificates.other_ca)}, "certificate"),
        "another host's certificate": ({"bootstrap.servers": f"localhost:{port}"}, "certificate"),
        "no TLS there": ({"bootstrap.servers": secure_kafka.bootstrap_servers}, "PLAINTEXT"),
    }[why]
    settings.EVENTS_OUTBOX = {
        **settings.EVENTS_OUTBOX,
        "KAFKA": {**settings.EVENTS_OUTBOX["KAFKA"], **changes},
    }
    with running_relay():
        emitter.conversation("c1", 3)
        eventually(lambda: says in RelayCursor.read().last_error)
        emitter.conversation("c1", 3)
        status = read_status()
        assert status.pending == 6 and status.leader and status.undeliverable == 0
