"""The relay: bytes, order, resume, outage, undeliverable events, failover, another database cluster."""

import random
import select
import time
from collections import defaultdict

import psycopg
import pytest
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from django.core.exceptions import ImproperlyConfigured
from django.core.management import call_command
from django.db import connection, transaction

from events_outbox import apps, emit_event
from events_outbox.leader import APPLICATION_NAME, SESSION_LOST, Leader, open_session
from events_outbox.models import OutboxEvent, RelayCursor, UndeliverableEvent
from events_outbox.proto.base_event_pb2 import BaseEvent
from events_outbox.publisher import Publisher
from events_outbox.rate import GATHER_MAX_SECONDS
from events_outbox.relay import Relay
from events_outbox.status import read_status
from events_outbox.window import open_window
from tests.events_outbox.conftest import eventually, in_thread
from tests.outbox_writers import Ledger, judge, writers
from tests.topics import TopicReader
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload

pytestmark = pytest.mark.django_db(transaction=True)


def numbers_by_key(messages):
    """Per key, the numbers of its events in the order of the topic; an event that comes again counts once."""
    numbers, seen = defaultdict(list), set()
    for message in messages:
        base = BaseEvent.FromString(message.value())
        if base.event_id not in seen:
            seen.add(base.event_id)
            numbers[message.key().decode()].append(int(base.metadata["number"]))
    return numbers


def publish():
    Relay().run(until_empty=True)


def kafka_settings(settings, **changes):
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, **changes}


@pytest.fixture
def no_topic_to_wait_for(settings):
    """Believe the broker at once that a topic is not there, rather than after 30 seconds."""
    kafka_settings(settings, KAFKA_PRODUCER={"topic.metadata.propagation.max.ms": 500})


def test_a_record_is_the_row(emit, topic_reader):
    row = emit("c1", correlation_id="corr-1")
    publish()
    (message,) = topic_reader.read(1)
    assert message.value() == bytes(row.value)
    assert message.topic() == row.topic == "conversation.events"
    assert message.key() == b"c1"
    assert dict(message.headers()) == {
        "event_type": b"conversation.created",
        "tenant_id": b"t1",
        "correlation_id": b"corr-1",
        "event_id": str(row.event_id).encode(),
        "event_version": b"v1",
        "content-type": b"application/x-protobuf; messageType=voicehelper.events.v1.BaseEvent",
    }
    assert read_status().pending == 0


def test_publishing_touches_no_event_row(emit, kafka):
    for number in range(20):
        emit("c1", number)
    sql = "SELECT id, xmin::text, ctid::text FROM events_outbox_outboxevent ORDER BY id"
    with connection.cursor() as cursor:
        cursor.execute(sql)
        before = cursor.fetchall()
        publish()
        cursor.execute(sql)
        assert cursor.fetchall() == before


class PausesOnce(Relay):
    """Stops at its first pause, and remembers how long it would have been."""

    paused_seconds = None

    def _pause(self, seconds):
        self.paused_seconds = seconds
        self.stop()


@pytest.mark.parametrize(("batch_size", "rests"), [(2, False), (3, True)])
def test_a_relay_rests_after_a_window_unless_it_is_behind(emit, kafka, settings, batch_size, rests):
    kafka_settings(settings, IDLE_POLL_MIN_SECONDS=0.0001)
    emit("c1", 1)
    emit("c2", 2)
    relay = PausesOnce(batch_size=batch_size)
    relay.run()
    assert relay.paused_seconds == (GATHER_MAX_SECONDS if rests else 0.0001)
    assert read_status().pending == 0


def test_an_idle_relay_reads_the_outbox_only_when_something_was_committed(kafka, settings, monkeypatch):
    kafka_settings(settings, IDLE_POLL_MIN_SECONDS=0.0001, IDLE_POLL_MAX_SECONDS=0.0001)
    pauses, windows = [], []

    class PausesOften(Relay):
        def _pause(self, seconds):
            pauses.append(seconds)
            if len(pauses) == 50:
                self.stop()

    monkeypatch.setattr("events_outbox.relay.open_window", lambda *given: windows.append(given) or open_window(*given))
    PausesOften().run()
    assert len(pauses) == 50
    assert 1 <= len(windows) < 20  # its own heartbeats are commits, and so is what else the server does


def test_events_of_a_key_share_a_partition_and_keep_their_order(emit, topic_reader):
    for number in range(30):
        emit(f"c{number % 3}", number)
    publish()
    messages = topic_reader.read(30)
    assert numbers_by_key(messages) == {f"c{k}": list(range(k, 30, 3)) for k in range(3)}
    assert len({(m.key(), m.partition()) for m in messages}) == 3


def test_a_relay_stopped_inside_a_window_goes_on_there(emit, topic_reader):
    for number in range(10):
        emit("c1", number)
    with open_session() as session:
        leader = Leader(session)
        assert leader.try_lead()
        relay = Relay(batch_size=3)
        relay.stop()
        publisher = Publisher(lambda what_for: None)
        assert relay.publish_window(leader, publisher) == 3
        publisher.close()
    cursor = RelayCursor.read()
    assert cursor.window is not None
    assert read_status().pending == 7
    statuses = [cursor.has_published(event) for event in OutboxEvent.objects.order_by("id")]
    assert statuses == [True] * 3 + [False] * 7
    emit("c1", 10)  # of the next window
    publish()
    assert numbers_by_key(topic_reader.read(11)) == {"c1": list(range(11))}
    assert len(topic_reader.read_rest()) == 11
    assert RelayCursor.read().window is None


def test_nothing_missed_through_the_relay_under_concurrent_writers(topic_reader, aggregates):
    ledger, seed = Ledger(), random.randrange(10**9)
    with in_thread(Relay(batch_size=50)), writers(ledger, seed):
        eventually(lambda: ledger.count() > 1500, 60)
    publish()
    ids = dict(OutboxEvent.objects.values_list("event_id", "id"))
    published = [BaseEvent.FromString(m.value()).event_id for m in topic_reader.read_rest()]
    by_text = {str(event_id): id_ for event_id, id_ in ids.items()}
    assert judge([by_text[event_id] for event_id in published], ledger).total == 0, f"seed {seed}"


def test_an_outage_is_waited_out_and_said(emit, topic_reader, kafka):
    relay = Relay()
    with in_thread(relay):
        emit("c1", 0)
        topic_reader.read(1)
        kafka.pause()
        for number in range(1, 50):
            emit("c1", number)  # the business goes on
        eventually(lambda: RelayCursor.read().last_error)
        status = read_status()
        assert status.pending == 49 and status.leader and status.heartbeat_age_seconds < 5
        kafka.resume()
        eventually(lambda: read_status().pending == 0)
        eventually(lambda: not RelayCursor.read().last_error)
    assert numbers_by_key(topic_reader.read_rest()) == {"c1": list(range(50))}
    assert not UndeliverableEvent.objects.exists()


def test_a_relay_stopped_during_an_outage_stops_and_loses_nothing(emit, topic_reader, kafka):
    with in_thread(Relay()) as thread:
        emit("c1", 0)
        topic_reader.read(1)
        kafka.pause()
        emit("c1", 1)
        eventually(lambda: RelayCursor.read().last_error)
    assert not thread.is_alive()
    assert read_status().pending == 1
    kafka.resume()
    publish()
    assert numbers_by_key(topic_reader.read_rest()) == {"c1": [0, 1]}


def test_a_record_too_large_is_parked_with_its_key_and_redriven_in_order(emit, topic_reader, settings):
    emit("big", 0)
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "MAX_EVENT_BYTES": 2_000_000}
    with transaction.atomic():
        emit_event(
            "conversation.created",
            ConversationCreatedPayload(title="x" * 1_100_000),
            aggregate_id="big",
            tenant_id="t1",
            metadata={"number": "1"},
        )
    emit("big", 2)
    emit("small", 0)
    publish()
    emit("big", 3)
    publish()
    assert numbers_by_key(topic_reader.read(2)) == {"big": [0], "small": [0]}
    parked = UndeliverableEvent.objects.order_by("id")
    assert [(p.aggregate_id, p.reason) for p in parked] == [
        ("big", "MSG_SIZE_TOO_LARGE"),
        ("big", "behind"),
        ("big", "behind"),
    ]
    assert read_status().pending == 0 and read_status().undeliverable == 3

    parked.update(redrive_requested_at="2026-01-01T00:00:00Z")
    publish()
    assert UndeliverableEvent.objects.count() == 3  # refused again, and nothing overtook it
    assert not UndeliverableEvent.objects.filter(redrive_requested_at__isnull=False).exists()

    # The record compresses well: the broker's own limit is on what arrives there.
    kafka_settings(settings, KAFKA_PRODUCER={"message.max.bytes": 2_000_000})
    parked.update(redrive_requested_at="2026-01-01T00:00:00Z")
    publish()
    emit("big", 4)
    publish()
    assert numbers_by_key(topic_reader.read(6))["big"] == [0, 1, 2, 3, 4]
    assert not UndeliverableEvent.objects.exists()


def test_a_busy_key_is_redriven_whole(emit, topic_reader):
    """Events that come in after the operator's click are redriven with those before them."""
    emit("busy", 0)
    publish()
    row = emit("busy", 1)
    UndeliverableEvent.objects.create(event=row, topic=row.topic, aggregate_id="busy", reason="x", error="x")
    publish()  # past it, as the relay that parked it
    numbers = iter(range(2, 1000))
    topic_reader.read(1)
    with in_thread(Relay()):
        emit("busy", next(numbers))
        eventually(lambda: UndeliverableEvent.objects.count() >= 2)
        UndeliverableEvent.objects.update(redrive_requested_at="2026-01-01T00:00:00Z")
        eventually(lambda: emit("busy", next(numbers)) and not UndeliverableEvent.objects.exists())
        count = OutboxEvent.objects.count()
        eventually(lambda: read_status().pending == 0)
    assert numbers_by_key(topic_reader.read_rest())["busy"] == list(range(count))


@pytest.mark.apache_kafka
def test_small_events_are_not_undeliverable_because_their_batch_is_too_large(emit, kafka, settings):
    topic = f"small.{random.randrange(10**9)}.events"
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    new = NewTopic(topic, num_partitions=1, replication_factor=1, config={"max.message.bytes": "5000"})
    admin.create_topics([new])[topic].result(30)
    kafka_settings(settings, TOPICS={"conversation": topic}, KAFKA_PRODUCER={"compression.type": "none"})
    for number in range(60):
        emit(f"c{number % 3}", number)
    with transaction.atomic():
        emit_event(
            "conversation.created",
            ConversationCreatedPayload(title="x" * 8000),
            aggregate_id="big",
            tenant_id="t1",
            metadata={"number": "0"},
        )
    emit("big", 1)
    publish()
    assert list(UndeliverableEvent.objects.order_by("id").values_list("aggregate_id", "reason")) == [
        ("big", "MSG_SIZE_TOO_LARGE"),
        ("big", "behind"),
    ]
    reader = TopicReader(kafka.bootstrap_servers, [topic], from_start=True)
    assert numbers_by_key(reader.read(60)) == {f"c{k}": list(range(k, 60, 3)) for k in range(3)}
    reader.close()


@pytest.mark.apache_kafka
def test_no_request_under_way_overtakes_a_refused_one(emit, kafka, settings):
    """Many small requests at once, and one is refused: what is behind it in its partition must not land."""
    topic = f"gapless.{random.randrange(10**9)}.events"
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    new = NewTopic(topic, num_partitions=2, replication_factor=1, config={"max.message.bytes": "5000"})
    admin.create_topics([new])[topic].result(30)
    kafka_settings(
        settings,
        TOPICS={"conversation": topic},
        KAFKA_PRODUCER={"compression.type": "none", "batch.size": 2000},
    )
    keys, big = 7, 150
    for number in range(300):
        title = "x" * (8000 if number == big else 300)
        with transaction.atomic():
            emit_event(
                "conversation.created",
                ConversationCreatedPayload(title=title),
                aggregate_id=f"c{number % keys}",
                tenant_id="t1",
                metadata={"number": str(number)},
            )
    publish()
    reader = TopicReader(kafka.bootstrap_servers, [topic], from_start=True)
    held = f"c{big % keys}"
    expected = {f"c{k}": [n for n in range(k, 300, keys) if f"c{k}" != held or n < big] for k in range(keys)}
    assert numbers_by_key(reader.read_rest()) == expected
    reader.close()
    parked = UndeliverableEvent.objects.order_by("id").values_list("aggregate_id", "reason")
    assert list(parked) == [(held, "MSG_SIZE_TOO_LARGE")] + [(held, "behind")] * len(range(big + keys, 300, keys))


@pytest.mark.apache_kafka
def test_a_topic_that_is_not_there_parks_its_events_only(emit, topic_reader, settings, kafka, no_topic_to_wait_for):
    settings.EVENTS_OUTBOX = {
        **settings.EVENTS_OUTBOX,
        "TOPICS": {"conversation": f"missing.{random.randrange(10**9)}.events"},
    }
    missing = settings.EVENTS_OUTBOX["TOPICS"]["conversation"]
    for number in range(3):
        emit("c1", number)
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "TOPICS": {"conversation": "conversation.events"}}
    emit("c1", 3)
    publish()
    assert numbers_by_key(topic_reader.read(1)) == {"c1": [3]}  # another topic is another order
    assert UndeliverableEvent.objects.filter(topic=missing).count() == 3

    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "DEFAULT_TOPIC": missing}
    call_command("create_topics")
    UndeliverableEvent.objects.update(redrive_requested_at="2026-01-01T00:00:00Z")
    eventually(lambda: (publish(), not UndeliverableEvent.objects.exists())[1])
    reader = TopicReader(kafka.bootstrap_servers, [missing], from_start=True)
    assert numbers_by_key(reader.read(3)) == {"c1": [0, 1, 2]}
    reader.close()


def test_a_working_relay_shows_life(emit, kafka):
    for number in range(30):
        emit("c1", number)
    ticks = []
    Relay(batch_size=3, on_tick=lambda: ticks.append(None)).run(until_empty=True)
    assert len(ticks) >= 10  # one a batch


def test_a_standby_takes_over(emit, topic_reader):
    first, second = Relay(), Relay()
    with in_thread(second):
        eventually(lambda: read_status().leader)
        with in_thread(first):
            eventually(lambda: read_status().standbys == 1)
            emit("c1", 0)
            second.stop()
            emit("c1", 1)
            assert numbers_by_key(topic_reader.read(2)) == {"c1": [0, 1]}
            eventually(lambda: read_status().standbys == 0)
            emit("c1", 2)
            topic_reader.read(3)


def test_a_relay_whose_session_is_killed_leads_again_by_itself(emit, topic_reader):
    with in_thread(Relay()):
        emit("c1", 0)
        topic_reader.read(1)
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s", [APPLICATION_NAME]
            )
        emit("c1", 1)
        assert numbers_by_key(topic_reader.read(2))["c1"] == [0, 1]


def test_a_frozen_leader_loses_the_lead(settings):
    kafka_settings(settings, LEADER_SESSION_TIMEOUT_SECONDS=2)
    with open_session() as frozen:
        assert Leader(frozen).try_lead()
        with open_session() as standby:
            started = time.monotonic()
            leader = Leader(standby)
            eventually(leader.try_lead, 10)
            assert time.monotonic() - started > 0.5
        with pytest.raises(psycopg.OperationalError):
            frozen.execute("SELECT 1")


def test_a_session_that_the_server_ends_in_a_transaction_counts_as_lost():
    """As for a relay that was frozen while it parked events: the driver calls it an internal error."""
    with open_session() as session:
        session.execute("SET idle_in_transaction_session_timeout = '100ms'")
        with pytest.raises(SESSION_LOST), session.transaction():
            session.execute("SELECT 1")
            eventually(lambda: select.select([session.pgconn.socket], [], [], 0)[0])
            session.execute("SELECT 1")


def test_a_producer_that_has_delivered_all_is_not_stuck(kafka):
    """However long ago it was that something had to be waited for."""
    publisher = Publisher(lambda what_for: None)
    publisher._stuck_at = 0.0
    publisher._waiting()


def test_a_database_of_other_apps_is_left_alone(settings):
    class Router:
        def allow_migrate(self, db, app_label, **hints):
            return app_label != "events_outbox"

    RelayCursor.objects.all().delete()
    settings.DATABASE_ROUTERS = [Router()]
    apps._make_cursor(using="default")
    assert not RelayCursor.objects.exists()
    settings.DATABASE_ROUTERS = []
    apps._make_cursor(using="default")
    assert RelayCursor.objects.exists()


def test_another_cluster_is_noticed_and_the_cursor_carried_over(emit, topic_reader):
    """As after a restore: transaction ids of another cluster, half a window published, some events pending."""
    for number in range(6):
        emit("c1", number)
    ids = list(OutboxEvent.objects.order_by("id").values_list("id", flat=True))
    old = OutboxEvent.objects.latest("id").transaction_id + 1_000_000  # the old cluster was far ahead
    with connection.cursor() as cursor:
        for id_, xid in zip(ids, (1, 2, 1001, 1002, 1003, 5000), strict=True):
            cursor.execute(
                "UPDATE events_outbox_outboxevent SET transaction_id = %s::text::xid8 WHERE id = %s",
                [str(old + xid), id_],
            )
        cursor.execute(
            """UPDATE events_outbox_relaycursor SET published = %s, "window" = %s, window_last_id = %s,
                      system_identifier = 42""",
            [f"{old + 1000}:{old + 1000}:", f"{old + 2000}:{old + 2000}:", ids[3]],
        )
    # Written in the new cluster, whose transaction ids the old snapshot would take for seen.
    emit("c1", 6)
    with transaction.atomic():
        emit("c1", 7)  # in a savepoint
    publish()
    assert numbers_by_key(topic_reader.read(4)) == {"c1": [4, 5, 6, 7]}
    assert len(topic_reader.read_rest()) == 4
    assert read_status().pending == 0


def test_after_pg_upgrade_nothing_published_comes_again(emit, topic_reader):
    """The same rows and transaction ids, under another system identifier."""
    for number in range(5):
        emit("c1", number)
    publish()
    emit("c1", 5)
    RelayCursor.objects.update(system_identifier=42)
    emit("c1", 6)
    publish()
    publish()
    assert numbers_by_key(topic_reader.read(7)) == {"c1": list(range(7))}
    assert len(topic_reader.read_rest()) == 7


def test_unhandled_events_are_published_again(emit, topic_reader):
    emit("c1", 0)
    publish()
    topic_reader.read(1)
    call_command("replay_outbox", unhandled=True)
    first, again = topic_reader.read(2)
    assert first.value() == again.value()


def test_acks_1_turns_idempotence_off_and_works(emit, topic_reader, settings):
    kafka_settings(settings, ACKS="1")
    emit("c1", 0)
    publish()
    assert len(topic_reader.read(1)) == 1


@pytest.mark.parametrize(
    ("kafka", "says"),
    [({}, "make up"), ({"bootstrap.servers": "x:1", "no.such.setting": "1"}, "no.such.setting")],
)
def test_wrong_kafka_settings_end_the_relay_with_a_clear_error(emit, settings, kafka, says):
    kafka_settings(settings, KAFKA=kafka)
    emit("c1", 0)
    with pytest.raises(ImproperlyConfigured, match=says):
        publish()
