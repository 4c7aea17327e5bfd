"""Fixtures of the event tests: a reader of the topics, and relays and consumers that run in threads."""

import threading
import time
from contextlib import contextmanager

import pytest
from django.db import connection, transaction

from events_outbox import emit_event
from tests.consumer_groups import ConsumerGroup
from tests.outbox_writers import aggregates_table
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
