"""outbox_status and the metrics that are read from the database."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import dj_database_url
import psycopg
import pytest
from django.core.management import CommandError, call_command
from django.db import DEFAULT_DB_ALIAS, connection, connections
from django.db.backends.postgresql.base import DatabaseWrapper
from django.utils import timezone
from prometheus_client import CollectorRegistry

from events_outbox.consumer import ConsumerProcess
from events_outbox.handlers import consumer_named
from events_outbox.management.commands import outbox_status
from events_outbox.models import DeadLetter, OutboxEvent, ProcessedEvent, RelayCursor, UndeliverableEvent
from events_outbox.pauses import pause, resume
from events_outbox.records import Record
from events_outbox.relay import Relay
from events_outbox.replay import Replay, Selection
from events_outbox.status import StatusCollector, count_pending, open_transactions, read_status, readable_seconds
from tests.events_outbox.conftest import eventually, in_thread
from tests.services import free_ports
from voicehelper.devstack.postgres import FORGETFUL, EmbeddedPostgres
from voicehelper.services import Services, find_services, write_services

pytestmark = pytest.mark.django_db(transaction=True)


def status(capsys, *, no_lag=True):
    call_command("outbox_status", json=True, no_lag=no_lag)
    return json.loads(capsys.readouterr().out)


def sample(name, **labels):
    registry = CollectorRegistry()
    registry.register(StatusCollector())
    return registry.get_sample_value(name, labels)


def test_pending_events_and_their_age(emit, capsys):
    assert status(capsys)["pending"] == 0 and status(capsys)["oldest_pending_age_seconds"] is None
    row = emit("c1")
    OutboxEvent.objects.filter(pk=row.pk).update(created_at="2026-01-01T00:00:00Z")
    emit("c2")
    shown = status(capsys)
    assert shown["pending"] == 2 and shown["oldest_pending_age_seconds"] > 86_400
    assert shown["leader"] is None and shown["standbys"] == 0
    assert sample("outbox_pending_events") == 2
    assert sample("outbox_oldest_pending_age_seconds") > 86_400


def test_counting_stops_at_the_limit(emit):
    for number in range(5):
        emit(f"c{number}")
    assert count_pending(RelayCursor.read(), 3)[0] == 3


def test_the_leader_and_its_standbys_are_seen(kafka, capsys):
    with in_thread(Relay()):
        assert eventually(lambda: (s := status(capsys))["leader"] and s)["standbys"] == 0
        with in_thread(Relay()):
            eventually(lambda: status(capsys)["standbys"] == 1)
    eventually(lambda: status(capsys)["leader"] is None)


def test_open_dead_letters_are_counted_by_consumer(capsys):
    ConsumerProcess(consumer_named("audit")).handle_batch(
        [Record(topic="t", partition=0, offset=n, key=None, value=b"junk") for n in range(2)]
    )
    assert status(capsys)["dead_letters"] == {"audit": 2}
    assert sample("consumer_dead_letters", consumer="audit") == 2


def people(capsys, *, no_lag=True):
    """What outbox_status shows to people, by name."""
    call_command("outbox_status", no_lag=no_lag)
    return {line[:20].strip(): line[20:] for line in capsys.readouterr().out.splitlines()}


def test_the_status_for_people(emit, kafka, capsys):
    emit("c1")
    RelayCursor.objects.update(last_error="no broker", leader="web-1:42")
    shown = people(capsys)
    assert (shown["leader"], shown["pending"], shown["last error"]) == ("none", "1", "no broker")
    assert re.fullmatch(r"[\d.]+ s", shown["oldest pending"])
    with in_thread(Relay()):
        eventually(lambda: read_status().pending == 0)
        host, since = socket.gethostname(), r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\+00:00 \([\d.]+ s\)"
        shown = people(capsys)
        assert re.fullmatch(rf"{host}, pid {os.getpid()}, {since}", shown["leader"])
        assert shown["heartbeat"].endswith("s ago") and shown["oldest pending"] == "-"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (59.6, "1 min"),
        (192, "3 min 12 s"),
        (3600, "1 h"),
        (86_399, "23 h 59 min"),
        (86_400 * 2 + 59, "2 d"),
    ],
)
def test_ages_are_readable(seconds, text):
    assert readable_seconds(seconds) == text


def test_the_leader_and_its_rate_are_told(emit, kafka, capsys):
    for number in range(50):
        emit("c1", number)
    with in_thread(Relay()):
        shown = eventually(lambda: (s := status(capsys))["events_per_second"] and s)
    assert (shown["leader_host"], shown["leader_pid"]) == (socket.gethostname(), os.getpid())
    assert shown["leader"] == f"{socket.gethostname()}:{os.getpid()}" and shown["leader_since"]
    eventually(lambda: status(capsys)["events_per_second"] == 0)  # nobody leads any more


def test_who_holds_the_lock_without_being_a_relay_is_no_leader(emit, kafka, capsys):
    RelayCursor.objects.update(leader="web-1:42")
    with Replay(Selection(unhandled=True)), in_thread(Relay()):
        eventually(lambda: read_status().standbys == 1)
        assert read_status().leader is None
        assert people(capsys)["leader"] == "none; replay_outbox holds the lock"


def test_discarded_events_are_not_counted_as_undeliverable(emit, capsys):
    for number in range(3):
        row = emit(f"c{number}")
        UndeliverableEvent.objects.create(event=row, topic=row.topic, aggregate_id="x", reason="x", error="x")
    parked = UndeliverableEvent.objects.order_by("id")
    UndeliverableEvent.objects.filter(pk=parked[0].pk).update(discarded_at=timezone.now())
    UndeliverableEvent.objects.filter(pk=parked[1].pk).update(redrive_requested_at=timezone.now())
    shown = status(capsys)
    assert shown["undeliverable"] == sample("outbox_undeliverable_events") == 2
    assert (shown["undeliverable_to_redrive"], shown["undeliverable_discarded"]) == (1, 1)
    assert people(capsys)["undeliverable"] == "2, of them 1 to be redriven; 1 discarded"


# The consumers


def consumer_of(shown, name):
    (found,) = [consumer for consumer in shown["consumers"] if consumer["name"] == name]
    return found


@pytest.mark.apache_kafka
def test_the_consumers_and_their_lag_are_told(group, capsys):
    group.write(0, 3, age_seconds=7200)
    DeadLetter.objects.create(
        consumer=group.name, event_id=uuid.uuid4(), topic="t", partition=0, offset=0, reason="failed", error="x"
    )
    pause(group.name, by="alice", reason="a bad deploy")
    told = consumer_of(status(capsys, no_lag=False), group.name)
    assert (told["group_id"], told["dead_letters"], told["lag_events"]) == (group.name, 1, 3)
    assert 7200 <= told["lag_seconds"] < 7260 and told["lag_not_known"] == ""
    assert (told["paused_by"], told["pause_reason"]) == ("alice", "a bad deploy")
    call_command("outbox_status")
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if group.name in line and "events behind" in line]
    since = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\+00:00"
    lag = "3 events behind, the oldest 2 h old"
    assert re.fullmatch(
        rf" {{20}}{group.name}: {lag}; paused by alice since {since}: a bad deploy; 1 dead letters", line
    )
    assert any(line.startswith("consumers           analytics: ") for line in lines)


def test_without_kafka_all_the_rest_is_told(settings, emit, capsys, monkeypatch):
    (port,) = free_ports(1)
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "KAFKA": {"bootstrap.servers": f"127.0.0.1:{port}"}}
    emit("c1")
    pause("audit", by="alice", reason="x")
    started = time.monotonic()
    shown = status(capsys, no_lag=False)
    assert time.monotonic() - started < 5
    assert shown["pending"] == 1 and consumer_of(shown, "audit")["paused_by"] == "alice"
    assert consumer_of(shown, "audit")["lag_events"] is None
    assert "Connection refused" in consumer_of(shown, "audit")["lag_not_known"]
    monkeypatch.setattr(outbox_status, "LAG_SECONDS", 0.1)
    assert "analytics: lag not known: " in people(capsys, no_lag=False)["consumers"]


def test_kafka_is_left_alone_where_lag_is_not_wanted(settings, capsys):
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "KAFKA": {"bootstrap.servers": "127.0.0.1:1"}}
    started = time.monotonic()
    assert consumer_of(status(capsys), "audit")["lag_not_known"] == "not asked for"
    assert people(capsys)["consumers"] == "analytics: lag not known: not asked for"
    assert time.monotonic() - started < 2


def test_a_paused_consumer_is_a_metric():
    assert sample("consumer_paused", consumer="audit") == 0
    pause("audit", by="alice", reason="x")
    assert (sample("consumer_paused", consumer="audit"), sample("consumer_paused", consumer="analytics")) == (1, 0)
    resume("audit", by="alice")
    assert sample("consumer_paused", consumer="audit") == 0


def test_processed_marks_are_estimated_not_counted(capsys):
    def mark(count):
        ProcessedEvent.objects.mark("audit", [uuid.uuid4() for _ in range(count)])

    def rows():
        return sample("processed_events_rows")

    with connection.cursor() as cursor:
        # Never analysed: PostgreSQL knows -1 rows.
        cursor.execute("TRUNCATE events_outbox_processedevent")
        cursor.execute("SELECT reltuples FROM pg_class WHERE relname = 'events_outbox_processedevent'")
        assert cursor.fetchone() == (-1,)
        assert rows() == 0
        mark(300)
        cursor.execute("SELECT pg_stat_force_next_flush()")
        eventually(lambda: rows() == 300)
        mark(4700)
        cursor.execute("ANALYZE events_outbox_processedevent")
        assert rows() == 5000
        mark(5000)  # grown since
        assert 9000 < rows() < 11_000
        cursor.execute("SELECT pg_total_relation_size('events_outbox_processedevent')")
        assert sample("processed_events_bytes") == cursor.fetchone()[0] > 1_000_000
    shown = status(capsys)["processed_marks"]
    assert 9000 < shown["rows"] < 11_000 and shown["bytes"] > 1_000_000
    assert re.fullmatch(r"about (9|10),\d{3}, [\d.]+ MB", people(capsys)["processed marks"])


# The transaction that holds back its own events


@contextmanager
def session_like_ours(**options):
    """Another database session, as of another process."""
    parameters = connection.get_connection_params()
    for django_only in ("cursor_factory", "context"):
        parameters.pop(django_only, None)
    with psycopg.connect(**{**parameters, **options}) as session:
        yield session


INSERT = """INSERT INTO events_outbox_outboxevent (event_id, event_type, event_version, aggregate_id, tenant_id, topic,
                correlation_id, traceparent, tracestate, baggage, value)
            VALUES (gen_random_uuid(), 'a.created', 'v1', 'c1', 't1', 'default.events', '', '', '', '', 'x')"""


def test_the_transaction_that_holds_back_its_events_is_told(capsys):
    assert status(capsys)["open_transactions"] == 0 and status(capsys)["oldest_open_transaction"] is None
    assert people(capsys)["open transactions"] == "0"
    with session_like_ours(application_name="importer") as reader, session_like_ours() as younger:
        reader.execute("SELECT count(*) FROM events_outbox_outboxevent")  # an open transaction that wrote nothing
        with session_like_ours(application_name="importer") as writer:
            writer.execute(INSERT)
            writer.execute("SELECT\n  'and then it thought'")
            younger.execute(INSERT)
            shown = status(capsys)
            oldest = shown["oldest_open_transaction"]
            assert shown["pending"] == 0 and shown["open_transactions"] == 2
            assert oldest["pid"] == writer.info.backend_pid and oldest["application_name"] == "importer"
            assert oldest["state"] == "idle in transaction" and oldest["user"] == writer.info.user
            assert 0 < oldest["age_seconds"] < 60 and oldest["prepared"] is None
            assert "and then it thought" in oldest["query"]
            assert sample("outbox_oldest_open_transaction_age_seconds") >= oldest["age_seconds"]
            who = f"pid {writer.info.backend_pid} (importer {writer.info.user}), idle in transaction for "
            line = people(capsys)["open transactions"]
            assert line.startswith(f"2 holding back their events; the oldest: {who}")
            assert line.endswith("s: SELECT 'and then it thought'")
        younger.rollback()
        assert status(capsys)["open_transactions"] == 0
        assert sample("outbox_oldest_open_transaction_age_seconds") == 0


def test_a_query_is_not_shown_to_who_may_not_see_it(capsys):
    with connection.cursor() as cursor:
        cursor.execute("CREATE ROLE onlooker; GRANT SELECT ON ALL TABLES IN SCHEMA public TO onlooker")
        try:
            with session_like_ours() as writer:
                writer.execute(INSERT)
                cursor.execute("SET ROLE onlooker")
                oldest = status(capsys)["oldest_open_transaction"]
                assert oldest["pid"] == writer.info.backend_pid
                assert oldest["query"] == "<insufficient privilege>" and oldest["age_seconds"] is None
                assert people(capsys)["open transactions"].endswith("open: <insufficient privilege>")
                assert sample("outbox_oldest_open_transaction_age_seconds") == 0
        finally:
            cursor.execute("RESET ROLE; DROP OWNED BY onlooker; DROP ROLE onlooker")


def test_a_prepared_transaction_holds_back_its_events_too(tmp_path):
    """It has no session. On a server of its own: prepared transactions are switched off by default."""
    log = (tmp_path / "log").open("wb")
    server = EmbeddedPostgres(
        tmp_path / "postgres", output=log.fileno(), settings={**FORGETFUL, "max_prepared_transactions": "1"}
    )
    server.start()
    try:
        server.wait_until_ready()
        other = DatabaseWrapper({**connection.settings_dict, **dj_database_url.parse(server.url)}, "other")
        with other.cursor() as cursor:
            cursor.execute("CREATE TABLE events_outbox_outboxevent (id bigserial)")
            cursor.execute(
                """BEGIN; SAVEPOINT one; INSERT INTO events_outbox_outboxevent DEFAULT VALUES; RELEASE SAVEPOINT one;
                   PREPARE TRANSACTION 'two'"""
            )
        ours, connections[DEFAULT_DB_ALIAS] = connections[DEFAULT_DB_ALIAS], other
        try:
            (found,) = open_transactions()
        finally:
            connections[DEFAULT_DB_ALIAS] = ours
            other.close()
    finally:
        server.stop()
        log.close()
    assert (found.prepared, found.pid, found.query) == ("two", None, None)
    assert found.user == "postgres" and 0 <= found.age_seconds < 60


# Exit status


def exit_status(*arguments):
    """Of outbox_status, and what it says on standard error."""
    try:
        call_command("outbox_status", "--no-lag", *arguments)
    except CommandError as error:
        return error.returncode, str(error)
    return 0, ""


def test_exit_status_of_a_pending_event_that_is_too_old(emit, kafka):
    assert exit_status("--fail-if-older-than", "60s") == (0, "")
    row = emit("c1")
    with in_thread(Relay()):
        eventually(lambda: read_status().pending == 0)
        kafka.pause()
        row = emit("c1")
        eventually(lambda: read_status().last_error)
        assert exit_status("--fail-if-older-than", "60s") == (0, "")
        OutboxEvent.objects.filter(pk=row.pk).update(created_at=timezone.now() - timedelta(seconds=100))
        code, why = exit_status("--fail-if-older-than", "60s")
        assert code == 1 and re.match(r"the oldest of 1 pending events is 10\d s old, more than 60 s \(the relay", why)
        assert exit_status("--fail-if-older-than", "2m") == (0, "")
        assert exit_status() == (0, "")


def test_exit_status_when_nothing_leads_and_something_is_pending(emit):
    emit("c1")
    assert exit_status("--fail-if-older-than", "1h") == (1, "1 events are pending and no relay leads")
    assert exit_status("--json", "--fail-if-older-than", "1h")[0] == 1
    assert exit_status() == (0, "")


def test_an_open_transaction_is_no_failure(emit):
    with session_like_ours() as writer:
        writer.execute(INSERT)
        assert exit_status("--fail-if-older-than", "0s") == (0, "")


def test_exit_status_when_the_state_cannot_be_read():
    result = subprocess.run(
        [sys.executable, "manage.py", "outbox_status", "--fail-if-older-than", "60s"],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "DATABASE_URL": "postgresql://127.0.0.1:1/nowhere"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2 and "the state cannot be read" in result.stderr
    assert "Traceback" not in result.stderr


def test_commands_say_what_is_wrong(kafka):
    with pytest.raises(CommandError, match="registered: analytics, audit, knowledge, notification"):
        call_command("consume", "nobody")


def test_create_topics_again_changes_nothing(kafka, capsys):
    call_command("create_topics")
    assert "exist" in capsys.readouterr().out or kafka.kind == "embedded"


@pytest.mark.apache_kafka
def test_a_topic_with_too_few_partitions_is_an_error(kafka, settings):
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "TOPIC_PARTITIONS": 7}
    with pytest.raises(CommandError, match="6 partitions, fewer than the 7"):
        call_command("create_topics")


def test_services_are_found_in_the_environment_first(tmp_path, monkeypatch):
    monkeypatch.setattr("voicehelper.services.DATA_DIR", tmp_path)
    monkeypatch.setattr("voicehelper.services.SERVICES_FILE", tmp_path / "services.json")
    for name in ("DATABASE_URL", "KAFKA_BOOTSTRAP_SERVERS"):
        monkeypatch.delenv(name)
    assert find_services() == Services()
    written = Services("postgresql://a/b", "127.0.0.1:9", kafka_is_embedded=True)
    write_services(written)
    assert find_services() == written
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "kafka:9092")
    assert find_services() == Services("postgresql://a/b", "kafka:9092", kafka_is_embedded=False)
    (tmp_path / "services.json").write_text("{")
    with pytest.raises(ValueError, match="delete it and run `make up` again"):
        find_services()
