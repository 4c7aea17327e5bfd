"""Clients, settings and topics: the only import of confluent_kafka."""

import logging
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as NoAnswer
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypeVar

from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_END,
    Consumer,
    ConsumerGroupState,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import import_string

from .catalog import topics
from .conf import outbox_settings

logger = logging.getLogger("librdkafka")
# We know that it is called experimental: the tests of refused records hold it to what it says.
logger.addFilter(lambda line: "enable.gapless.guarantee is experimental" not in line.getMessage())
NO_KAFKA_HINT = "run `make up` in another terminal, or set KAFKA_BOOTSTRAP_SERVERS"
Client = TypeVar("Client", Producer, Consumer, AdminClient)
TellError = Callable[[KafkaError], None]

OFFSETS_SECONDS = 10.0
_DAY_MS = 86_400_000
_ENDS = {"latest": -1, "earliest": -2}  # what ListOffsets takes for a timestamp
_SECRET_SETTING = re.compile(r"password|secret|token|jaas|oauthbearer\.config|\.pem$")
_NO_TOKEN_SECONDS = 5.0
_REASON_SECONDS = 30.0

TOPIC_REFUSALS = frozenset(
    {
        KafkaError.TOPIC_EXCEPTION,
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._UNKNOWN_PARTITION,
    }
)
"""Errors that speak of a record's topic."""
RECORD_REFUSALS = TOPIC_REFUSALS | {
    KafkaError.MSG_SIZE_TOO_LARGE,
    KafkaError.RECORD_LIST_TOO_LARGE,
    KafkaError.INVALID_MSG,
    KafkaError.INVALID_RECORD,
    KafkaError._INVALID_DIFFERENT_RECORD,
    KafkaError.INVALID_TIMESTAMP,
    KafkaError.POLICY_VIOLATION,
}
"""Errors that speak of the record or its topic, not of the broker: waiting does not help, the event is parked."""


def producer_settings() -> dict[str, Any]:
    """librdkafka settings of the relay's producer.

    An outage is waited out (`message.timeout.ms=0`), so that a later event can never overtake an expired one.
    """
    conf = outbox_settings()
    safety: dict[str, Any] = (
        # Gapless: where the broker refuses a record, nothing that was produced after it may get there.
        {"enable.idempotence": True, "acks": "all", "enable.gapless.guarantee": True}
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
        # How long a topic that the broker does not know yet is waited for, and with it all others.
        "topic.metadata.propagation.max.ms": 5000,
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
            # At that bound it pauses; with the default of a second it would then stand idle for most of it.
            "fetch.queue.backoff.ms": 20,
            **conf.KAFKA,
            **conf.KAFKA_CONSUMER,
            "error_cb": on_error,
            "on_commit": on_commit,
        },
    )


def make_reader(on_error: TellError) -> Consumer:
    """Return a consumer for `assign()`: it joins no group and commits nothing. `on_error` hears of broker trouble.

    Raises ImproperlyConfigured when librdkafka refuses the settings.
    """
    settings = {"client.id": "relay_outbox", "group.id": "relay_outbox", "enable.auto.commit": False}
    return _make(Consumer, {**settings, **outbox_settings().KAFKA, "error_cb": on_error})


def make_group_reader(group_id: str, on_error: TellError) -> Consumer:
    """Return a consumer that asks for a group's offsets, and reads single records by `assign()`, without joining it.

    It may commit offsets as well: the broker refuses that while the group has members.
    Raises ImproperlyConfigured when librdkafka refuses the settings.
    """
    conf = outbox_settings()
    return _make(
        Consumer,
        {
            "reconnect.backoff.max.ms": 1000,
            **conf.KAFKA,
            **conf.KAFKA_CONSUMER,
            "client.id": "consumer_offsets",
            "group.id": group_id,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            # An offset that is not there is told, not replaced by another one.
            "auto.offset.reset": "error",
            "socket.timeout.ms": 5000,
            # It waits for that long to commit while the group's coordinator is away.
            "session.timeout.ms": 5000,
            "max.poll.interval.ms": 300_000,
            # It reads the first record of a partition at a time: a broker answers with no less than a batch.
            "fetch.message.max.bytes": 1,
            "queued.min.messages": 1,
            "fetch.wait.max.ms": 100,
            "fetch.queue.backoff.ms": 10,
            # Whoever asks says by itself that there was no answer, and why.
            "log_level": 0,
            "error_cb": on_error,
        },
    )


def make_record_reader(on_error: TellError) -> Consumer:
    """Return a consumer that reads many records by `assign()`, to the end of their partitions, which it tells of.

    It joins no group and commits nothing. Raises ImproperlyConfigured when librdkafka refuses the settings.
    """
    conf = outbox_settings()
    return _make(
        Consumer,
        {
            "reconnect.backoff.max.ms": 500,
            **conf.KAFKA,
            **conf.KAFKA_CONSUMER,
            "client.id": "record_search",
            "group.id": "record_search",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "enable.partition.eof": True,
            # An offset that is not there is told, not replaced by another one.
            "auto.offset.reset": "error",
            "socket.timeout.ms": 5000,
            "fetch.wait.max.ms": 50,
            "queued.max.messages.kbytes": 16384,
            "fetch.queue.backoff.ms": 10,
            # Whoever asks says by itself that there was no answer, and why.
            "log_level": 0,
            "error_cb": on_error,
        },
    )


@dataclass(frozen=True)
class GroupMember:
    """A member of a consumer group: the name of its client, its host as the broker sees it, and what it reads."""

    client_id: str
    host: str
    partitions: list[tuple[str, int]]


@dataclass(frozen=True)
class Group:
    """A consumer group. `state`: Kafka's word for it, "none" for a group that is not there."""

    state: str
    members: list[GroupMember]

    @property
    def is_empty(self) -> bool:
        """Whether it is certain that nobody is in it: not while members come and go."""
        return self.state in ("none", "empty") and not self.members


def describe_group(group_id: str, timeout_seconds: float) -> Group:
    """Ask the broker who is in a group. Raises KafkaException when that cannot be told in time."""
    deadline = time.monotonic() + timeout_seconds
    admin, _ = _admin_and_topics(timeout_seconds)
    left = max(deadline - time.monotonic(), 0.5)
    (asked,) = admin.describe_consumer_groups([group_id], request_timeout=left).values()
    try:
        found = asked.result(timeout=left + 0.5)
    except NoAnswer:
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "no answer in time")) from None
    except KafkaException as error:
        if error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
            return Group("none", [])
        raise
    state = found.state.name.lower() if isinstance(found.state, ConsumerGroupState) else "unknown"
    return Group(
        "none" if state == "dead" else state,  # that is how a broker calls a group that it does not know
        [
            GroupMember(m.client_id, m.host, sorted((p.topic, p.partition) for p in m.assignment.topic_partitions))
            for m in found.members
        ],
    )


def can_publish_to(topics: Sequence[str]) -> bool:
    """Whether a new client finds the broker, and a leader for each partition of those topics that are there."""
    client = _make(Producer, {**producer_settings(), "error_cb": lambda _error: None})
    try:
        found = client.list_topics(timeout=2.0).topics
    except KafkaException:
        return False
    return all(p.leader >= 0 for topic in topics if topic in found for p in found[topic].partitions.values())


def can_be_reached() -> bool:
    """Whether a new client finds the broker within two seconds."""
    reader = make_reader(lambda _error: None)
    try:
        reader.list_topics(timeout=2.0)
    except KafkaException:
        return False
    finally:
        reader.close()
    return True


def starting_offsets(
    client: Consumer, partitions: Sequence[TopicPartition], start_at: Literal["earliest", "latest"] | datetime
) -> dict[tuple[str, int], TopicPartition]:
    """Where to begin in those of the partitions that the client's group has committed nothing of.

    At a time: with the first record that is not older. Raises KafkaException when the broker does not tell.
    """
    committed = _good(client.committed(list(partitions), timeout=OFFSETS_SECONDS))
    new = [(p.topic, p.partition) for p in committed if p.offset < 0]
    at = int(start_at.timestamp() * 1000) if isinstance(start_at, datetime) else _ENDS[start_at]
    starts: dict[tuple[str, int], TopicPartition] = {}
    for timestamp_ms in (at, _ENDS["latest"]):  # the second round is for partitions with no record as late as that
        asked = [TopicPartition(*partition, timestamp_ms) for partition in new if partition not in starts]
        found = _good(client.offsets_for_times(asked, timeout=OFFSETS_SECONDS)) if asked else []
        starts.update({(p.topic, p.partition): p for p in found if p.offset >= 0})
    return starts


def _good(partitions: list[TopicPartition]) -> list[TopicPartition]:
    for partition in partitions:
        if partition.error is not None:
            raise KafkaException(partition.error)
    return partitions


def _make(client: type[Client], settings: dict[str, Any]) -> Client:
    if not settings.get("bootstrap.servers"):
        raise ImproperlyConfigured('EVENTS_OUTBOX["KAFKA"] has no "bootstrap.servers": ' + NO_KAFKA_HINT)
    tell = _told_well(settings["error_cb"])
    changed: dict[str, Any] = {"error_cb": tell}
    if "oauth_cb" in settings:
        changed["oauth_cb"] = _token_source(settings["oauth_cb"], tell)
    try:
        return client({**settings, **changed}, logger=logger)
    except KafkaException as error:
        reason = without_secrets(error.args[0].str())
        raise ImproperlyConfigured(f"librdkafka refuses the Kafka settings: {reason}") from None


def without_secrets(text: str) -> str:
    """Return the text with the values of secret settings taken out.

    librdkafka shows none of them by itself; a broker, or whoever issues OAuth tokens, may echo what it was sent.
    """
    conf = outbox_settings()
    for settings in (conf.KAFKA, conf.KAFKA_PRODUCER, conf.KAFKA_CONSUMER):
        for name, value in settings.items():
            # Cutting a shorter value out of every word would give it away rather than hide it.
            if _SECRET_SETTING.search(name) and isinstance(value, str) and len(value) > 3:
                text = text.replace(value, "***")
    return text


class _WithoutSecrets(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_secrets(record.getMessage()), None
        return True


logger.addFilter(_WithoutSecrets())


def _told_well(on_error: TellError) -> TellError:
    """Pass errors on without secrets, and without the "all brokers are down" that follows when one has said why."""
    reason_at = float("-inf")

    def tell(error: KafkaError) -> None:
        nonlocal reason_at
        now = time.monotonic()
        if error.code() != KafkaError._ALL_BROKERS_DOWN:
            reason_at = now
        elif now - reason_at < _REASON_SECONDS:
            return
        on_error(KafkaError(error.code(), without_secrets(error.str()), error.fatal()))

    return tell


def _token_source(source: Any, tell: TellError) -> Callable[[str], tuple[Any, ...]]:
    """Return the `oauth_cb` of the settings, a function or the dotted path of one, so that it never fails.

    Raises ImproperlyConfigured when there is no such function.
    """
    try:
        get_token = import_string(source) if isinstance(source, str) else source
    except ImportError as error:
        raise ImproperlyConfigured(f'EVENTS_OUTBOX["KAFKA"]["oauth_cb"]: {error}') from None
    if not callable(get_token):
        raise ImproperlyConfigured('EVENTS_OUTBOX["KAFKA"]["oauth_cb"] must be a function or the dotted path of one')

    def token(config: str) -> tuple[Any, ...]:
        try:
            return tuple(get_token(config))
        except Exception as error:
            tell(KafkaError(KafkaError._AUTHENTICATION, f"oauth_cb failed: {type(error).__name__}: {error}"))
            # Without a token the client could not even be made, and an outage of who issues tokens would end the
            # process. The broker refuses this one, and librdkafka soon asks for another.
            return "no-token", time.time() + _NO_TOKEN_SECONDS

    return token


def create_topics(timeout_seconds: float = 30.0) -> list[str]:
    """Create the topics that do not exist and return their names.

    Raises KafkaException when the broker refuses or does not answer in time, ValueError when a topic is there
    with fewer partitions than configured.
    """
    conf = outbox_settings()
    admin, there = _admin_and_topics(timeout_seconds)
    missing = [
        NewTopic(
            topic,
            num_partitions=conf.TOPIC_PARTITIONS,
            replication_factor=conf.TOPIC_REPLICATION_FACTOR,
            # Kafka deletes whole segments: with its default of a week, a record could live as much longer.
            config={"retention.ms": str(conf.TOPIC_RETENTION_DAYS * _DAY_MS), "segment.ms": str(_DAY_MS)},
        )
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


def _admin_and_topics(timeout_seconds: float) -> tuple[AdminClient, dict[str, Any]]:
    """Return a client for topic administration, and the topics that are there.

    Raises KafkaException: at once when the broker refuses the login or the certificates, else when time is up.
    """
    told: list[KafkaError] = []
    admin = _make(AdminClient, {**outbox_settings().KAFKA, "error_cb": told.append})
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            return admin, admin.list_topics(timeout=min(timeout_seconds, 1.0)).topics
        except KafkaException as error:
            admin.poll(0)
            for reason in told:
                if reason.code() in (KafkaError._AUTHENTICATION, KafkaError._SSL):
                    raise KafkaException(reason) from None
            if time.monotonic() > deadline:
                raise KafkaException(told[-1] if told else error.args[0]) from None


__all__ = [
    "OFFSET_BEGINNING",
    "OFFSET_END",
    "RECORD_REFUSALS",
    "TOPIC_REFUSALS",
    "Consumer",
    "Group",
    "GroupMember",
    "KafkaError",
    "KafkaException",
    "Message",
    "Producer",
    "TopicPartition",
    "can_be_reached",
    "can_publish_to",
    "create_topics",
    "describe_group",
    "make_consumer",
    "make_group_reader",
    "make_producer",
    "make_reader",
    "make_record_reader",
    "producer_settings",
    "starting_offsets",
    "without_secrets",
]
