"""Each system check speaks up, by id and hint, and is silent otherwise; and what a pooler does to the relay."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psycopg
import pytest
from django.core.checks import Tags, run_checks
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, connection, connections
from django.test.utils import CaptureQueriesContext

from events_outbox import partitions
from events_outbox.checks import check_database
from events_outbox.kafka import make_producer
from events_outbox.leader import open_session
from events_outbox.models import OutboxEvent
from events_outbox.pooling import is_pooled, is_shared
from events_outbox.relay import Relay
from events_outbox.status import read_status
from tests.events_outbox.conftest import eventually, in_thread
from tests.services import free_ports
from voicehelper.devstack.child import Child
from voicehelper.devstack.postgres import _as_server_user

ROOT = Path(__file__).resolve().parents[2]


def set_outbox(settings, **values):
    settings.EVENTS_OUTBOX = {"KAFKA": {"bootstrap.servers": "x:1"}, **values}


def found():
    """The messages of the checks that ask no database, by id."""
    messages = run_checks(tags=["events_outbox"])
    assert all(message.hint for message in messages)
    return {message.id.removeprefix("events_outbox."): message.msg for message in messages}


def asked():
    """The messages of the checks that ask the database, by id."""
    messages = run_checks(tags=[Tags.database], databases=[DEFAULT_DB_ALIAS])
    assert all(message.hint for message in messages)
    return {message.id.removeprefix("events_outbox."): message.msg for message in messages}


# Settings of the Kafka clients


@pytest.mark.parametrize("place", ["KAFKA", "KAFKA_PRODUCER"])
@pytest.mark.parametrize(
    ("name", "value", "number"),
    [
        ("enable.idempotence", False, "E004"),
        ("enable.idempotence", "false", "E004"),
        ("acks", 1, "E005"),
        ("acks", "0", "E005"),
        ("request.required.acks", "1", "E005"),
        ("enable.gapless.guarantee", "false", "E006"),
        ("max.in.flight.requests.per.connection", 6, "E007"),
        ("max.in.flight", "1000000", "E007"),
        ("message.timeout.ms", 300_000, "E008"),
        ("delivery.timeout.ms", "1", "E008"),
        ("partitioner", "random", "E009"),
        ("partitioner", "consistent_random", "W002"),
        ("partitioner", "fnv1a", "W002"),
    ],
)
def test_a_producer_setting_that_breaks_a_promise_is_told(settings, place, name, value, number):
    kafka = {"bootstrap.servers": "x:1"}
    set_outbox(settings, **{"KAFKA": kafka, place: {**kafka, name: value}})
    assert list(found()) == [number]
    assert found()[number].startswith(f'EVENTS_OUTBOX["{place}"]["{name}"] is {value!r}: ')


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enable.idempotence", True),
        ("enable.idempotence", "true"),
        ("acks", "all"),
        ("acks", -1),
        ("enable.gapless.guarantee", True),
        ("max.in.flight", 5),
        ("message.timeout.ms", "0"),
        ("partitioner", "murmur2"),
        ("linger.ms", 50),
        ("message.max.bytes", 2_000_000),
    ],
)
def test_a_producer_setting_that_breaks_nothing_is_allowed(settings, name, value):
    set_outbox(settings, KAFKA_PRODUCER={name: value})
    assert found() == {}


def test_a_setting_in_librdkafkas_nested_form_is_seen(settings):
    set_outbox(settings, KAFKA_PRODUCER={"default.topic.config": {"request.required.acks": 1}})
    assert list(found()) == ["E005"]


def test_the_later_of_two_settings_counts(settings):
    set_outbox(settings, KAFKA={"bootstrap.servers": "x:1", "acks": 1}, KAFKA_PRODUCER={"acks": "all"})
    assert found() == {}


@pytest.mark.parametrize("name", ["enable.idempotence", "enable.gapless.guarantee"])
def test_idempotence_with_acks_1_is_an_error_because_librdkafka_refuses_it(settings, name):
    set_outbox(settings, ACKS="1", KAFKA_PRODUCER={name: True})
    assert list(found()) == ["W001", "E003"]
    with pytest.raises(ImproperlyConfigured, match="librdkafka refuses"):
        make_producer(lambda error: None)


@pytest.mark.parametrize(("most", "numbers"), [(1, ["W001"]), (2, ["W001", "E007"])])
def test_without_idempotence_only_one_request_in_flight_keeps_order(settings, most, numbers):
    set_outbox(settings, ACKS="1", KAFKA_PRODUCER={"max.in.flight": most})
    assert list(found()) == numbers


@pytest.mark.parametrize("place", ["KAFKA", "KAFKA_CONSUMER"])
@pytest.mark.parametrize(
    ("name", "value", "number"),
    [
        ("enable.auto.commit", True, "E010"),
        ("enable.auto.offset.store", "true", "E010"),
        ("group.id", "mine", "E011"),
    ],
)
def test_a_consumer_setting_that_breaks_a_promise_is_told(settings, place, name, value, number):
    kafka = {"bootstrap.servers": "x:1"}
    set_outbox(settings, **{"KAFKA": kafka, place: {**kafka, name: value}})
    assert list(found()) == [number]


def test_consumer_settings_that_break_nothing_are_allowed(settings):
    set_outbox(settings, KAFKA_CONSUMER={"enable.auto.commit": False, "session.timeout.ms": 6000})
    assert found() == {}


# Retention against deduplication


@pytest.mark.parametrize(
    ("keep", "topic", "prune", "numbers"),
    [
        (None, 7, None, []),
        (None, 7, 30, []),
        (8, 7, 8, []),
        (7, 7, 7, ["E012"]),
        (30, 31, 14, ["E012"]),
        (30, 7, 31, ["E013"]),
        (30, 7, None, ["W003"]),
        (7, 7, 30, ["E012", "E013"]),
    ],
)
def test_processed_marks_must_outlive_topics_and_events(settings, keep, topic, prune, numbers):
    set_outbox(settings, PROCESSED_KEEP_DAYS=keep, TOPIC_RETENTION_DAYS=topic, PRUNE_AFTER_DAYS=prune)
    assert list(found()) == numbers


# The database


def test_a_sign_of_transaction_pooling_is_warned_of(settings, monkeypatch):
    assert found() == {}
    monkeypatch.setitem(connections[DEFAULT_DB_ALIAS].settings_dict, "DISABLE_SERVER_SIDE_CURSORS", True)
    assert list(found()) == ["W005"]


@pytest.mark.django_db(transaction=True)
def test_a_direct_connection_to_a_fresh_database_is_well():
    assert asked() == {}
    with CaptureQueriesContext(connection) as queries:
        assert check_database(None, databases=["other"]) == check_database(None) == []
    assert len(queries) == 0  # another database is not asked


@pytest.mark.django_db
def test_before_the_first_migrate_there_is_nothing_to_say():
    with connection.cursor() as cursor:
        cursor.execute("DROP TABLE events_outbox_outboxevent CASCADE")
    assert asked() == {}


@pytest.mark.django_db
def test_a_sequence_that_hands_out_blocks_is_an_error():
    with connection.cursor() as cursor:
        cursor.execute("ALTER SEQUENCE events_outbox_outboxevent_id_seq CACHE 20")
    messages = asked()
    assert list(messages) == ["E014"] and "events_outbox_outboxevent_id_seq has CACHE 20" in messages["E014"]


@pytest.mark.django_db
def test_partitions_that_are_set_and_not_there_are_warned_of(settings):
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "PARTITION_ROWS": 1000}
    messages = asked()
    assert list(messages) == ["W006"] and "is a plain table" in messages["W006"]


@pytest.mark.django_db
def test_a_partitioned_outbox_without_the_setting_is_warned_of(settings):
    assert not OutboxEvent.objects.exists()
    with connection.cursor() as cursor:
        partitions.partition_new_table(cursor.execute, 1000)
        messages = asked()
        assert list(messages) == ["W006"] and "is partitioned" in messages["W006"]
        settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "PARTITION_ROWS": 1000}
        assert asked() == {}
        cursor.execute("ALTER SEQUENCE events_outbox_outboxevent_id_seq CACHE 20")
    assert list(asked()) == ["E014"]  # its sequence is found too


# A pooler in between: pgbouncer itself


class PgBouncer(Child):
    """A pgbouncer in front of the database of the tests, at `url`."""

    def __init__(self, directory, mode, log, **settings):
        ours = connection.get_connection_params()
        server = {name: ours[name] for name in ("host", "port", "user", "password") if ours.get(name)}
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": free_ports(1)[0],
            "unix_socket_dir": "",
            "auth_type": "any",
            "pool_mode": mode,
            "ignore_startup_parameters": "extra_float_digits",
            **settings,
        }
        self.port = settings["listen_port"]
        self.url = f"postgresql://{ours['user']}@127.0.0.1:{self.port}/{ours['dbname']}"
        file = directory / f"{mode}.ini"
        database = " ".join(f"{name}={value}" for name, value in server.items())
        lines = [f"{name} = {value}" for name, value in settings.items()]
        file.write_text("\n".join(["[databases]", f"* = {database}", "[pgbouncer]", *lines]))
        # It refuses to run as root too, and the server's socket is for the server's user alone.
        super().__init__("pgbouncer", [*_as_server_user(), "pgbouncer", file], output=log.fileno())

    def accepts(self):
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            assert self.is_running(), "pgbouncer did not start"
            return False
        return True

    def connect(self):
        return psycopg.connect(self.url, autocommit=True, prepare_threshold=None)


@pytest.fixture
def pgbouncer(tmp_path):
    """Start pgbouncers by their pool mode."""
    started = []
    with (tmp_path / "log").open("wb") as log:

        def start(mode, **settings):
            pooler = PgBouncer(tmp_path, mode, log, **settings)
            started.append(pooler)
            pooler.start()
            eventually(pooler.accepts)
            return pooler

        yield start
        for pooler in started:
            pooler.stop()


needs_pgbouncer = pytest.mark.needs_tool("pgbouncer")


@pytest.fixture
def busy():
    """Work for a pooler: other clients with short transactions."""
    stop, threads = threading.Event(), []

    def work(pooler):
        with pooler.connect() as session:
            while not stop.is_set():
                session.execute("SELECT pg_sleep(random() * 0.003)")

    def start(pooler, clients):
        for _ in range(clients):
            threads.append(threading.Thread(target=work, args=[pooler]))
            threads[-1].start()

    yield start
    stop.set()
    for thread in threads:
        thread.join()


@needs_pgbouncer
@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("mode", "rotating", "clients"),
    [("transaction", 0, 0), ("transaction", 1, 0), ("transaction", 0, 3), ("transaction", 1, 3), ("statement", 0, 0)],
)
def test_a_pool_that_shares_sessions_is_found_out(pgbouncer, busy, mode, rotating, clients):
    pooler = pgbouncer(mode, server_round_robin=rotating)
    busy(pooler, clients)
    for _ in range(5):
        with pooler.connect() as session:
            assert is_pooled(session) and is_shared(session, pooler.connect)


@needs_pgbouncer
@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("clients", [0, 3])
def test_a_pool_that_keeps_sessions_is_no_worse_than_none(pgbouncer, busy, clients):
    pooler = pgbouncer("session")
    busy(pooler, clients)
    for _ in range(5):
        with pooler.connect() as session:
            assert is_pooled(session) and not is_shared(session, pooler.connect)


@needs_pgbouncer
@pytest.mark.django_db(transaction=True)
def test_a_pool_without_a_second_session_is_not_waited_for(pgbouncer):
    pooler = pgbouncer("session", default_pool_size=1)
    with pooler.connect() as session:
        assert not is_shared(session, pooler.connect)
    pooler.stop()  # which ends the second connection's waiting
    eventually(lambda: not [t for t in threading.enumerate() if t.name == "second connection"])


@pytest.mark.django_db(transaction=True)
def test_a_direct_connection_is_told_from_a_pooled_one():
    with open_session() as session:
        assert not is_pooled(session) and not is_shared(session, lambda: pytest.fail("nothing to find out"))


def manage(pooler, *arguments):
    return subprocess.Popen(
        [sys.executable, "manage.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": pooler.url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@needs_pgbouncer
@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(("mode", "warns"), [("transaction", True), ("session", False)])
def test_transaction_pooling_is_warned_of_by_the_database_checks(pgbouncer, mode, warns):
    with manage(pgbouncer(mode), "check", "--database", "default", "--tag", "database") as check:
        _, errors = check.communicate(timeout=60)
    assert check.returncode == 0
    assert ("(events_outbox.W004) a connection pooler gives" in errors) == warns


@needs_pgbouncer
@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("arguments", [["relay_outbox"], ["replay_outbox", "--all"]])
def test_behind_transaction_pooling_a_relay_ends_with_a_clear_error(pgbouncer, emit, arguments):
    emit("c1")
    with manage(pgbouncer("transaction"), *arguments) as command:
        output, errors = command.communicate(timeout=60)
    assert command.returncode == 1
    last_line = errors.strip().splitlines()[-1]
    assert "the relay needs one of its own; connect directly, or through a pool in session mode" in last_line
    assert "leads" not in output
    assert read_status().pending == 1


@needs_pgbouncer
@pytest.mark.django_db(transaction=True)
def test_a_relay_behind_session_pooling_works_and_hands_over(pgbouncer, emit, topic_reader):
    pooler = pgbouncer("session")
    relay = manage(pooler, "relay_outbox")
    try:
        emit("c1", 0)
        topic_reader.read(1)
        with in_thread(Relay()):
            eventually(lambda: read_status().standbys == 1)
            relay.kill()  # pgbouncer ends its session, and with it the lock
            emit("c1", 1)
            topic_reader.read(2)
    finally:
        relay.kill()
        relay.communicate()
