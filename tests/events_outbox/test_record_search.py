"""An event's records in Kafka: where and when it was published, its copies, and what is said when that is not known."""

import random
import time

import pytest
from confluent_kafka import Producer

from events_outbox.record_search import find_records, murmur2
from events_outbox.relay import Relay
from events_outbox.replay import Replay, Selection

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def told_what_it_is(kafka, settings):
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "KAFKA_IS_EMBEDDED": kafka.kind != "apache"}


def publish():
    Relay().run(until_empty=True)


def replay(*events):
    with Replay(Selection(event_ids=[event.event_id for event in events])) as again:
        again.publish()


def test_the_hash_is_that_of_kafka():
    # From the tests of Apache Kafka's clients.
    known = {"21": -973932308, "foobar": -790332482, "a-little-bit-long-string": -985981536, "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971, "abc": 479470107}  # fmt: skip  # noqa: E501
    assert {key: murmur2(key.encode()) for key in known} == {key: value % 2**32 for key, value in known.items()}


def test_an_event_is_found_where_it_was_published(kafka, emit, topic_reader):
    event = emit(f"c{random.random()}")
    before = time.time()
    publish()
    (message,) = topic_reader.read(1)
    found = find_records(event)
    (record,) = found.records
    assert (record.partition, record.offset) == (message.partition(), message.offset())
    assert before - 1 < record.published_at.timestamp() < time.time() + 1
    assert dict(record.headers)["event_id"] == str(event.event_id).encode()
    assert (found.not_known, found.cut_short, found.is_dropped) == ("", "", False)


def test_a_replayed_event_has_two_records(kafka, emit):
    event, other = emit("c1"), emit("c1")
    publish()
    replay(event, other)
    records = find_records(event).records
    assert len(records) == 2
    assert records[0].offset < records[1].offset and records[0].partition == records[1].partition


def test_an_event_that_is_not_there_is_not_found(kafka, emit):
    found = find_records(emit("c1"))
    assert (found.records, found.not_known, found.cut_short) == ([], "", "")


def test_a_search_that_reaches_its_bounds_says_so(kafka, emit):
    events = [emit("c1") for _ in range(20)]
    publish()
    assert find_records(events[-1], max_records=0).cut_short.startswith("0 records were read")


def test_a_record_in_another_partition_is_found_too(kafka, emit):
    """A topic may have got partitions since, and a producer of somebody else's goes by another hash."""
    event = emit("c1")
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers})
    for partition in range(6):
        if partition != (murmur2(b"c1") & 0x7FFFFFFF) % 6:
            break
    producer.produce(event.topic, bytes(event.value), b"c1", partition=partition)
    producer.flush(30)
    assert [record.partition for record in find_records(event).records] == [partition]


def test_of_equal_bytes_the_header_tells(kafka, emit):
    """What is no event has no id of its own in its bytes."""
    event = emit("c1")
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers})
    producer.produce(event.topic, bytes(event.value), b"c1", headers={"event_id": b"another"})
    producer.flush(30)
    assert find_records(event).records == []


def test_without_kafka_it_is_said(kafka, emit):
    event = emit("c1")
    kafka.stop()
    started = time.monotonic()
    found = find_records(event)
    assert found.not_known.startswith("Kafka does not answer:") and found.records == ()
    assert time.monotonic() - started < 4


@pytest.mark.apache_kafka
def test_a_topic_that_is_not_there(kafka, emit):
    event = emit("c1")
    event.topic = "nobody.knows"
    assert "there is no topic" in find_records(event).cut_short
