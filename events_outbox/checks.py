"""System checks of the package: each with an id and a hint.

Errors are what breaks a promise of the package, warnings what breaks one under circumstances. Those that ask the
database are run by `migrate` and by `check --database default`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import psycopg
from django.apps import AppConfig
from django.core.checks import CheckMessage, Error, Tags, Warning, register
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, connections

from .conf import OutboxSettings, outbox_settings
from .pooling import HINT, is_shared

_OUTBOX = "events_outbox_outboxevent"

# librdkafka knows these settings by two names.
_ALIASES = {
    "request.required.acks": "acks",
    "max.in.flight": "max.in.flight.requests.per.connection",
    "delivery.timeout.ms": "message.timeout.ms",
}
_REMOVE = "remove it: the package sets it itself"


@register("events_outbox")
def check_database_is_postgresql(app_configs: Sequence[AppConfig] | None, **_: Any) -> list[CheckMessage]:
    vendor = connections[DEFAULT_DB_ALIAS].vendor
    if vendor == "postgresql":
        return []
    return [
        Error(
            f"the outbox needs PostgreSQL, but the default database is {vendor}",
            hint="the relay reads by PostgreSQL's transaction snapshots; set DATABASE_URL=postgresql://...",
            id="events_outbox.E001",
        )
    ]


@register("events_outbox")
def check_settings(app_configs: Sequence[AppConfig] | None, **_: Any) -> list[CheckMessage]:
    try:
        conf = outbox_settings()
    except ImproperlyConfigured as error:
        return [Error(str(error), hint="see README, Settings", id="events_outbox.E002")]
    return [*_acks(conf), *_producer(conf), *_consumer(conf), *_retention(conf), *_server_side_cursors()]


def _acks(conf: OutboxSettings) -> Iterator[CheckMessage]:
    if conf.ACKS == "1":
        yield Warning(
            'EVENTS_OUTBOX["ACKS"] is "1": an event that the broker acknowledged is lost when that broker dies '
            "before it was replicated, and retries can duplicate it in the topic",
            hint='use "all" unless the specification\'s WaitForLocal is what you want',
            id="events_outbox.W001",
        )


def _producer(conf: OutboxSettings) -> Iterator[CheckMessage]:
    """Settings of the relay's producer that would undo what the package sets."""
    safe = conf.ACKS == "all"
    most_in_flight = 5 if safe else 1
    given = _given(KAFKA=conf.KAFKA, KAFKA_PRODUCER=conf.KAFKA_PRODUCER)
    rules: list[tuple[str, Callable[[Any], bool], str, str, str]] = [
        *(
            (
                name,
                lambda value: not safe and _is_true(value),
                f'librdkafka refuses {name} with EVENTS_OUTBOX["ACKS"] = "1", and no relay can start',
                'remove it, or set ACKS to "all"',
                "E003",
            )
            for name in ("enable.idempotence", "enable.gapless.guarantee")
        ),
        (
            "enable.idempotence",
            lambda value: safe and not _is_true(value),
            "without idempotence a retry can duplicate events in the topic and change their order",
            _REMOVE,
            "E004",
        ),
        (
            "acks",
            lambda value: {"-1": "all"}.get(str(value), str(value)) != conf.ACKS,
            "an event counts as published once this many brokers have it",
            'use EVENTS_OUTBOX["ACKS"], with which the other settings agree',
            "E005",
        ),
        (
            "enable.gapless.guarantee",
            lambda value: safe and not _is_true(value),
            "without it an event can overtake one of its key that the broker refused",
            _REMOVE,
            "E006",
        ),
        (
            "max.in.flight.requests.per.connection",
            lambda value: not str(value).isdecimal() or int(value) > most_in_flight,
            f'with EVENTS_OUTBOX["ACKS"] = "{conf.ACKS}" order holds for at most {most_in_flight} requests in flight',
            _REMOVE,
            "E007",
        ),
        (
            "message.timeout.ms",
            lambda value: str(value) != "0",
            "an event that expires during an outage is overtaken by later ones of its key",
            "remove it: the package sets it to 0, and an outage is waited out",
            "E008",
        ),
        (
            "partitioner",
            lambda value: value == "random",
            "events of one aggregate go to different partitions, so they have no order",
            _REMOVE,
            "E009",
        ),
        (
            "partitioner",
            lambda value: value not in ("random", "murmur2", "murmur2_random"),
            "keys go to other partitions than those Java clients choose, and after a change to others than before",
            "keep it only if the topics were written with it from the beginning",
            "W002",
        ),
    ]
    yield from _broken(given, rules)


def _consumer(conf: OutboxSettings) -> Iterator[CheckMessage]:
    given = _given(KAFKA=conf.KAFKA, KAFKA_CONSUMER=conf.KAFKA_CONSUMER)
    rules: list[tuple[str, Callable[[Any], bool], str, str, str]] = [
        *(
            (
                name,
                _is_true,
                "offsets are committed before the handlers' transaction: a consumer that dies in between loses events",
                _REMOVE,
                "E010",
            )
            for name in ("enable.auto.commit", "enable.auto.offset.store")
        ),
        (
            "group.id",
            lambda value: True,
            "all consumers would share one group, and each event would reach only one of them",
            "remove it: each Consumer names its own group",
            "E011",
        ),
    ]
    yield from _broken(given, rules)


def _given(**settings: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Settings by librdkafka's first name for them, each with where it stands; later dicts win, as in the client."""
    given = {}
    for key, values in settings.items():
        for name, value in {**values, **(values.get("default.topic.config") or {})}.items():
            given[_ALIASES.get(name, name)] = (f'EVENTS_OUTBOX["{key}"]["{name}"]', value)
    return given


def _broken(
    given: Mapping[str, tuple[str, Any]], rules: Sequence[tuple[str, Callable[[Any], bool], str, str, str]]
) -> Iterator[CheckMessage]:
    for name, breaks, why, hint, number in rules:
        if name in given and breaks(given[name][1]):
            place, value = given[name]
            kind = Error if number.startswith("E") else Warning
            yield kind(f"{place} is {value!r}: {why}", hint=hint, id=f"events_outbox.{number}")


def _is_true(value: Any) -> bool:
    """As librdkafka reads it."""
    return str(value).lower() in ("true", "t", "1")


def _retention(conf: OutboxSettings) -> Iterator[CheckMessage]:
    """Processed marks must outlive whatever can bring an event a second time."""
    keep, topic, prune = conf.PROCESSED_KEEP_DAYS, conf.TOPIC_RETENTION_DAYS, conf.PRUNE_AFTER_DAYS
    if keep is None:
        return
    kept = f'EVENTS_OUTBOX["PROCESSED_KEEP_DAYS"] is {keep}'
    if keep <= topic:
        yield Error(
            f"{kept}, not more than TOPIC_RETENTION_DAYS ({topic}): records that Kafka still has would be handled a "
            "second time when a consumer reads them again",
            hint="keep the marks some days longer than the topics keep their records",
            id="events_outbox.E012",
        )
    if prune is not None and keep < prune:
        yield Error(
            f"{kept}, less than PRUNE_AFTER_DAYS ({prune}): events that the outbox still has would be handled a second "
            "time when they are replayed",
            hint="keep the marks at least as long as the events",
            id="events_outbox.E013",
        )
    if prune is None:
        yield Warning(
            f"{kept}, while PRUNE_AFTER_DAYS is not set: a replay of older events would be handled a second time",
            hint="set PRUNE_AFTER_DAYS to at most that, or replay nothing that is older",
            id="events_outbox.W003",
        )


def _server_side_cursors() -> Iterator[CheckMessage]:
    if connections[DEFAULT_DB_ALIAS].settings_dict.get("DISABLE_SERVER_SIDE_CURSORS"):
        yield Warning(
            "DISABLE_SERVER_SIDE_CURSORS is set, as is done behind a pooler in transaction mode: the relay needs a "
            "database session of its own",
            hint=HINT,
            id="events_outbox.W005",
        )


@register(Tags.database)
def check_database(
    app_configs: Sequence[AppConfig] | None, databases: Sequence[str] | None = None, **_: Any
) -> list[CheckMessage]:
    """What only the database can tell. Before the first `migrate` there is little."""
    connection = connections[DEFAULT_DB_ALIAS]
    if DEFAULT_DB_ALIAS not in (databases or ()) or connection.vendor != "postgresql":
        return []
    connection.ensure_connection()
    messages: list[CheckMessage] = []
    if is_shared(connection.connection, lambda: psycopg.connect(**_parameters(connection))):
        messages.append(
            Warning(
                "a connection pooler gives each transaction another database session; the relay needs one of its own",
                hint=HINT,
                id="events_outbox.W004",
            )
        )
    with connection.cursor() as cursor:
        cursor.execute("SELECT relkind FROM pg_class WHERE oid = to_regclass(%s)", [_OUTBOX])
        if (table := cursor.fetchone()) is None:
            return messages
        cursor.execute(
            """SELECT seqrelid::regclass::text, seqcache FROM pg_sequence
                WHERE seqrelid = pg_get_serial_sequence(%s, 'id')::regclass""",
            [_OUTBOX],
        )
        sequences = cursor.fetchall()
    messages += _id_sequence(sequences)
    messages += _partitions(is_partitioned=table[0] == "p")
    return messages


def _parameters(connection: Any) -> dict[str, Any]:
    parameters: dict[str, Any] = connection.get_connection_params()
    for django_only in ("cursor_factory", "context", "pool"):
        parameters.pop(django_only, None)
    return parameters


def _id_sequence(sequences: Sequence[tuple[str, int]]) -> Iterator[CheckMessage]:
    for name, cache in sequences:
        if cache > 1:
            yield Error(
                f"the sequence {name} has CACHE {cache}: sessions draw ids in blocks, so the ids of one aggregate's "
                "events are not in the order of its changes, and that is the order they are published in",
                hint=f"ALTER SEQUENCE {name} CACHE 1; and reconnect all processes",
                id="events_outbox.E014",
            )


def _partitions(*, is_partitioned: bool) -> Iterator[CheckMessage]:
    try:
        rows = outbox_settings().PARTITION_ROWS
    except ImproperlyConfigured:
        return  # events_outbox.E002
    if rows is not None and not is_partitioned:
        yield Warning(
            f'EVENTS_OUTBOX["PARTITION_ROWS"] is {rows}, but the outbox is a plain table',
            hint="it is chosen before the first migrate; unset it",
            id="events_outbox.W006",
        )
    if rows is None and is_partitioned:
        yield Warning(
            'the outbox is partitioned, but EVENTS_OUTBOX["PARTITION_ROWS"] is not set: no new partitions are made, '
            "and all new events fall into the default partition",
            hint="set it to the rows that a partition shall have",
            id="events_outbox.W006",
        )
