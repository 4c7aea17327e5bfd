"""Heartbeats: what relays and consumers say of themselves, whatever becomes of them and of the database."""

import os
import re
import signal
import socket
import time
from datetime import timedelta

import psycopg
import pytest
from django.db import connection, connections
from django.db.models import F
from django.urls import reverse
from django.utils import timezone

from events_outbox import heartbeats
from events_outbox.consumer import ConsumerProcess
from events_outbox.heartbeats import Heartbeats, Kind, State, Vitals
from events_outbox.models import Worker
from events_outbox.relay import Relay
from tests.events_outbox.conftest import eventually, in_thread
from tests.faults.conftest import Processes, kill_hard, processes  # noqa: F401  (a fixture)
from tests.faults.proxy import Proxy
from tests.services import free_ports

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def quick(monkeypatch):
    """Look and speak more often than in real life."""
    monkeypatch.setattr(heartbeats, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(heartbeats, "BEAT_SECONDS", 0.1)


def the_worker():
    return Worker.objects.with_life().get()


def states():
    return sorted(Worker.objects.values_list("state", flat=True))


def age(**row):
    """Let the rows be so much older."""
    Worker.objects.update(**{name: F(name) - by for name, by in row.items()})


# -- what is written -----------------------------------------------------------------------------------------------


def test_a_row_from_the_start_to_the_stop(quick):
    vitals = Vitals(Kind.CONSUMER, "audit", 9102)
    with Heartbeats([vitals]):
        row = eventually(lambda: Worker.objects.with_life().first())
        assert (row.kind, row.name, row.host, row.pid) == ("consumer", "audit", socket.gethostname(), os.getpid())
        assert (row.state, row.last_error, row.last_error_at, row.stopped_at) == ("starts", "", None, None)
        assert row.is_alive and row.metrics_port == 9102
        vitals.assignment = {("t", 10), ("t", 2)}
        vitals.rate.count(7)
        vitals.failed(ValueError("bad \x00 byte"))
        vitals.say(State.WORKS)
        row = eventually(lambda: Worker.objects.filter(state="works").first())
        assert (row.events_total, row.last_error) == (7, "ValueError: bad \ufffd byte")
        assert row.assignment == ["t/10", "t/2"]
        seen_at, since = row.seen_at, row.state_since
        row = eventually(lambda: Worker.objects.filter(seen_at__gt=seen_at).first())
        assert row.state_since == since and row.events_per_second > 0
    row = the_worker()
    assert row.state == "stopped" and row.stopped_at >= row.seen_at and not row.is_alive
    assert row.last_error == "ValueError: bad \ufffd byte"  # also afterwards


def test_each_start_is_a_worker_of_its_own(quick):
    for _ in range(2):  # the same host and pid, as in containers that start again
        with Heartbeats([Vitals(Kind.RELAY, "relay")]):
            pass
    assert states() == ["stopped", "stopped"]


def test_a_change_of_state_is_written_at_once_and_no_more_than_that(monkeypatch):
    monkeypatch.setattr(heartbeats, "LOOK_SECONDS", 0.02)  # the next heartbeat is due in five seconds
    vitals = Vitals(Kind.RELAY, "relay")
    with Heartbeats([vitals]):
        seen_at = eventually(lambda: Worker.objects.first()).seen_at
        vitals.rate.count(1)
        vitals.say(State.STARTS)
        time.sleep(0.2)  # ten looks
        assert Worker.objects.get().seen_at == seen_at
        vitals.say(State.LEADS)
        eventually(lambda: states() == ["leads"], 2)


def test_a_worker_that_does_not_tick_hangs(quick, monkeypatch):
    monkeypatch.setattr(heartbeats, "STALE_AFTER_SECONDS", 0.3)
    vitals = Vitals(Kind.CONSUMER, "audit")
    vitals.say(State.WORKS)
    with Heartbeats([vitals]):
        eventually(lambda: states() == ["hangs"])
        tick = vitals.with_tick(lambda: None)
        eventually(lambda: tick() or states() == ["works"])


def test_what_ends_a_relay_is_its_last_error():
    relay = Relay()
    with pytest.raises(RuntimeError), relay.vitals.life():
        raise RuntimeError("out of memory")
    assert (relay.vitals.state, relay.vitals.last_error) == (State.STOPPED, "RuntimeError: out of memory")


def test_who_was_not_seen_is_not_alive_and_after_a_day_is_forgotten(quick):
    with Heartbeats([Vitals(Kind.RELAY, "relay")]):
        pass
    Worker.objects.update(stopped_at=None)
    assert Worker.objects.alive().count() == 1
    age(seen_at=timedelta(seconds=Worker.ALIVE_SECONDS + 1))
    assert not Worker.objects.alive().exists() and not the_worker().is_alive
    old = the_worker().id
    age(seen_at=timedelta(days=1))
    with Heartbeats([Vitals(Kind.RELAY, "relay")]):
        eventually(lambda: old not in set(Worker.objects.values_list("id", flat=True)))
    assert states() == ["stopped"]


def test_a_row_that_was_pruned_comes_again(quick):
    with Heartbeats([Vitals(Kind.RELAY, "relay")]):
        eventually(Worker.objects.exists)
        started_at = Worker.objects.get().started_at
        Worker.objects.all().delete()
        row = eventually(lambda: Worker.objects.first())
        assert abs(row.started_at - started_at) < timedelta(seconds=1)


def test_a_heartbeat_changes_no_index():
    def updates():
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_stat_force_next_flush(), pg_stat_clear_snapshot()")
            cursor.execute(
                "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'events_outbox_worker'"
            )
            return cursor.fetchone()

    beats = Heartbeats([Vitals(Kind.RELAY, "relay")])
    before = updates()
    for _ in range(100):
        beats._beat_due = 0.0
        beats._look()
    beats._hang_up()  # its statistics are out when it is gone
    after = eventually(lambda: (now := updates())[0] - before[0] == 99 and now)
    assert after[1] - before[1] == 99


# -- a database that is away or frozen ---------------------------------------------------------------------------------


@pytest.fixture
def far_database(monkeypatch):
    """The database of the heartbeats behind a proxy, which can freeze it and cut it off."""
    with psycopg.connect(**plain_parameters()) as session:
        directory = session.info.get_parameters().get("host") or session.info.host
        server = (
            f"{directory}/.s.PGSQL.{session.info.port}"
            if directory.startswith("/")
            else (session.info.host, session.info.port)
        )
    proxy = Proxy(server)
    real = heartbeats.session_parameters

    def through_proxy(application_name):
        return real(application_name) | {"host": "127.0.0.1", "port": proxy.port}

    monkeypatch.setattr(heartbeats, "session_parameters", through_proxy)
    yield proxy
    proxy.close()


def plain_parameters():
    parameters = connections["default"].get_connection_params()
    return {name: parameters[name] for name in ("dbname", "user", "host", "port", "password") if name in parameters}


def test_a_database_that_is_away_is_logged_once_and_comes_back(quick, far_database, caplog):
    vitals = Vitals(Kind.CONSUMER, "audit")
    with Heartbeats([vitals]):
        eventually(Worker.objects.exists)
        is_there, far_database.server = far_database.server, "/nowhere"
        far_database.cut()
        eventually(lambda: "heartbeat not written" in caplog.messages)
        vitals.say(State.WORKS)
        time.sleep(0.5)  # several heartbeats
        assert caplog.messages.count("heartbeat not written") == 1
        assert states() == ["starts"]
        far_database.server = is_there
        eventually(lambda: states() == ["works"])
        assert "heartbeat written again" in caplog.messages


def test_a_frozen_database_holds_no_stop_up(quick, far_database):
    vitals = Vitals(Kind.CONSUMER, "audit")
    beats = Heartbeats([vitals])
    with beats:
        eventually(Worker.objects.exists)
        far_database.to_client.held = True
        vitals.say(State.WORKS)
        time.sleep(0.3)  # it is being written
        stopping = time.monotonic()
    assert time.monotonic() - stopping < heartbeats.FAREWELL_SECONDS + 0.5
    far_database.heal()
    beats._thread.join(20)
    assert not beats._thread.is_alive()


def test_a_heartbeat_that_waits_in_the_database_is_given_up(quick, monkeypatch, caplog):
    monkeypatch.setattr(heartbeats, "ANSWER_SECONDS", 1)
    with connection.cursor() as cursor:
        cursor.execute("BEGIN; LOCK TABLE events_outbox_worker IN ACCESS EXCLUSIVE MODE")
        with Heartbeats([Vitals(Kind.RELAY, "relay")]):
            eventually(lambda: "heartbeat not written" in caplog.messages, 5)
            cursor.execute("ROLLBACK")
            eventually(Worker.objects.exists)


# -- consumers and relays in this process --------------------------------------------------------------------------


def test_a_relay_says_what_it_does(quick, kafka, emit):
    for number in range(20):
        emit("c1", number)
    first, second = Relay(), Relay()
    with Heartbeats([first.vitals, second.vitals]), in_thread(first):
        eventually(lambda: states() == ["leads", "starts"])
        eventually(lambda: Worker.objects.filter(state="leads", events_total=20).exists())
        with in_thread(second):
            eventually(lambda: states() == ["leads", "stands by"])
            first.stop()
            eventually(lambda: states() == ["leads", "stopped"])
    assert states() == ["stopped", "stopped"]


def test_a_relay_waits_for_kafka_and_says_so(quick, kafka, emit, topic_reader):
    relay = Relay()
    with Heartbeats([relay.vitals]), in_thread(relay):
        emit("c1")
        topic_reader.read(1)
        kafka.pause()
        emit("c1", 1)
        eventually(lambda: states() == ["waits for Kafka"])
        kafka.resume()
        eventually(lambda: states() == ["leads"])


def test_a_consumer_says_what_it_does(quick, kafka, emit, make_consumer):
    # From here on: what others left in the topic would be its last error, or among its events.
    consumer = make_consumer(topics=["conversation.events"], start_at="latest")
    failures = iter(range(2))  # in the batch, and then alone

    @consumer.handles("conversation.created")
    def handle(event):
        if event.metadata.get("number") == "1" and next(failures, None) is not None:
            raise ValueError("not yet")

    process = ConsumerProcess(consumer)
    with Heartbeats([process.vitals]), in_thread(process):
        row = eventually(lambda: Worker.objects.filter(state="works").first(), 40)
        assert row.assignment == [f"conversation.events/{n}" for n in range(6)]
        for number in range(3):
            emit("c1", number)
        Relay().run(until_empty=True)
        eventually(lambda: Worker.objects.get().events_total >= 3, 40)
        row = eventually(lambda: Worker.objects.exclude(last_error="").first())
        assert row.last_error == "ValueError: not yet"
        assert row.last_error_at <= timezone.now()
    assert states() == ["stopped"]
    assert Worker.objects.get().assignment == []


# -- processes -----------------------------------------------------------------------------------------------------


def row_of(process):
    return Worker.objects.with_life().filter(pid=process.pid).first()


def test_leader_and_standby_and_what_killing_and_stopping_leave(processes):  # noqa: F811
    (port,) = free_ports(1)
    leader = processes.manage("relay_outbox", "--metrics-port", port)
    eventually(lambda: (row := row_of(leader)) and row.state == "leads", 60)
    standby = processes.manage("relay_outbox")
    eventually(lambda: (row := row_of(standby)) and row.state == "stands by", 60)
    assert (row_of(leader).metrics_port, row_of(standby).metrics_port) == (port, None)
    kill_hard(leader)
    eventually(lambda: row_of(standby).state == "leads")
    dead = row_of(leader)
    assert (dead.state, dead.stopped_at) == ("leads", None)
    Worker.objects.filter(pid=leader.pid).update(seen_at=F("seen_at") - timedelta(seconds=Worker.ALIVE_SECONDS - 1))
    eventually(lambda: not row_of(leader).is_alive)  # nobody renews it
    assert list(Worker.objects.alive().values_list("pid", flat=True)) == [standby.pid]
    standby.send_signal(signal.SIGTERM)
    assert standby.wait(20) == 0
    assert row_of(standby).state == "stopped" and row_of(standby).stopped_at
    assert not Worker.objects.alive().exists()


def test_each_consumer_of_each_process_has_a_row(processes):  # noqa: F811
    parent = processes.manage("consume", "audit", "notification", "--workers", 2)
    eventually(lambda: Worker.objects.count() == 4, 60)
    rows = list(Worker.objects.all())
    assert sorted(row.name for row in rows) == ["audit", "audit", "notification", "notification"]
    pids = {row.pid for row in rows}
    assert len(pids) == 2 and parent.pid not in pids
    parent.terminate()
    assert parent.wait(30) == 0
    assert states() == ["stopped"] * 4


# -- the list ------------------------------------------------------------------------------------------------------


@pytest.fixture
def workers(django_user_model):
    now = timezone.now()
    common = {"host": "box", "pid": 7}
    Worker.objects.create(kind="relay", name="relay", state="leads", events_per_second=12.3, **common)
    Worker.objects.create(
        kind="consumer", name="audit", state="works", assignment=["t/0", "t/1"], last_error="ValueError: no",
        last_error_at=now - timedelta(minutes=3), events_total=1234, metrics_port=9102, **common,
    )  # fmt: skip
    Worker.objects.create(kind="relay", name="relay", state="stands by", seen_at=now - timedelta(minutes=2), **common)
    Worker.objects.create(
        kind="consumer", name="analytics", state="stopped", seen_at=now, stopped_at=now, host="other", pid=8
    )


def test_the_list_shows_who_lives_first_and_who_was_not_seen(workers, admin_client, django_assert_max_num_queries):
    with django_assert_max_num_queries(8):
        answer = admin_client.get(reverse("admin:events_outbox_worker_changelist"))
    text = answer.content.decode()
    shown = [(row.name, row.is_alive) for row in answer.context["cl"].result_list]
    assert shown == [("relay", True), ("audit", True), ("relay", False), ("analytics", False)]
    for part in (
        "box:7",
        "leads",
        r"12\.3",
        r"not seen for 2 min",
        r"3 min[ \ds]* ago: ValueError",
    ):
        assert re.search(part, text), part


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("alive=yes", ["relay", "audit"]),
        ("alive=no", ["relay", "analytics"]),
        ("kind=consumer", ["audit", "analytics"]),
        ("name=audit", ["audit"]),
    ],
)
def test_the_list_is_filtered(workers, admin_client, query, names):
    answer = admin_client.get(reverse("admin:events_outbox_worker_changelist") + "?" + query)
    assert [row.name for row in answer.context["cl"].result_list] == names


def test_the_page_of_a_worker(workers, admin_client):
    worker = Worker.objects.get(name="audit")
    url = reverse("admin:events_outbox_worker_change", args=[worker.pk])
    text = admin_client.get(url).content.decode()
    for part in ("box:7", "works", "t/0, t/1", "1,234", "9102", "ValueError: no"):
        assert part in text
    assert admin_client.post(url, {"name": "x"}).status_code == 403
    Worker.objects.update(seen_at=F("seen_at") - timedelta(minutes=2))
    assert re.search(r"not seen for 2 min[ \ds]*; works then", admin_client.get(url).content.decode())
