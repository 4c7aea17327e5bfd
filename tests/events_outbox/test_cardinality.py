"""Events of types, tenants and topics that nobody foresaw: the number of series stays bounded."""

import logging
import uuid

import pytest
from prometheus_client import REGISTRY

from events_outbox.consumer import ConsumerProcess
from events_outbox.models import DeadLetter
from events_outbox.proto.base_event_pb2 import BaseEvent
from events_outbox.publisher import _count_published
from events_outbox.records import Record
from monitoring import labels

FLOOD = 10_000
KNOWN_TO_NOBODY = 500


def series():
    return {(sample.name, *sorted(sample.labels.items())) for family in REGISTRY.collect() for sample in family.samples}


def odd_event(number):
    # The first are of a domain that has a handler, and become dead letters; the others concern nobody here.
    domain = "conversation" if number < KNOWN_TO_NOBODY else f"odd{number}"
    event = BaseEvent(
        event_id=str(uuid.uuid4()),
        event_type=f"{domain}.odd_{number}",
        event_version=f"v{number}",
        aggregate_id=f"a{number}",
        tenant_id=f"tenant-{number}",
    )
    return Record(f"topic-{number % 3}", number % 6, number, b"key-%d" % number, event.SerializeToString())


@pytest.mark.django_db(transaction=True)
def test_flood_of_odd_events(make_consumer):
    consumer = make_consumer(guard=None)
    consumer.handles("conversation.*")(lambda event: None)
    process, before = ConsumerProcess(consumer), series()
    logging.disable()
    try:
        for start in range(0, FLOOD, 1000):
            process.handle_batch([odd_event(number) for number in range(start, start + 1000)])
    finally:
        logging.disable(logging.NOTSET)
    assert DeadLetter.objects.filter(consumer=consumer.name, reason="unknown_type").count() == KNOWN_TO_NOBODY
    assert len(series() - before) <= 20  # a histogram


def test_flood_of_odd_topics(monkeypatch):
    monkeypatch.setattr(labels, "_seen", {})
    before = series()
    _count_published([(number, f"odd-{number}") for number in range(FLOOD)], {})
    assert len(series() - before) <= 501
