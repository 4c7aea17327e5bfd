"""Consumers in their group: offsets, rebalances, long handlers, waiting, pauses, a broker that goes and comes."""

import itertools
import subprocess
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from confluent_kafka import Consumer as KafkaClient
from confluent_kafka import KafkaError, KafkaException, Producer, TopicPartition

from events_outbox import RetryPolicy, pauses
from events_outbox.consumer import ConsumerProcess
from events_outbox.models import DeadLetter, OperatorAction, ProcessedEvent, RelayCursor
from events_outbox.policies import FailureGuard
from events_outbox.proto.base_event_pb2 import BaseEvent
from events_outbox.records import Record
from events_outbox.relay import Relay
from tests.events_outbox.conftest import counted, eventually, group_counter, in_thread
from voicehelper.proto.identity_pb2 import UserRegisteredPayload

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("kafka")]


def test_records_are_handled_once_and_offsets_committed(make_consumer, emit, at_the_end):
    consumer = make_consumer()
    counts = group_counter(consumer)
    at_the_end(consumer)
    for number in range(20):
        emit(f"c{number % 4}", number)
    Relay().run(until_empty=True)
    ConsumerProcess(consumer).run(until_idle_seconds=0.5)
    assert counts() == dict.fromkeys(range(20), 1)
    ConsumerProcess(consumer).run(until_idle_seconds=0.5)  # nothing comes again
    assert counted("consumer_events_duplicate_total", consumer=consumer.name) == 0


def test_a_poisoned_topic_does_not_stop_the_consumer(make_consumer, emit, at_the_end, kafka):
    consumer = make_consumer()
    counts = group_counter(consumer)
    at_the_end(consumer)
    unknown = BaseEvent(event_id=str(uuid.uuid4()), event_type="conversation.created", event_version="v99")
    other_payload = BaseEvent(event_id=str(uuid.uuid4()), event_type="conversation.created", event_version="v1")
    other_payload.payload.Pack(UserRegisteredPayload(user_id="u"))
    poison = {
        b"\xff\x00 junk": "unparsable",
        b"": "unparsable",
        None: "unparsable",
        unknown.SerializeToString(): "unknown_type",
        other_payload.SerializeToString(): "payload_mismatch",
    }
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers})
    for value in poison:
        producer.produce("conversation.events", value, key=b"poison")
    assert producer.flush(10) == 0
    emit("c1", 1)
    Relay().run(until_empty=True)
    with in_thread(ConsumerProcess(consumer)):
        eventually(lambda: counts() == {1: 1})
        eventually(lambda: DeadLetter.objects.filter(consumer=consumer.name).count() == len(poison))
    kept = {letter.value and bytes(letter.value): letter.reason for letter in DeadLetter.objects.all()}
    assert kept == poison


@pytest.mark.needs_tool("kcat")
def test_a_header_name_that_is_no_text_does_not_stop_the_consumer(make_consumer, emit, at_the_end, kafka):
    consumer = make_consumer()
    counts = group_counter(consumer)
    at_the_end(consumer)
    for number in range(50):  # the interpreter calls what it has called often in another way
        emit("c1", number)
    Relay().run(until_empty=True)
    command = ["kcat", "-P", "-b", kafka.bootstrap_servers, "-t", "conversation.events", "-H", b"\xff\xfe=1"]
    with in_thread(ConsumerProcess(consumer)):
        eventually(lambda: len(counts()) == 50)
        subprocess.run(command, input=b"junk", check=True, timeout=30)
        letter = eventually(lambda: DeadLetter.objects.filter(consumer=consumer.name).first())
        emit("c1", 50)
        Relay().run(until_empty=True)
        eventually(lambda: len(counts()) == 51)
    assert bytes(letter.value) == b"junk"


def test_members_that_come_and_go_lose_and_double_nothing(make_consumer, emit, at_the_end):
    consumer = make_consumer()
    counts = group_counter(consumer)
    at_the_end(consumer)
    numbers = iter(range(10_000))
    first, second = ConsumerProcess(consumer, batch_size=7), ConsumerProcess(consumer, batch_size=7)

    def emit_some(count):
        for number in itertools.islice(numbers, count):
            emit(f"c{number % 30}", number)

    with in_thread(Relay()), in_thread(first):
        emit_some(50)
        eventually(lambda: len(counts()) == 50)
        with in_thread(second):
            eventually(lambda: (emit_some(1), first.group.owned and second.group.owned)[1], 60)
            before = len(counts())
            emit_some(100)
            eventually(lambda: len(counts()) >= before + 100)
            emit_some(50)
        emit_some(50)
        total = next(numbers)
        eventually(lambda: len(counts()) == total, 60)
    assert counts() == dict.fromkeys(range(total), 1)


@pytest.mark.apache_kafka  # the embedded broker rebalances too slowly to come and go within one batch
def test_a_partition_that_is_lost_and_comes_back_in_one_batch_is_not_skipped(make_consumer, emit, at_the_end, kafka):
    consumer = make_consumer(retry=RetryPolicy(max_retries=2, initial_delay_seconds=5, multiplier=1))
    counts = group_counter(consumer)
    count, attempts, other_left = consumer._handlers.pop("conversation.created").function, [], threading.Event()

    @consumer.handles("conversation.created")
    def fail_thrice_then_count(event):
        attempts.append(event)
        if len(attempts) <= 3:  # in the batch, then alone: two long waits
            raise ValueError("not yet")
        count(event)
        first.stop()  # after this batch: only what it committed tells the next member where to begin

    at_the_end(consumer)
    for number in range(60):
        emit(f"c{number}", number)
    Relay().run(until_empty=True)

    def come_and_go():
        """Another member takes some of the partitions during the first wait, and leaves during the second."""
        other = KafkaClient(
            {
                "bootstrap.servers": kafka.bootstrap_servers,
                "group.id": consumer.group_id,
                "partition.assignment.strategy": "cooperative-sticky",
                "enable.auto.commit": False,
            }
        )
        other.subscribe(consumer.topics)
        eventually(lambda: (other.poll(0.1), other.assignment())[1], 30)
        eventually(lambda: len(attempts) >= 3, 30)
        other.close()
        other_left.set()

    first = ConsumerProcess(consumer)
    visitor = threading.Thread(target=come_and_go)
    with in_thread(first) as running:
        eventually(lambda: len(attempts) >= 2, 30)
        visitor.start()
        running.join(60)
    visitor.join()
    assert other_left.is_set()
    assert 0 < len(counts()) < 60, "some partitions were to be lost, and only some"
    with in_thread(ConsumerProcess(consumer)):
        eventually(lambda: counts() == dict.fromkeys(range(60), 1), 60)


@pytest.mark.apache_kafka  # the embedded broker rebalances too slowly
def test_partitions_that_went_during_a_wait_flow_again_when_they_come_back(make_consumer, emit, at_the_end):
    """The client keeps them paused: as they were when they went."""
    consumer = make_consumer(retry=RetryPolicy(max_retries=1, initial_delay_seconds=8))
    counts = group_counter(consumer)
    count, attempts = consumer._handlers.pop("conversation.created").function, []

    @consumer.handles("conversation.created")
    def fail_twice_then_count(event):
        attempts.append(event)
        if len(attempts) <= 2:  # in the batch, then alone: one long wait
            raise ValueError("not yet")
        count(event)

    at_the_end(consumer)
    emit("c1", 1000)
    Relay().run(until_empty=True)
    first, second = ConsumerProcess(consumer), ConsumerProcess(consumer)
    with in_thread(first):
        eventually(lambda: len(attempts) == 2, 30)
        with in_thread(second):
            eventually(lambda: second.group.owned, 30)
            eventually(lambda: 1000 in counts(), 60)
        eventually(lambda: len(first.group.owned) == 6, 30)
        for number in range(60):
            emit(f"c{number}", number)
        Relay().run(until_empty=True)
        eventually(lambda: set(range(60)) <= set(counts()))


@pytest.mark.apache_kafka
def test_a_broker_frozen_in_mid_batch_does_not_freeze_the_consumer(make_consumer, emit, at_the_end, kafka):
    consumer, ticks = make_consumer(), []
    counts = group_counter(consumer)
    count = consumer._handlers.pop("conversation.created").function

    @consumer.handles("conversation.created")
    def count_and_freeze(event):
        kafka.pause()
        count(event)

    at_the_end(consumer)
    emit("c1", 0)
    Relay().run(until_empty=True)
    with in_thread(ConsumerProcess(consumer, on_tick=lambda: ticks.append(None))):
        eventually(lambda: counts() == {0: 1})
        before = len(ticks)
        eventually(lambda: len(ticks) > before + 3)
    # in_thread() has stopped it, within half a minute, while the broker was frozen


def test_a_consumer_waits_for_a_broker_that_is_away(make_consumer, emit, at_the_end, kafka):
    consumer = make_consumer()
    counts = group_counter(consumer)
    at_the_end(consumer)
    with in_thread(Relay()), in_thread(ConsumerProcess(consumer)):
        emit("c1", 0)
        eventually(lambda: 0 in counts())
        kafka.pause()
        emit("c1", 1)
        eventually(lambda: RelayCursor.read().last_error)
        kafka.resume()
        eventually(lambda: 1 in counts(), 60)
    assert counts() == {0: 1, 1: 1}


# -- long handlers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient_group(settings):
    """A member that does not poll for two seconds is thrown out."""
    outbox = settings.EVENTS_OUTBOX
    short = {"max.poll.interval.ms": 2000, "session.timeout.ms": 1500, "heartbeat.interval.ms": 300}
    settings.EVENTS_OUTBOX = {**outbox, "KAFKA_CONSUMER": {**outbox["KAFKA_CONSUMER"], **short}}
    return 2


def slow_counter(consumer, seconds, *, times=1):
    """As `group_counter()`, and the first `times` calls of the handler take so long."""
    counts, calls = group_counter(consumer), []
    count = unregister(consumer)

    @consumer.handles("conversation.created")
    def slow(event):
        calls.append(event)
        if len(calls) <= times:
            time.sleep(seconds)
        count(event)

    return counts, calls


def unregister(consumer):
    return consumer._handlers.pop("conversation.created").function


def test_a_handler_of_three_times_the_poll_interval_stays_in_the_group(
    make_consumer, emit, at_the_end, impatient_group, caplog
):
    consumer, ticks = make_consumer(), []
    counts, calls = slow_counter(consumer, 3 * impatient_group)
    at_the_end(consumer)
    emit("c1", 0)
    emit("c1", 1)
    Relay().run(until_empty=True)
    process = ConsumerProcess(consumer, on_tick=lambda: ticks.append(time.monotonic()))
    with in_thread(process):
        eventually(lambda: calls)
        eventually(lambda: counts() == {0: 1, 1: 1}, 30)
        assert process.group.owned
    assert len(calls) == 2, "the batch was redone: it had lost its partition"
    assert max(later - earlier for earlier, later in itertools.pairwise(ticks)) < impatient_group
    assert "partitions lost" not in caplog.text


@pytest.mark.apache_kafka  # the embedded broker rebalances too slowly
def test_a_member_joins_while_another_is_in_a_long_handler(make_consumer, emit, at_the_end):
    consumer, seconds = make_consumer(), 8
    counts, calls = slow_counter(consumer, seconds)
    at_the_end(consumer)
    emit("c1", 1000)
    Relay().run(until_empty=True)
    first, second = ConsumerProcess(consumer), ConsumerProcess(consumer)
    with in_thread(first):
        eventually(lambda: calls)
        with in_thread(second):
            eventually(lambda: second.group.owned, seconds - 1)
            assert len(calls) == 1 and not counts(), "the long handler was to be running still"
            for number in range(60):
                emit(f"c{number}", number)
            Relay().run(until_empty=True)
            eventually(lambda: set(counts()) == {*range(60), 1000}, 30)
    assert set(counts().values()) == {1}


def test_a_batch_that_never_ends_is_given_up(make_consumer, emit, at_the_end, impatient_group, settings):
    """Its member is thrown out, shows no more life, and another one handles its events."""
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "BATCH_TIMEOUT_SECONDS": 1}
    consumer, ticks = make_consumer(), []
    counts = group_counter(consumer)
    count, calls, end = unregister(consumer), [], threading.Event()

    @consumer.handles("conversation.created")
    def hang(event):
        calls.append(event)
        if len(calls) == 1:
            end.wait(60)
        count(event)

    at_the_end(consumer)
    emit("c1", 0)
    Relay().run(until_empty=True)
    with in_thread(ConsumerProcess(consumer, on_tick=lambda: ticks.append(time.monotonic()))):
        eventually(lambda: calls)
        with in_thread(ConsumerProcess(consumer)):
            eventually(lambda: counts() == {0: 1}, 30)
            assert ticks[-1] < time.monotonic() - 1
            end.set()
            eventually(lambda: ticks[-1] > time.monotonic() - 1)
    assert counts() == {0: 1}


def test_told_to_stop_in_a_long_batch_it_rolls_back_what_it_has_not_finished(make_consumer, emit, at_the_end):
    consumer = make_consumer()
    counts = group_counter(consumer)
    count = unregister(consumer)

    @consumer.handles("conversation.created")
    def count_and_stop(event):
        count(event)
        if event.metadata["number"] == "10":
            process.stop()

    at_the_end(consumer)
    for number in range(20):
        emit("c1", number)
    Relay().run(until_empty=True)
    process = ConsumerProcess(consumer)
    process.run(until_idle_seconds=20)
    assert counts() == {} and not ProcessedEvent.objects.exists()


# -- pauses ----------------------------------------------------------------------------------------------------------


def test_a_paused_consumer_stays_in_the_group_and_goes_on_when_resumed(make_consumer, emit, at_the_end):
    consumer, ticks = make_consumer(), []
    counts = group_counter(consumer)
    at_the_end(consumer)
    process = ConsumerProcess(consumer, on_tick=lambda: ticks.append(None))
    with in_thread(Relay()), in_thread(process):
        emit("c1", 0)
        eventually(lambda: 0 in counts())
        assert pauses.pause(consumer.name, by="alice", reason="maintenance")
        assert not pauses.pause(consumer.name, by="bob", reason="again")
        eventually(lambda: process.group._is_paused)
        emit("c1", 1)
        before = len(ticks)
        eventually(lambda: len(ticks) > before + 4)
        assert 1 not in counts() and process.group.owned
        assert pauses.resume(consumer.name, by="alice")
        eventually(lambda: 1 in counts())
    lines = [(line.action, line.by, line.reason) for line in OperatorAction.objects.order_by("id")]
    assert lines == [("consumer.paused", "alice", "maintenance"), ("consumer.resumed", "alice", "")]


def test_the_guard_pauses_a_consumer_that_fails_too_often_and_nothing_is_lost(make_consumer, emit, at_the_end):
    consumer = make_consumer(
        retry=RetryPolicy(max_retries=0), guard=FailureGuard(max_failed_share=0.5, window_events=10)
    )
    counts = group_counter(consumer)
    count, deploy_is_bad = unregister(consumer), threading.Event()
    deploy_is_bad.set()

    @consumer.handles("conversation.created")
    def fail_or_count(event):
        if deploy_is_bad.is_set():
            raise ValueError("bad deploy")
        count(event)

    at_the_end(consumer)
    for number in range(100):
        emit(f"c{number % 7}", number)
    Relay().run(until_empty=True)
    with in_thread(ConsumerProcess(consumer)):
        eventually(lambda: pauses.is_paused(consumer.name))
        assert DeadLetter.objects.count() == 6  # more than half of ten
        line = OperatorAction.objects.get()
        assert (line.action, line.by) == ("consumer.paused", "failure guard")
        assert "6 of the last 6 events failed" in line.reason
        deploy_is_bad.clear()
        pauses.resume(consumer.name, by="alice")
        eventually(lambda: len(counts()) == 94)
    assert set(counts().values()) == {1} and DeadLetter.objects.count() == 6


# -- where a group begins --------------------------------------------------------------------------------------------


def test_a_group_that_begins_at_the_latest_does_not_leave_out_what_comes_after(make_consumer, emit, kafka):
    """Where it begins is committed at once: it may be killed before it has handled anything."""
    consumer = make_consumer(start_at="latest")
    counts = group_counter(consumer)
    emit("c1", 0)
    Relay().run(until_empty=True)
    asking = KafkaClient({"bootstrap.servers": kafka.bootstrap_servers, "group.id": consumer.group_id})
    partitions = [TopicPartition("conversation.events", number) for number in range(6)]
    with in_thread(ConsumerProcess(consumer)):
        eventually(lambda: all(place.offset >= 0 for place in asking.committed(partitions, timeout=10)))
    asking.close()
    for number in range(1, 20):  # while no member is there
        emit(f"c{number}", number)
    Relay().run(until_empty=True)
    ConsumerProcess(consumer).run(until_idle_seconds=0.5)
    assert counts() == dict.fromkeys(range(1, 20), 1)


@pytest.mark.apache_kafka  # the embedded broker finds no offsets by time
def test_a_group_begins_at_a_time(make_consumer, emit):
    emit("c1", 0)
    Relay().run(until_empty=True)
    time.sleep(0.05)  # records are stamped in milliseconds
    consumer = make_consumer(start_at=datetime.now(UTC))
    counts = group_counter(consumer)
    for number in range(1, 20):
        emit(f"c{number}", number)
    Relay().run(until_empty=True)
    ConsumerProcess(consumer).run(until_idle_seconds=0.5)
    assert counts() == dict.fromkeys(range(1, 20), 1)


@pytest.mark.apache_kafka
def test_a_group_that_begins_in_the_future_begins_at_the_end(make_consumer, emit):
    emit("c1", 0)
    Relay().run(until_empty=True)
    consumer = make_consumer(start_at=datetime.now(UTC) + timedelta(hours=1))
    counts = group_counter(consumer)
    with in_thread(Relay()), in_thread(process := ConsumerProcess(consumer)):
        eventually(lambda: len(process.group.owned) == 6)
        emit("c1", 1)
        eventually(lambda: counts() == {1: 1})


# -- lag -------------------------------------------------------------------------------------------------------------


def test_lag_in_events_and_seconds(make_consumer, emit, at_the_end, monkeypatch):
    monkeypatch.setattr("events_outbox.membership.LAG_SECONDS", 0)
    consumer, calls, go_on = make_consumer(), [], threading.Event()

    @consumer.handles("conversation.created")
    def stop_at_the_third(event):
        calls.append(event)
        if len(calls) == 3:
            go_on.wait(20)

    at_the_end(consumer)
    for number in range(5):
        emit("c1", number)
    Relay().run(until_empty=True)

    def lag(unit):
        labels = {"consumer": consumer.name, "topic": "conversation.events", "partition": str(calls[0].partition)}
        return counted(f"consumer_lag_{unit}", **labels)

    with in_thread(ConsumerProcess(consumer, batch_size=1)):
        eventually(lambda: len(calls) == 3)
        assert lag("events") == 3 and 0 < lag("seconds") < 20
        go_on.set()
        eventually(lambda: len(calls) == 5 and lag("events") == 0 == lag("seconds"))


class Client:
    """A Kafka client, one of whose methods is another one."""

    def __init__(self, client, **methods):
        self._client = client
        self.__dict__.update(methods)

    def __getattr__(self, name):
        return getattr(self._client, name)


def lose_broker(**_):
    raise KafkaException(KafkaError(KafkaError._TRANSPORT))


@pytest.mark.apache_kafka
def test_a_client_that_has_lost_a_broker_which_is_there_is_replaced(
    make_consumer, emit, at_the_end, monkeypatch, caplog
):
    """Our client finds no broker, as can be with librdkafka; another one does."""
    monkeypatch.setattr("events_outbox.membership.TROUBLE_SECONDS", 0.1)
    consumer = make_consumer()
    counts = group_counter(consumer)
    at_the_end(consumer)
    process = ConsumerProcess(consumer)
    with in_thread(process):
        eventually(lambda: process.group.owned)
        with process.group._lock:
            process.group._client = lost = Client(process.group._client, list_topics=lose_broker)
            process.group._trouble_at = 0.0
        eventually(lambda: process.group.owned and process.group._client is not lost)
        emit("c1", 0)
        Relay().run(until_empty=True)
        eventually(lambda: counts() == {0: 1})
    assert any("lost a broker that is there" in getattr(line, "error", "") for line in caplog.records)


def test_a_partition_that_goes_and_comes_back_inside_a_poll_is_not_skipped(make_consumer, emit, at_the_end):
    """What was fetched is of the new time that it is ours, and event by event too it is to be handled."""
    consumer, failures = make_consumer(), []
    counts = group_counter(consumer)
    count = unregister(consumer)

    @consumer.handles("conversation.created")
    def fail_once_then_count(event):
        if not failures:
            failures.append(event)
            raise ValueError("not in a batch")
        count(event)

    def goes_and_comes(seconds):
        group, client = process.group, process.group._client._client
        if (message := client.poll(seconds)) is not None:
            partition = [TopicPartition(message.topic(), message.partition())]
            group._on_lost(client, partition)
            group._on_assign(client, partition)
        return message

    at_the_end(consumer)
    process = ConsumerProcess(consumer)
    with in_thread(process):
        eventually(lambda: process.group.owned)
        with process.group._lock:
            process.group._client = Client(process.group._client, poll=goes_and_comes)
        for number in range(30):
            emit("c1", number)
        Relay().run(until_empty=True)
        eventually(lambda: set(counts()) == set(range(30)) and failures)


def test_what_is_done_of_a_partition_that_was_lost_meanwhile_is_not_committed(make_consumer, emit):
    """Also where it has come back: it begins again at its committed offset."""
    consumer = make_consumer()
    process = ConsumerProcess(consumer)
    place = [TopicPartition("conversation.events", 0)]
    process.group._on_assign(None, place)

    @consumer.handles("conversation.created")
    def lose_it(event):
        process.group._on_lost(None, place)
        process.group._on_assign(None, place)

    row = emit("c1")
    record = Record(row.topic, 0, 7, row.aggregate_id.encode(), bytes(row.value))
    process.handle_batch([record])
    assert process.group.has_lost(record) and not process.group._done and not process.group._uncommitted


def test_offsets_that_were_not_committed_are_sent_again(make_consumer, emit, at_the_end, kafka, monkeypatch):
    """Also where nothing more comes to the partition."""
    monkeypatch.setattr("events_outbox.membership.COMMIT_AGAIN_SECONDS", 0.1)
    consumer, refused = make_consumer(), []
    counts = group_counter(consumer)
    at_the_end(consumer)
    process = ConsumerProcess(consumer)

    def refuse_once(**arguments):
        if not refused:
            refused.append(arguments["offsets"])
            raise KafkaException(KafkaError(KafkaError.ILLEGAL_GENERATION))
        process.group._client._client.commit(**arguments)

    with in_thread(process):
        eventually(lambda: process.group.owned)
        with process.group._lock:
            process.group._client = Client(process.group._client, commit=refuse_once)
        emit("c1", 0)
        Relay().run(until_empty=True)
        eventually(lambda: counts() == {0: 1} and refused)
        ((place,),) = refused
        asking = KafkaClient({"bootstrap.servers": kafka.bootstrap_servers, "group.id": consumer.group_id})
        partition = [TopicPartition(place.topic, place.partition)]
        eventually(lambda: asking.committed(partition, timeout=10)[0].offset == place.offset)
        asking.close()
