"""What a consumer promises, on the embedded broker and on Apache Kafka alike."""

import itertools
import uuid
from collections import Counter, defaultdict

import pytest
from confluent_kafka import Consumer as Client
from confluent_kafka import Producer, TopicPartition
from django.db import connection

from events_outbox.consumer import ConsumerProcess
from events_outbox.models import DeadLetter, ProcessedEvent
from events_outbox.proto.base_event_pb2 import BaseEvent
from events_outbox.relay import Relay
from tests.events_outbox.conftest import eventually, in_thread
from tests.services import SERVICES, TOPICS, free_ports
from tests.topics import TopicReader
from voicehelper.devstack.embedded_broker import EmbeddedBroker

pytestmark = pytest.mark.django_db(transaction=True)

EMBEDDED = "embedded"
APACHE = pytest.param("apache", marks=pytest.mark.apache_kafka)
TOPIC = "conversation.events"


@pytest.fixture(scope="module")
def embedded_broker(request):
    """One of its own, beside the broker of the run."""
    (port,) = free_ports(1)
    broker = EmbeddedBroker(port, TOPICS, output=request.config.stash[SERVICES].log.fileno())
    broker.start()
    try:
        broker.wait_until_ready()
        yield broker
    finally:
        broker.kill()


@pytest.fixture(params=[EMBEDDED, APACHE])
def broker(request, settings):
    """The broker that relay and consumers of the test use."""
    broker = request.getfixturevalue("embedded_broker" if request.param == EMBEDDED else "kafka")
    settings.EVENTS_OUTBOX = {
        **settings.EVENTS_OUTBOX,
        "KAFKA": {"bootstrap.servers": broker.bootstrap_servers},
        # Members are told of a rebalance with a heartbeat, and the embedded broker always waits for those that do not
        # answer, until shortly before their session is over.
        "KAFKA_CONSUMER": {"session.timeout.ms": 2000, "heartbeat.interval.ms": 200},
    }
    return broker


@pytest.fixture
def consumer(broker, make_consumer):
    """A consumer of its own group, that begins at the present end of the topic: the tests share it."""
    consumer = make_consumer(topics=[TOPIC])
    reader = TopicReader(broker.bootstrap_servers, [TOPIC], group_id=consumer.group_id)
    reader.commit_start()
    reader.close()
    return consumer


@pytest.fixture
def effects(consumer):
    """The effects in the database, in order: (aggregate, number)."""
    with connection.cursor() as cursor:
        cursor.execute("CREATE TABLE test_effect (id bigserial, aggregate text, number int)")

    @consumer.handles("conversation.created")
    def write(event):
        with connection.cursor() as cursor:
            values = [event.aggregate_id, int(event.metadata["number"])]
            cursor.execute("INSERT INTO test_effect (aggregate, number) VALUES (%s, %s)", values)

    def effects():
        with connection.cursor() as cursor:
            cursor.execute("SELECT aggregate, number FROM test_effect ORDER BY id")
            return cursor.fetchall()

    yield effects
    with connection.cursor() as cursor:
        cursor.execute("DROP TABLE test_effect")


@pytest.fixture
def publish(broker):
    """Put records into the topic as they are: (key, value)."""
    producer = Producer({"bootstrap.servers": broker.bootstrap_servers, "linger.ms": 0})

    def publish(*records):
        for key, value in records:
            producer.produce(TOPIC, value, key=key)
        assert producer.flush(30) == 0

    return publish


def relay():
    Relay().run(until_empty=True)


def run(consumer, **options):
    ConsumerProcess(consumer, **options).run(until_idle_seconds=0.3)


def committed(broker, consumer):
    """How many records lie below the group's offsets, and how many there are."""
    client = Client({"bootstrap.servers": broker.bootstrap_servers, "group.id": consumer.group_id})
    places = client.committed([TopicPartition(TOPIC, number) for number in range(6)], timeout=10)
    ends = [client.get_watermark_offsets(place, timeout=10)[1] for place in places]
    client.close()
    return sum(place.offset for place in places), sum(ends)


def test_events_of_a_key_come_in_their_order(consumer, effects, emit):
    keys = [f"c{n}" for n in range(10)]
    for number in range(8):
        for key in keys:
            emit(key, number)
    relay()
    run(consumer, batch_size=7)
    by_key = defaultdict(list)
    for key, number in effects():
        by_key[key].append(number)
    assert by_key == {key: list(range(8)) for key in keys}


def test_what_comes_again_has_no_second_effect(consumer, effects, emit, publish):
    rows = [emit("c1", number) for number in range(5)]
    again = [(b"c1", bytes(row.value)) for row in rows]
    publish(*again, *again)  # within a batch
    run(consumer)
    publish(*again)  # after a restart
    run(consumer)
    assert effects() == [("c1", number) for number in range(5)]
    assert ProcessedEvent.objects.filter(consumer=consumer.name).count() == 5


def test_two_members_share_the_partitions_and_neither_lose_nor_double(consumer, effects, emit):
    numbers = itertools.count()
    first, second = ConsumerProcess(consumer, batch_size=7), ConsumerProcess(consumer, batch_size=7)

    def emit_some(count):
        for number in itertools.islice(numbers, count):
            emit(f"c{number % 30}", number)

    with in_thread(Relay()), in_thread(first):
        emit_some(30)
        eventually(lambda: len(effects()) == 30)
        with in_thread(second):
            eventually(lambda: (emit_some(1), first.group.owned and second.group.owned)[1], 60)
            emit_some(60)
            assert not first.group.owned & second.group.owned
            emit_some(30)
        emit_some(30)
        total = next(numbers)
        eventually(lambda: len(effects()) >= total, 60)
    assert sorted(number for _, number in effects()) == list(range(total))
    by_key = defaultdict(list)
    for key, number in effects():
        by_key[key].append(number)
    assert all(numbers == sorted(numbers) for numbers in by_key.values())


def test_a_restart_goes_on_where_the_last_one_stopped(broker, consumer, effects, emit):
    for number in range(20):
        emit(f"c{number}", number)
    relay()
    run(consumer)
    below, records = committed(broker, consumer)
    assert below == records
    for number in range(20, 25):
        emit(f"c{number}", number)
    relay()
    delivered = []

    class Listening(ConsumerProcess):
        def handle_batch(self, records):
            delivered.extend(records)
            super().handle_batch(records)

    Listening(consumer).run(until_idle_seconds=0.3)
    assert len(delivered) == 5 and len(effects()) == 25
    below, records = committed(broker, consumer)
    assert below == records


def test_poison_and_tombstones_become_dead_letters_and_the_rest_is_handled(broker, consumer, effects, emit, publish):
    other_payload = BaseEvent(event_id=str(uuid.uuid4()), event_type="conversation.created", event_version="v1")
    row = emit("c1", 1)
    poison = [
        (b"c1", None),
        (b"c1", b""),
        (None, None),
        (b"\xff", b"\xff\x00 junk"),
        (None, other_payload.SerializeToString()),
    ]
    publish(*poison, (b"c1", bytes(row.value)))
    run(consumer)
    assert effects() == [("c1", 1)]
    kept = Counter((letter.key, letter.value, letter.reason) for letter in DeadLetter.objects.all())
    reasons = ["unparsable"] * 4 + ["payload_mismatch"]
    assert kept == Counter((key, value, reason) for (key, value), reason in zip(poison, reasons, strict=True))
    below, records = committed(broker, consumer)
    assert below == records


# Left out of the embedded broker: it takes no offsets for a group that it knows from anybody who is no member. Nor does
# it keep anything when it ends, which makes tests that restart a broker need Apache Kafka too.
@pytest.mark.parametrize("broker", [APACHE], indirect=True)
def test_a_group_that_was_set_back_gets_all_again_to_no_effect(broker, consumer, effects, emit):
    reader = TopicReader(broker.bootstrap_servers, [TOPIC], group_id=consumer.group_id)
    for number in range(10):
        emit(f"c{number}", number)
    relay()
    run(consumer)
    before = sorted(effects())
    assert len(before) == 10
    reader.commit_start()
    reader.close()
    below, records = committed(broker, consumer)
    assert below == records - 10
    run(consumer)
    below, records = committed(broker, consumer)
    assert below == records and sorted(effects()) == before
