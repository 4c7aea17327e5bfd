"""Clients, settings and topics: the only import of confluent_kafka."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from confluent_kafka import (
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from django.core.exceptions import ImproperlyConfigured

from .catalog import topics
from .conf import outbox_settings

logger = logging.getLogger("librdkafka")
NO_KAFKA_HINT = "run `make up` in another terminal, or set KAFKA_BOOTSTRAP_SERVERS"
Client = TypeVar("Client", Producer, Consumer)

RECORD_REFUSALS = frozenset(
    {
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.RECORD_LIST_TOO_LARGE,
        KafkaError.INVALID_MSG,
        KafkaError.INVALID_RECORD,
        KafkaError.INVALID_TIMESTAMP,
        KafkaError.POLICY_VIOLATION,
        KafkaError.TOPIC_EXCEPTION,
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._UNKNOWN_PARTITION,
    }
)
"""Errors that speak of the record or its topic, not of the broker: waiting does not help, the event is parked."""


def producer_settings() -> dict[str, Any]:
    """librdkafka settings of the relay's producer.

    An outage is waited out (`message.timeout.ms=0`), so that a later event can never overtake an expired one.
    """
    conf = outbox_settings()
    safety: dict[str, Any] = (
        {"enable.idempotence": True, "acks": "all"}
        if conf.ACKS == "all"
        # librdkafka refuses acks=1 with idempotence; one request in flight at least keeps the order across retries.
        else {"enable.idempotence": False, "acks": conf.ACKS, "max.in.flight.requests.per.connection": 1}
    )
    return {
        "client.id": "relay_outbox",
        "compression.type": "snappy",
        "partitioner": "murmur2_random",
        "linger.ms": 2,
        "message.timeout.ms": 0,
        "delivery.report.only.error": True,
        # A broker that comes back is noticed within a second, not after the default's ten.
        "reconnect.backoff.max.ms": 1000,
        **safety,
        **conf.KAFKA,
        **conf.KAFKA_PRODUCER,
    }


def make_producer(on_error: Callable[[KafkaError], None]) -> Producer:
    """Return a producer. `on_error` hears of broker trouble; it is called from poll() and flush().

    Raises ImproperlyConfigured when librdkafka refuses the settings.
    """
    return _make(Producer, {**producer_settings(), "error_cb": on_error})


def make_consumer(
    group_id: str,
    on_error: Callable[[KafkaError], None],
    on_commit: Callable[[KafkaError | None, list[TopicPartition]], None],
) -> Consumer:
    """Return a consumer of the group that commits only what it is told to; `on_commit` hears how that went.

    Raises ImproperlyConfigured when librdkafka refuses the settings.
    """
    conf = outbox_settings()
    return _make(
        Consumer,
        {
            "client.id": group_id,
            "group.id": group_id,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "earliest",
            "partition.assignment.strategy": "cooperative-sticky",
            "reconnect.backoff.max.ms": 1000,
            # How long a request to a frozen broker is waited for, and so a stop in the worst case.
            "socket.timeout.ms": 10_000,
            # Bounds the memory of what is fetched ahead.
            "queued.max.messages.kbytes": 16384,
            **conf.KAFKA,
            **conf.KAFKA_CONSUMER,
            "error_cb": on_error,
            "on_commit": on_commit,
        },
    )


def _make(client: type[Client], settings: dict[str, Any]) -> Client:
    if not settings.get("bootstrap.servers"):
        raise ImproperlyConfigured('EVENTS_OUTBOX["KAFKA"] has no "bootstrap.servers": ' + NO_KAFKA_HINT)
    try:
        return client(settings, logger=logger)
    except KafkaException as error:
        raise ImproperlyConfigured(f"librdkafka refuses the Kafka settings: {error.args[0].str()}") from None


def create_topics(timeout_seconds: float = 30.0) -> list[str]:
    """Create the topics that do not exist and return their names.

    Raises KafkaException when the broker refuses or does not answer in time, ValueError when a topic is there
    with fewer partitions than configured.
    """
    conf = outbox_settings()
    admin = AdminClient(dict(conf.KAFKA))
    there = admin.list_topics(timeout=timeout_seconds).topics
    missing = [
        NewTopic(topic, num_partitions=conf.TOPIC_PARTITIONS, replication_factor=conf.TOPIC_REPLICATION_FACTOR)
        for topic in topics()
        if topic not in there
    ]
    for topic in topics():
        if topic in there and len(there[topic].partitions) < conf.TOPIC_PARTITIONS:
            raise ValueError(
                f"topic {topic} has {len(there[topic].partitions)} partitions, fewer than the "
                f"{conf.TOPIC_PARTITIONS} of TOPIC_PARTITIONS; adding some would move keys to other partitions"
            )
    if missing:
        for future in admin.create_topics(missing, operation_timeout=timeout_seconds).values():
            try:
                future.result(timeout=timeout_seconds)
            except KafkaException as error:
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise
    return [topic.topic for topic in missing]


__all__ = [
    "RECORD_REFUSALS",
    "Consumer",
    "KafkaError",
    "KafkaException",
    "Message",
    "Producer",
    "TopicPartition",
    "create_topics",
    "make_consumer",
    "make_producer",
    "producer_settings",
]
