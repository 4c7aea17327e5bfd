"""Fixtures of the event tests: a reader of the topics, and relays and consumers that run in threads."""

import random
import threading
import time
from contextlib import contextmanager

import pytest
from django.db import connection, transaction
from prometheus_client import REGISTRY

from events_outbox import Consumer, RetryPolicy, catalog, emit_event, handlers
from tests.consumer_groups import ConsumerGroup
from tests.outbox_writers import aggregates_table
from tests.topics import TopicReader
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload


@pytest.fixture
def emit():
    """Emit a conversation.created for an aggregate, numbered in its metadata, in a transaction of its own."""

    def emit(aggregate, number=0, **fields):
        with transaction.atomic():
            return emit_event(
                "conversation.created",
                ConversationCreatedPayload(conversation_id=aggregate, title="hello", mode="chat"),
                aggregate_id=aggregate,
                tenant_id="t1",
                metadata={"number": str(number)},
                **fields,
            )

    return emit


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


@pytest.fixture
def own_catalog(monkeypatch):
    """A copy of the catalog: what the test registers is forgotten afterwards."""
    monkeypatch.setattr(catalog, "_catalog", dict(catalog._catalog))
    monkeypatch.setattr(catalog, "_upcasters", dict(catalog._upcasters))


@pytest.fixture
def aggregates():
    with aggregates_table():
        yield


@pytest.fixture
def group(kafka):
    """A consumer that nobody runs, its group and its topic: see `tests.consumer_groups`. Needs Apache Kafka."""
    group = ConsumerGroup(kafka.bootstrap_servers)
    yield group
    group.close()


@contextmanager
def in_thread(job, **options):
    """Run a relay or consumer in a thread; stop it at the end and raise what it raised."""
    errors = []

    def run():
        try:
            job.run(**options)
        except BaseException as error:
            errors.append(error)
        finally:
            connection.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread
    finally:
        job.stop()
        thread.join(30)
        assert not thread.is_alive(), "it did not stop"
        if errors:
            raise errors[0]


def eventually(condition, timeout_seconds=20):
    """Wait until `condition()` is true and return what it returned. Fails when that takes too long."""
    deadline = time.monotonic() + timeout_seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)
    return result


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


def counted(name, **labels):
    return REGISTRY.get_sample_value(name, labels) or 0.0
