"""The setting `EVENTS_OUTBOX`, parsed once and strictly. README, Settings, lists every key with its unit."""

from dataclasses import dataclass, field, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed


@dataclass(frozen=True)
class OutboxSettings:
    """Values of `EVENTS_OUTBOX`; a key that is left out has the default shown here."""

    KAFKA: dict[str, Any] = field(default_factory=dict, repr=False)
    """librdkafka settings of every client: `bootstrap.servers`, TLS, SASL."""
    KAFKA_PRODUCER: dict[str, Any] = field(default_factory=dict, repr=False)
    """librdkafka settings of the relay's producer, over the defaults in `kafka.py`."""
    KAFKA_CONSUMER: dict[str, Any] = field(default_factory=dict, repr=False)
    """librdkafka settings of every consumer, over the defaults in `kafka.py`."""
    KAFKA_IS_EMBEDDED: bool = False
    """The broker is the in-memory one for development: no topic administration, nothing kept."""
    ACKS: str = "all"
    """"all", or "1" (the specification's WaitForLocal), which turns idempotence off."""
    BATCH_SIZE: int = 1000
    """Events a batch of the relay, 1 to 10,000; the specification recommends 100 to 1,000."""
    CONSUMER_BATCH_SIZE: int = 500
    """Events a batch (one transaction) of a consumer, 1 to 10,000."""
    BATCH_TIMEOUT_SECONDS: int = 900
    """Longest time a consumer's batch may take. After it /livez fails and the member leaves the group, so that another
    gets its partitions; a database session that stands still in a transaction for so long is ended."""
    MAX_REPLAYS: int = 10
    """How often a dead letter may be replayed in vain before a replay has to be forced."""
    MAX_EVENT_BYTES: int = 900_000
    """Largest serialised event in bytes; stays below the broker's `message.max.bytes` (1 MB) with its headers."""
    DEFAULT_TOPIC: str = "default.events"
    """Topic of the event types that TOPICS does not route."""
    TOPICS: dict[str, str] = field(
        default_factory=lambda: {
            "conversation": "conversation.events",
            "document": "document.events",
            "identity": "identity.events",
        }
    )
    """Domain (first part of the event type) -> topic."""
    TOPIC_PARTITIONS: int = 6
    TOPIC_REPLICATION_FACTOR: int = 1
    TOPIC_RETENTION_DAYS: int = 7
    """How long Kafka keeps records (`retention.ms` of the topics that `create_topics` makes)."""
    PRUNE_AFTER_DAYS: int | None = None
    """The leader deletes published events that are older; None keeps them, and so replayable, for ever."""
    PROCESSED_KEEP_DAYS: int | None = None
    """The leader deletes processed marks that are older; None keeps them for ever."""
    PARTITION_ROWS: int | None = None
    """Events a partition of the outbox, chosen before the first `migrate`; None is a plain table."""
    IDLE_POLL_MIN_SECONDS: float = 0.005
    """Shortest pause of a relay that is not behind between two looks at the outbox."""
    IDLE_POLL_MAX_SECONDS: float = 0.1
    """Longest pause of a relay that is not behind: it doubles while nothing comes."""
    LEADER_POLL_SECONDS: float = 1.0
    """How often a standby relay tries to become the leader."""
    LEADER_SESSION_TIMEOUT_SECONDS: int = 10
    """A leader that is frozen, or whose host is lost, loses its database session, and so the lead, after this."""
    ADMIN_TENANT: str | None = None
    """Dotted path of a function `(user) -> str | None`: the only tenant whose rows the user sees in the admin, or None
    for one who sees all. Without it every user of the admin does."""

    def __post_init__(self) -> None:
        for name in ("BATCH_SIZE", "CONSUMER_BATCH_SIZE"):
            if not 1 <= getattr(self, name) <= 10_000:
                raise ImproperlyConfigured(f"EVENTS_OUTBOX[{name!r}] must be from 1 to 10000")
        for name in ("LEADER_POLL_SECONDS", "IDLE_POLL_MAX_SECONDS"):
            if not 0 < getattr(self, name) <= self.LEADER_SESSION_TIMEOUT_SECONDS / 2:
                raise ImproperlyConfigured(
                    f"EVENTS_OUTBOX[{name!r}] must be above 0 and at most half of LEADER_SESSION_TIMEOUT_SECONDS: "
                    "a relay that pauses longer loses its database session"
                )
        if not 0 < self.IDLE_POLL_MIN_SECONDS <= self.IDLE_POLL_MAX_SECONDS:
            raise ImproperlyConfigured(
                "EVENTS_OUTBOX['IDLE_POLL_MIN_SECONDS'] must be above 0 and at most IDLE_POLL_MAX_SECONDS: "
                "a relay that does not pause takes a core"
            )
        for name, least in (
            ("BATCH_TIMEOUT_SECONDS", 1),
            ("MAX_REPLAYS", 1),
            ("TOPIC_RETENTION_DAYS", 1),
            ("PRUNE_AFTER_DAYS", 1),
            ("PROCESSED_KEEP_DAYS", 1),
            ("PARTITION_ROWS", 1000),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ImproperlyConfigured(f"EVENTS_OUTBOX[{name!r}] is {value}; it must be at least {least}")
        if self.ACKS not in ("all", "1"):
            raise ImproperlyConfigured(f'EVENTS_OUTBOX["ACKS"] is {self.ACKS!r}: use "all" (safe) or "1"')


@cache
def outbox_settings() -> OutboxSettings:
    """Return the parsed settings.

    Raises ImproperlyConfigured for an unknown key, a value of the wrong type or one out of range.
    """
    given = getattr(settings, "EVENTS_OUTBOX", {})
    known = {f.name: f for f in fields(OutboxSettings)}
    for name, value in given.items():
        if name not in known:
            raise ImproperlyConfigured(f"EVENTS_OUTBOX has no key {name!r}; it knows {', '.join(sorted(known))}")
        kind: Any = known[name].type
        kinds = [get_origin(one) or one for one in (get_args(kind) if isinstance(kind, UnionType) else [kind])]
        is_int_for_float = kinds == [float] and type(value) is int
        if type(value) not in kinds and not is_int_for_float:
            # The value is not shown: it may hold a password.
            names = " or ".join("None" if one is NoneType else one.__name__ for one in kinds)
            raise ImproperlyConfigured(f"EVENTS_OUTBOX[{name!r}] is a {type(value).__name__}; it must be a {names}")
    return OutboxSettings(**given)


def _forget(*, setting: str, **_: Any) -> None:
    if setting == "EVENTS_OUTBOX":
        outbox_settings.cache_clear()


setting_changed.connect(_forget)
