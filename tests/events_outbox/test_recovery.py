"""A lost cursor: rebuilt from what the broker holds; nothing is lost, and nothing published comes again."""

import random
import time
from datetime import timedelta

import pytest
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from django.core.management import call_command
from django.db import connection

from events_outbox.models import OutboxEvent, RelayCursor, UndeliverableEvent
from events_outbox.relay import Relay
from events_outbox.status import read_status
from tests.events_outbox.conftest import eventually, in_thread
from tests.topics import TopicReader

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def one_clock(monkeypatch):
    """Not all that the other tests have published in the last hour is to be read."""
    monkeypatch.setattr("events_outbox.recovery.CLOCK_SKEW", timedelta(seconds=1))


def publish():
    Relay().run(until_empty=True)


def numbers(messages):
    return [int(message.value().partition(b"number-")[2][:4]) for message in messages]


@pytest.fixture
def emit_number(emit):
    def emit_number(number, **fields):
        # The number is in the correlation id, where a plain look at the bytes finds it.
        return emit(f"c{number % 3}", number, correlation_id=f"number-{number:04}", **fields)

    return emit_number


def lose_cursor():
    RelayCursor.objects.all().delete()


def push_into_the_future():
    with connection.cursor() as cursor:
        cursor.execute(
            """UPDATE events_outbox_relaycursor SET "window" = NULL, window_last_id = 0, published =
                   (SELECT format('%1$s:%1$s:', (pg_current_xact_id()::text::bigint + 1000000))::pg_snapshot)"""
        )


@pytest.mark.apache_kafka  # of the embedded broker's topics the relay cannot tell what they hold: it publishes again
@pytest.mark.parametrize("loss", [lose_cursor, push_into_the_future])
def test_only_what_was_pending_is_published(emit, emit_number, topic_reader, loss):
    for number in range(50):
        emit_number(number)
    publish()
    for number in range(50, 80):
        emit_number(number)
    parked = emit("parked", 80)
    UndeliverableEvent.objects.create(event=parked, topic=parked.topic, aggregate_id="parked", reason="x", error="x")
    topic_reader.read(50)
    loss()
    publish()
    for number in range(81, 90):
        emit_number(number)
    publish()
    published = numbers(topic_reader.read_rest())
    assert sorted(published) == [n for n in range(90) if n != 80]
    assert [n for n in published if n % 3 == 0] == list(range(0, 90, 3))
    assert read_status().pending == 0
    assert UndeliverableEvent.objects.count() == 1


@pytest.mark.apache_kafka
def test_transaction_ids_of_another_cluster_do_not_matter(emit_number, topic_reader):
    """As after a restore without the cursor: ids that this cluster will not come to for long."""
    for number in range(20):
        emit_number(number)
    publish()
    for number in range(20, 30):
        emit_number(number)
    with connection.cursor() as cursor:
        cursor.execute(
            """UPDATE events_outbox_outboxevent
                  SET transaction_id = (transaction_id::text::bigint + 1000000)::text::xid8"""
        )
    lose_cursor()
    publish()
    assert sorted(numbers(topic_reader.read_rest())) == list(range(30))
    assert read_status().pending == 0
    publish()
    assert len(topic_reader.read_rest()) == 30


@pytest.mark.apache_kafka
def test_what_the_topic_has_dropped_counts_as_published(emit_number, kafka, settings):
    topic = f"short.{random.randrange(10**9)}.events"
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    admin.create_topics([NewTopic(topic, num_partitions=2, replication_factor=1)])[topic].result(30)
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "TOPICS": {"conversation": topic}}
    for number in range(20):
        emit_number(number)
    publish()
    with connection.cursor() as cursor:
        cursor.execute("UPDATE events_outbox_outboxevent SET created_at = created_at - interval '3 days'")
    reader = TopicReader(kafka.bootstrap_servers, [topic], from_start=True)
    reader.read(20)
    ends = reader._client.position(reader._assigned)
    for future in admin.delete_records(ends).values():
        future.result(30)
    for number in range(20, 40):
        emit_number(number)
    publish()
    reader.read(40)
    for number in range(40, 50):
        emit_number(number)
    lose_cursor()
    publish()
    assert sorted(numbers(reader.read_rest())) == list(range(50))
    reader.close()


@pytest.mark.apache_kafka
def test_without_the_broker_it_waits(emit_number, topic_reader, kafka, monkeypatch):
    monkeypatch.setattr("events_outbox.recovery.BROKER_SECONDS", 0.5)
    emit_number(0)
    publish()
    topic_reader.read(1)
    emit_number(1)
    lose_cursor()
    kafka.pause()
    with in_thread(Relay()):
        time.sleep(3)  # several tries
        assert not RelayCursor.objects.exists()
        kafka.resume()
        eventually(lambda: RelayCursor.objects.exists() and read_status().pending == 0, 60)
    assert numbers(topic_reader.read_rest()) == [0, 1]


def test_migrate_makes_a_cursor_for_a_new_outbox_only(emit):
    lose_cursor()
    call_command("migrate", verbosity=0)
    assert RelayCursor.objects.exists()
    emit("c1")
    lose_cursor()
    call_command("migrate", verbosity=0)
    assert OutboxEvent.objects.exists() and not RelayCursor.objects.exists()
