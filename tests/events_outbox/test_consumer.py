"""Consumers: effectively once, in order, retries, dead letters, parking, rebalance, stop."""

import contextlib
import itertools
import random
import subprocess
import threading
import uuid

import pytest
from confluent_kafka import Consumer as Client
from confluent_kafka import Producer
from django.contrib.auth.models import Group
from django.db import IntegrityError, connection, transaction
from prometheus_client import REGISTRY

from events_outbox import Consumer, PermanentEventError, RetryPolicy, dead_letters, emit_event, handlers
from events_outbox.consumer import ConsumerProcess, ConsumerStopped
from events_outbox.membership import Stopping
from events_outbox.models import DeadLetter, OutboxEvent, ProcessedEvent, RelayCursor
from events_outbox.proto.base_event_pb2 import BaseEvent
from events_outbox.records import Record
from events_outbox.relay import Relay
from tests.events_outbox.conftest import eventually, in_thread
from tests.topics import TopicReader
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload
from voicehelper.proto.identity_pb2 import UserRegisteredPayload

pytestmark = pytest.mark.django_db(transaction=True)

QUICK = RetryPolicy(initial_delay_seconds=0.001)


@pytest.fixture
def make_consumer():
    """Make consumers of their own group, unregistered afterwards."""
    made = []

    def make(**options):
        name = f"test-{random.randrange(10**9)}"
        made.append(name)
        return Consumer(name, group_id=name, **{"retry": QUICK, **options})

    yield make
    for name in made:
        handlers._consumers.pop(name)


def record_of(row, offset=0):
    return Record(topic=row.topic, partition=0, offset=offset, key=row.aggregate_id.encode(), value=bytes(row.value))


def handle(consumer, records):
    ConsumerProcess(consumer).handle_batch(records)


def counted(name, **labels):
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_effects_happen_once_however_often_a_record_comes(make_consumer, emit):
    consumer, calls = make_consumer(), []

    @consumer.handles("conversation.created")
    def on_created(event):
        calls.append(event)
        Group.objects.create(name=event.aggregate_id)

    records = [record_of(emit(f"c{n}"), n) for n in range(3)]
    handle(consumer, [*records, records[0]])
    handle(consumer, records)
    assert [event.aggregate_id for event in calls] == ["c0", "c1", "c2"]
    assert Group.objects.count() == 3
    assert ProcessedEvent.objects.filter(consumer=consumer.name).count() == 3
    assert counted("consumer_events_duplicate_total", consumer=consumer.name) == 4
    assert counted("consumer_events_handled_total", consumer=consumer.name, event_type="conversation.created") == 3


def test_a_handler_sees_the_typed_event(make_consumer, emit):
    consumer, seen = make_consumer(), []
    consumer.handles("conversation.created")(seen.append)
    row = emit("c1", correlation_id="corr", user_id="u1")
    handle(consumer, [record_of(row, 7)])
    (event,) = seen
    assert event.event_id == row.event_id
    assert isinstance(event.payload, ConversationCreatedPayload) and event.payload.title == "hello"
    assert (event.tenant_id, event.user_id, event.correlation_id) == ("t1", "u1", "corr")
    assert (event.topic, event.partition, event.offset) == ("conversation.events", 0, 7)


def test_a_failing_event_costs_only_itself_and_is_retried(make_consumer, emit):
    consumer, attempts = make_consumer(), []

    @consumer.handles("conversation.created")
    def on_created(event):
        Group.objects.create(name=event.aggregate_id)
        if event.aggregate_id == "bad":
            attempts.append(event)
            raise ValueError("no good")

    rows = [emit(name) for name in ("c0", "bad", "c2")]
    handle(consumer, [record_of(row, n) for n, row in enumerate(rows)])
    assert set(Group.objects.values_list("name", flat=True)) == {"c0", "c2"}
    assert len(attempts) == 5  # once in the batch, then once and three retries alone
    letter = DeadLetter.objects.get()
    assert (letter.consumer, letter.reason, letter.attempts) == (consumer.name, "failed", 4)
    assert letter.event_id == rows[1].event_id and bytes(letter.value) == bytes(rows[1].value)
    assert letter.error == "ValueError: no good" and "on_created" in letter.traceback
    assert counted("consumer_event_retries_total", consumer=consumer.name) == 3
    assert ProcessedEvent.objects.filter(consumer=consumer.name).count() == 3


def test_the_specifications_delays_are_the_default():
    assert RetryPolicy().delays_seconds() == [0.1, 0.2, 0.4]


def test_a_passing_fault_is_overcome_by_retries(make_consumer, emit):
    consumer, attempts = make_consumer(), []

    @consumer.handles("conversation.created")
    def on_created(event):
        attempts.append(event)
        if len(attempts) < 3:
            raise ConnectionError("network timeout")

    handle(consumer, [record_of(emit("c1"))])
    assert len(attempts) == 3
    assert not DeadLetter.objects.exists()


def test_a_permanent_error_is_not_retried(make_consumer, emit):
    consumer, attempts = make_consumer(), []

    @consumer.handles("conversation.created")
    def on_created(event):
        attempts.append(event)
        raise PermanentEventError("such a conversation cannot be")

    handle(consumer, [record_of(emit("c1"))])
    assert len(attempts) == 2  # in the batch, and alone
    assert DeadLetter.objects.get().reason == "permanent"


def test_poison_becomes_dead_letters_with_its_raw_bytes_and_the_rest_is_handled(make_consumer, emit):
    consumer, seen = make_consumer(), []
    consumer.handles("*")(seen.append)
    good = emit("c1")
    unknown = BaseEvent(event_id=str(uuid.uuid4()), event_type="weather.changed", tenant_id="a\x00b")
    other = BaseEvent(event_id=str(uuid.uuid4()), event_type="conversation.created", event_version="v1")
    other.payload.Pack(UserRegisteredPayload(user_id="u"))
    no_id = BaseEvent(event_type="conversation.created")
    damaged = BaseEvent(event_id=str(uuid.uuid4()), event_type="conversation.created", event_version="v1")
    damaged.payload.Pack(ConversationCreatedPayload())
    damaged.payload.value = b"\xff\xff\xff"
    values = [
        b"\x00\xff random",
        unknown.SerializeToString(),
        other.SerializeToString(),
        b"",
        None,
        no_id.SerializeToString(),
        damaged.SerializeToString(),
    ]
    poison = [
        Record(topic="t", partition=0, offset=n, key=b"k\xff", value=value, headers=[("h", b"\x00\xff")])
        for n, value in enumerate(values)
    ]
    handle(consumer, [*poison, record_of(good, 9)])
    handle(consumer, poison)  # delivered again: kept once
    assert [event.event_id for event in seen] == [good.event_id]
    letters = DeadLetter.objects.order_by("offset")
    assert [letter.reason for letter in letters] == [
        "unparsable",
        "unknown_type",
        "payload_mismatch",
        "unparsable",
        "unparsable",
        "unparsable",
        "payload_mismatch",
    ]
    assert [letter.value and bytes(letter.value) for letter in letters] == values
    assert bytes(letters[0].key) == b"k\xff" and letters[0].text_headers() == [("h", "\x00\\xff")]
    assert counted("consumer_events_dead_lettered_total", consumer=consumer.name, reason="unparsable") == 4


def test_poison_with_a_huge_key_is_kept_too(make_consumer):
    consumer = make_consumer(on_failure="park_key")
    key = random.Random(1).randbytes(6000)
    handle(consumer, [Record(topic="t", partition=0, offset=n, key=key, value=b"junk") for n in range(2)])
    assert [bytes(letter.key) for letter in DeadLetter.objects.all()] == [key, key]


@pytest.mark.parametrize("swallow", ["orm", "sql"])
@pytest.mark.parametrize("is_batch", [False, True])
def test_a_handler_that_swallows_a_database_error_costs_nobody_elses_effects(make_consumer, emit, swallow, is_batch):
    """Its transaction is broken, and the commit would be a silent rollback."""
    consumer = make_consumer(retry=RetryPolicy(max_retries=0))
    Group.objects.create(name="taken")

    def create(event):
        if event.aggregate_id != "taken":
            Group.objects.create(name=event.aggregate_id)
            return
        with contextlib.suppress(IntegrityError):
            if swallow == "orm":
                Group.objects.create(name="taken")
            else:
                connection.cursor().execute("INSERT INTO auth_group (name) VALUES ('taken')")

    if is_batch:
        consumer.handles_batch("conversation.created")(lambda events: [create(event) for event in events])
    else:
        consumer.handles("conversation.created")(create)
    handle(consumer, [record_of(emit(name), n) for n, name in enumerate(("g1", "g2", "taken"))])
    assert set(Group.objects.values_list("name", flat=True)) == {"taken", "g1", "g2"}
    assert DeadLetter.objects.get().reason == "failed"
    assert ProcessedEvent.objects.count() == 3


def test_a_long_batch_shows_life_and_can_be_stopped(make_consumer, emit):
    consumer, ticks, seen = make_consumer(), [], []
    process = ConsumerProcess(consumer, on_tick=lambda: ticks.append(None))

    @consumer.handles("conversation.created")
    def on_created(event):
        seen.append(event)
        process.group._last_poll -= 2  # as if it had taken two seconds
        if len(seen) == 10:
            process.stop()

    with pytest.raises(Stopping):
        process.handle_batch([record_of(emit(f"c{n}"), n) for n in range(20)])
    assert len(ticks) >= 9 and len(seen) == 10
    assert not ProcessedEvent.objects.exists()  # rolled back, to be done again


def test_types_without_a_handler_are_skipped_and_counted(make_consumer, emit):
    consumer = make_consumer()
    consumer.handles("document.uploaded")(lambda event: None)
    handle(consumer, [record_of(emit("c1"))])
    assert counted("consumer_events_skipped_total", consumer=consumer.name) == 1
    assert not ProcessedEvent.objects.exists() and not DeadLetter.objects.exists()


def test_the_most_specific_handler_runs(make_consumer):
    consumer = make_consumer()
    functions = {}
    for pattern in ("*", "conversation.*", "conversation.message.*", "conversation.message.sent"):
        functions[pattern] = consumer.handles(pattern)(lambda event: None)
    for event_type, pattern in [
        ("conversation.message.sent", "conversation.message.sent"),
        ("conversation.message.edited", "conversation.message.*"),
        ("conversation.created", "conversation.*"),
        ("conversational.created", "*"),
    ]:
        assert consumer.route(event_type, "v1").handler.function is functions[pattern]


def test_topics_come_from_the_handlers(make_consumer):
    consumer = make_consumer()
    consumer.handles("conversation.*", "identity.user.registered")(lambda event: None)
    assert consumer.topics == ["conversation.events", "identity.events"]
    consumer.handles("*")(lambda event: None)
    assert len(consumer.topics) == 4


def test_registering_wrongly_raises(make_consumer):
    consumer = make_consumer()
    consumer.handles("conversation.created")(lambda event: None)
    with pytest.raises(ValueError, match="two handlers of conversation"):
        consumer.handles_batch("conversation.created")(lambda events: None)
    with pytest.raises(ValueError, match="registered twice"):
        Consumer(consumer.name, "g")
    with pytest.raises(ValueError, match="neither an event type nor a pattern"):
        consumer.handles("Conversation *")(lambda event: None)
    with pytest.raises(ValueError, match="on_failure"):
        Consumer("other", "g", on_failure="explode")


def test_a_batch_handler_gets_its_events_together_and_falls_back_to_one_by_one(make_consumer, emit):
    consumer, sizes = make_consumer(), []

    @consumer.handles_batch("conversation.created")
    def on_created(events):
        sizes.append(len(events))
        if any(event.aggregate_id == "bad" for event in events):
            raise PermanentEventError("bad")
        Group.objects.bulk_create([Group(name=event.aggregate_id) for event in events])

    handle(consumer, [record_of(emit(f"c{n}"), n) for n in range(3)])
    assert sizes == [3]
    handle(consumer, [record_of(emit(name), n) for n, name in enumerate(("c3", "bad", "c4"))])
    assert sizes == [3, 3, 1, 1, 1]
    assert Group.objects.count() == 5
    assert DeadLetter.objects.count() == 1


def test_order_within_a_key_holds_across_handlers_and_batches(make_consumer, emit):
    consumer, seen = make_consumer(), []
    consumer.handles_batch("conversation.created")(lambda events: seen.append([(e.aggregate_id, 1) for e in events]))

    @consumer.handles("identity.user.registered")
    def on_registered(event):
        seen.append([(event.aggregate_id, 2)])

    def registered(key):
        with transaction.atomic():
            return emit_event("identity.user.registered", UserRegisteredPayload(), aggregate_id=key, tenant_id="t")

    def as_one_topic(row, n):
        record = record_of(row, n)
        return Record(topic="t", partition=0, offset=n, key=record.key, value=record.value)

    rows = [emit("a"), emit("b"), registered("a"), emit("a"), emit("b"), registered("b"), emit("c")]
    handle(consumer, [as_one_topic(row, n) for n, row in enumerate(rows)])
    assert seen[0] == [("a", 1), ("b", 1), ("b", 1), ("c", 1)]  # as large as order allows
    assert seen[1:] == [[("a", 2)], [("b", 2)], [("a", 1)]]


def test_events_emitted_by_a_handler_share_its_transaction(make_consumer, emit):
    consumer = make_consumer()

    @consumer.handles("conversation.created")
    def on_created(event):
        emit_event(
            "conversation.created",
            ConversationCreatedPayload(),
            aggregate_id=f"from-{event.aggregate_id}",
            tenant_id="t",
        )
        if event.aggregate_id == "bad":
            raise PermanentEventError("bad")

    cause = emit("good", correlation_id="chain")
    handle(consumer, [record_of(cause), record_of(emit("bad"), 1)])
    emitted = OutboxEvent.objects.get(aggregate_id__startswith="from-")
    base = BaseEvent.FromString(bytes(emitted.value))
    assert emitted.aggregate_id == "from-good"
    assert (base.causation_id, base.correlation_id) == (str(cause.event_id), "chain")


def test_park_key_holds_the_keys_later_events_and_replays_in_order(make_consumer, emit):
    consumer, seen = make_consumer(on_failure="park_key"), []
    broken = True

    @consumer.handles("conversation.created")
    def on_created(event):
        if broken and event.metadata["number"] == "0" and event.aggregate_id == "a":
            raise PermanentEventError("not yet")
        seen.append((event.aggregate_id, event.metadata["number"]))

    handle(consumer, [record_of(emit("a", n), n) for n in range(2)])
    handle(consumer, [record_of(emit("a", 2), 2), record_of(emit("b", 0), 3)])
    assert seen == [("b", "0")]
    letters = list(DeadLetter.objects.order_by("id"))
    assert [letter.reason for letter in letters] == ["permanent", "behind", "behind"]

    with pytest.raises(dead_letters.ReplayRefused, match="comes first"):
        dead_letters.replay(letters[1].pk)
    with pytest.raises(PermanentEventError):
        dead_letters.replay(letters[0].pk)
    broken = False
    for letter in letters:
        dead_letters.replay(letter.pk)
    assert seen[1:] == [("a", "0"), ("a", "1"), ("a", "2")]
    handle(consumer, [record_of(emit("a", 3), 4)])
    assert seen[-1] == ("a", "3")
    letters[0].refresh_from_db()
    assert (letters[0].resolution, letters[0].attempts) == ("replayed", 2)
    with pytest.raises(dead_letters.ReplayRefused, match="replayed already"):
        dead_letters.replay(letters[0].pk)


def test_a_dead_letter_can_be_discarded(make_consumer):
    consumer = make_consumer()
    handle(consumer, [Record(topic="t", partition=0, offset=0, key=None, value=b"junk")])
    letter = DeadLetter.objects.get()
    dead_letters.discard(letter.pk)
    letter.refresh_from_db()
    assert letter.resolution == "discarded" and letter.resolved_at
    assert not DeadLetter.objects.open().exists()


def test_stop_ends_the_process_with_the_event_unhandled(make_consumer, emit):
    consumer = make_consumer(on_failure="stop")

    @consumer.handles("conversation.created")
    def on_created(event):
        raise ValueError("cannot")

    with pytest.raises(ConsumerStopped, match="cannot"):
        handle(consumer, [record_of(emit("c1"))])
    assert not ProcessedEvent.objects.exists() and not DeadLetter.objects.exists()


def test_a_lost_database_is_waited_out_and_costs_no_retries(make_consumer, emit, monkeypatch):
    monkeypatch.setattr("events_outbox.consumer.DISTURBED_SECONDS", 0.001)
    consumer, attempts = make_consumer(), []

    @consumer.handles("conversation.created")
    def on_created(event):
        attempts.append(event)
        with connection.cursor() as cursor:
            if len(attempts) <= 8:  # more often than there are retries
                cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        Group.objects.create(name=event.aggregate_id)

    handle(consumer, [record_of(emit("c1"))])
    assert len(attempts) == 9 and Group.objects.count() == 1
    assert not DeadLetter.objects.exists()


def test_a_database_that_takes_no_connections_is_waited_for(make_consumer, emit, monkeypatch):
    monkeypatch.setattr("events_outbox.consumer.RECONNECT_SECONDS", 0.01)
    consumer, seen, ticks = make_consumer(retry=RetryPolicy(max_retries=0)), [], []
    consumer.handles("conversation.created")(seen.append)
    record = record_of(emit("c1"))
    there = connection.settings_dict["HOST"]

    def database_comes_back():
        ticks.append(None)
        if len(ticks) == 5:
            connection.settings_dict["HOST"] = there

    connection.close()
    monkeypatch.setitem(connection.settings_dict, "HOST", "/nowhere")
    ConsumerProcess(consumer, on_tick=database_comes_back).handle_batch([record])
    assert len(seen) == 1 and len(ticks) >= 5
    assert not DeadLetter.objects.exists()


def test_an_event_that_always_ends_the_connection_becomes_a_dead_letter(make_consumer, emit, monkeypatch):
    monkeypatch.setattr("events_outbox.consumer.DISTURBED_SECONDS", 0)
    consumer = make_consumer(retry=RetryPolicy(max_retries=0))

    @consumer.handles("conversation.created")
    def on_created(event):
        if event.aggregate_id == "bad":
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        Group.objects.create(name=event.aggregate_id)

    handle(consumer, [record_of(emit("bad"), 0), record_of(emit("good"), 1)])
    assert DeadLetter.objects.get().reason == "failed"
    assert Group.objects.get().name == "good"


@pytest.mark.parametrize("state", ["40001", "40P01"])
def test_conflicts_between_transactions_cost_no_retries(make_consumer, emit, monkeypatch, state):
    monkeypatch.setattr("events_outbox.consumer.DISTURBED_SECONDS", 0.001)
    consumer, attempts = make_consumer(retry=RetryPolicy(max_retries=0)), []

    @consumer.handles("conversation.created")
    def on_created(event):
        attempts.append(event)
        if len(attempts) < 5:
            with connection.cursor() as cursor:
                cursor.execute(f"DO $$ BEGIN RAISE EXCEPTION 'conflict' USING ERRCODE = '{state}'; END $$")

    handle(consumer, [record_of(emit("c1"))])
    assert len(attempts) == 5 and not DeadLetter.objects.exists()


# -- through a broker ------------------------------------------------------------------------------------------------


def group_counter(consumer):
    """A handler that counts each event in the database; returns what is counted so far, by number."""
    with connection.cursor() as cursor:
        cursor.execute(
            """CREATE TABLE IF NOT EXISTS test_count
               (consumer text, number int, times int, PRIMARY KEY (consumer, number))"""
        )

    @consumer.handles("conversation.created")
    def count(event):
        with connection.cursor() as cursor:
            cursor.execute(
                """INSERT INTO test_count VALUES (%s, %s, 1)
                   ON CONFLICT (consumer, number) DO UPDATE SET times = test_count.times + 1""",
                [consumer.name, int(event.metadata["number"])],
            )

    def counts():
        with connection.cursor() as cursor:
            cursor.execute("SELECT number, times FROM test_count WHERE consumer = %s", [consumer.name])
            return dict(cursor.fetchall())

    return counts


@pytest.fixture
def at_the_end(kafka):
    """Commit, for a consumer's group, the present end of its topics: tests share them."""

    def skip(consumer):
        reader = TopicReader(kafka.bootstrap_servers, consumer.topics, group_id=consumer.group_id)
        reader.commit_start()
        reader.close()

    return skip


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
    unknown = BaseEvent(event_id=str(uuid.uuid4()), event_type="weather.changed", event_version="v1")
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
        other = Client(
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
    consumer = make_consumer(retry=RetryPolicy(max_retries=1, initial_delay_seconds=20))
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
