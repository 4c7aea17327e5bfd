"""`consume` as it is run: listing, several consumers in a process, several processes with their supervision."""

import json
import random
import signal
import time
from collections import Counter
from contextlib import suppress

import httpx
import psutil
import pytest
from django.core.management import CommandError, call_command
from django.db import connection

from events_outbox import pauses
from events_outbox.models import OperatorAction, OutboxEvent
from events_outbox.relay import Relay
from tests.events_outbox.conftest import eventually
from tests.faults.conftest import Processes, kill_hard
from tests.monitoring.conftest import sample
from tests.services import free_ports
from tests.topics import TopicReader
from voicehelper.identity.models import Tenant

pytestmark = pytest.mark.django_db(transaction=True)

CONSUMERS = ("counting", "other", "strict")
STALE_SECONDS = 3


class Consume(Processes):
    """Starts `consume` with the consumers of `tests.events_outbox.consuming`, which begin at the topics' end."""

    def __init__(self, log_dir, kafka):
        super().__init__(log_dir)
        test_group = str(random.randrange(10**9))
        for name in CONSUMERS:
            reader = TopicReader(kafka.bootstrap_servers, ["conversation.events"], group_id=f"{name}-{test_group}")
            reader.commit_start()
            reader.close()
        self.directory = log_dir / "temporary"
        self.directory.mkdir()
        self.environment |= {
            "DJANGO_SETTINGS_MODULE": "tests.events_outbox.consuming.settings",
            "TEST_GROUP": test_group,
            "TEST_STALE_SECONDS": str(STALE_SECONDS),
            "TEST_STOP_SECONDS": "20",
            "TMPDIR": str(self.directory),
        }

    def start(self, *arguments, stop_seconds=20):
        self.environment["TEST_STOP_SECONDS"] = str(stop_seconds)
        (self.port,) = free_ports(1)
        return self.manage("consume", *arguments, "--metrics-port", self.port)

    def get(self, path):
        """Answer of the metrics port; None while there is none."""
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=5)
        except httpx.TransportError:
            return None

    def livez(self):
        answer = self.get("/livez")
        return answer and answer.status_code

    def sample(self, name, **labels):
        answer = self.get("/metrics")
        return answer and sample(answer.text, name, **labels)

    def logs(self):
        return "\n".join(log.read_text() for log in sorted(self._log_dir.glob("*.log")))

    def end(self):
        """End what was started, also workers that a failed test has left: their transactions would block the next."""
        super().end()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("TEST_GROUP") == self.environment["TEST_GROUP"]:
                    process.kill()

    def lines(self):
        return [json.loads(line) for line in self.logs().splitlines() if line.startswith("{")]


@pytest.fixture
def consume(kafka, tmp_path, transactional_db, caplog):
    caplog.set_level("WARNING", "httpx")
    consume = Consume(tmp_path, kafka)
    yield consume
    consume.end()


@pytest.fixture
def publish(emit):
    """Emit and publish events, one for each aggregate."""

    def publish(*aggregates):
        for aggregate in aggregates:
            emit(aggregate)
        Relay().run(until_empty=True)

    return publish


def keys(count):
    return [f"c{number}" for number in range(count)]


def marks(consumer="counting"):
    """What was handled: the handling process of each event. Fails when one was handled twice."""
    handled = [name.split() for name in Tenant.objects.values_list("name", flat=True)]
    handled = [(event_id, int(pid)) for name, pid, event_id in handled if name == consumer]
    assert all(times == 1 for times in Counter(event_id for event_id, _ in handled).values()), "handled twice"
    return dict(handled)


def all_handled(consumer="counting"):
    return len(marks(consumer)) == OutboxEvent.objects.count()


def workers_of(parent):
    return psutil.Process(parent.pid).children()


def are_gone(workers):
    return not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)


def both_work(consume, parent, publish):
    """Publish until both workers have handled some."""

    def handled_by_both():
        before = set(marks())
        publish(*keys(12))
        eventually(all_handled, 30)
        pids = {pid for event_id, pid in marks().items() if event_id not in before}
        return pids == {worker.pid for worker in workers_of(parent)} and len(pids) == 2

    eventually(handled_by_both, 40)


# -- what needs no processes ---------------------------------------------------------------------------------------


def output_of(capsys, *arguments):
    call_command(*arguments)
    return capsys.readouterr().out


def test_list_shows_consumers_and_handlers(capsys):
    pauses.pause("audit", by="alice", reason="the disk is full")
    listed = json.loads(output_of(capsys, "consume", "--list", "--json"))
    assert [consumer["name"] for consumer in listed] == ["analytics", "audit", "knowledge", "notification"]
    count = "voicehelper.analytics.event_handlers.count"
    assert listed[0] == {
        "name": "analytics",
        "group_id": "analytics-service",
        "topics": ["conversation.events"],
        "on_failure": "skip",
        "paused": False,
        "handlers": [
            {"event_type": f"conversation.{happened}", "version": None, "is_batch": True, "function": count}
            for happened in ("completed", "created", "failed", "message.sent")
        ],
    }
    assert listed[1]["paused"] is True

    text = output_of(capsys, "consume", "--list", "audit", "notification")
    assert "analytics-service" not in text
    assert "by alice: the disk is full" in text
    assert "*  batch   voicehelper.audit.event_handlers.record" in text
    assert "conversation.created       single  voicehelper.notifications.event_handlers.tell" in text


def test_list_needs_neither_kafka_nor_a_database(consume):
    consume.environment |= {
        "DATABASE_URL": "postgresql://127.0.0.1:1/nowhere",
        "KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1",
    }
    listed = json.loads(consume.output("consume", "--list", "--json"))
    assert {consumer["name"]: consumer["paused"] for consumer in listed}["strict"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name the consumers to run"),
        (("analytics", "nope"), "no consumer named nope; registered: analytics, audit, knowledge, notification"),
        (("analytics", "analytics"), "analytics is named twice"),
        (("analytics", "--json"), "--json goes with --list"),
        (("analytics", "--workers", "2"), "--workers starts its own command line again"),
        (("analytics", "--workers", "0"), "'0' is not a whole number above 0"),
    ],
)
def test_wrong_calls_are_told_so(arguments, message):
    with pytest.raises(CommandError, match=message):
        call_command("consume", *arguments)


def test_pause_and_resume(capsys):
    paused = output_of(capsys, "consumer_pause", "audit", "--reason", "the disk is full")
    assert paused.startswith("audit is paused") and pauses.is_paused("audit")
    again = output_of(capsys, "consumer_pause", "audit", "--reason", "another")
    assert "paused already, since" in again and "the disk is full" in again
    assert output_of(capsys, "consumer_resume", "audit").startswith("audit goes on")
    assert not pauses.is_paused("audit")
    assert output_of(capsys, "consumer_resume", "audit") == "audit is not paused\n"
    assert [a.action for a in OperatorAction.objects.order_by("id")] == ["consumer.paused", "consumer.resumed"]
    for command in (("consumer_pause", "nope", "--reason", "x"), ("consumer_resume", "nope")):
        with pytest.raises(CommandError, match="no consumer named nope; registered: analytics"):
            call_command(*command)


# -- several consumers in one process ------------------------------------------------------------------------------


@pytest.mark.apache_kafka
def test_several_consumers_share_a_process_and_its_port(consume, publish):
    process = consume.start("counting", "other")
    publish(*keys(10))
    eventually(lambda: all_handled("counting") and all_handled("other"), 40)
    assert set(marks("counting").values()) == set(marks("other").values()) == {process.pid}
    assert consume.livez() == 200
    assert [consume.sample("consumer_events_handled_total", consumer=name) for name in ("counting", "other")] == [
        10,
        10,
    ]
    process.terminate()
    assert process.wait(20) == 0
    services = {(line["message"], line["service"]) for line in consume.lines() if "handling for" in line["message"]}
    assert services == {(f"handling for {name}", f"voicehelper-{name}") for name in ("counting", "other")}


@pytest.mark.apache_kafka
@pytest.mark.parametrize("workers", [(), ("--workers", 2)])
def test_until_idle_ends_all(consume, publish, workers):
    publish(*keys(10))
    process = consume.start("counting", "other", "--until-idle", 1, *workers)
    assert process.wait(60) == 0
    assert all_handled("counting") and all_handled("other")
    assert "starting it again" not in consume.logs()


@pytest.mark.apache_kafka
def test_one_that_stops_at_an_event_stops_the_others_and_is_named(consume, publish):
    process = consume.start("other", "strict")
    publish("good", "bad")
    assert process.wait(40) == 1
    assert "CommandError: strict stopped, as on_failure says: conversation.created" in consume.logs()
    assert "no good" in consume.logs()


# -- several processes ---------------------------------------------------------------------------------------------


@pytest.mark.apache_kafka
def test_workers_share_the_work_and_one_port_and_are_replaced_when_they_die(consume, publish):
    parent = consume.start("counting", "other", "--workers", 2)
    both_work(consume, parent, publish)
    eventually(lambda: all_handled("other"))
    count = OutboxEvent.objects.count()
    for name in ("counting", "other"):
        assert consume.sample("consumer_events_handled_total", consumer=name) == count
    text = consume.get("/metrics").text
    assert text.count("\noutbox_pending_events ") == 1  # the database's state, not once a process
    assert 'consumer_worker_restarts_total{worker="2"} 0.0' in text
    assert consume.get("/health").status_code == 200
    eventually(lambda: consume.livez() == 200)

    frozen, killed = workers_of(parent)
    frozen.suspend()
    eventually(lambda: consume.livez() == 503)
    one_of = [[f"counting in worker {number}", f"other in worker {number}"] for number in (1, 2)]
    eventually(lambda: consume.get("/livez").json().get("loops") in one_of)
    frozen.resume()
    eventually(lambda: consume.livez() == 200)

    publish(*keys(200))
    killed.kill()
    eventually(lambda: consume.livez() == 503 and len(workers_of(parent)) == 1)  # before it is started again
    both_work(consume, parent, publish)
    assert consume.livez() == 200
    assert sum(consume.sample("consumer_worker_restarts_total", worker=worker) for worker in "12") == 1
    # What the dead one had counted is there still; it may have died between an effect and counting it.
    assert consume.sample("consumer_events_handled_total", consumer="counting") >= count
    assert list(consume.directory.rglob(f"*_{killed.pid}.db")) == []
    died = [line for line in consume.lines() if line["message"] == "worker died, starting it again"]
    assert [line["ended"] for line in died] == ["killed by SIGKILL"]

    workers = workers_of(parent)
    parent.terminate()
    assert parent.wait(20) == 0
    assert are_gone(workers)
    assert list(consume.directory.iterdir()) == []


@pytest.mark.apache_kafka
def test_workers_do_not_outlive_a_killed_parent(consume, publish):
    parent = consume.start("counting", "--workers", 2, stop_seconds=1)
    publish("slow", *keys(10))
    eventually(lambda: OutboxEvent.objects.count() and workers_of(parent) and waits_in_a_handler(), 40)
    workers = workers_of(parent)
    assert list(consume.directory.iterdir()) != []
    kill_hard(parent)
    eventually(lambda: are_gone(workers))
    assert list(consume.directory.iterdir()) == []


def waits_in_a_handler():
    """Whether the handler of the slow event holds its transaction open."""
    with connection.cursor() as cursor:
        cursor.execute(
            """SELECT EXISTS (SELECT FROM pg_stat_activity
                WHERE state = 'idle in transaction' AND now() - state_change > interval '0.5 s'
                  AND datname = current_database())"""
        )
        return cursor.fetchone()[0]


@pytest.mark.apache_kafka
def test_a_second_signal_ends_all_at_once(consume, publish):
    parent = consume.start("counting", "--workers", 1)
    publish("slow")
    eventually(waits_in_a_handler, 40)
    workers = workers_of(parent)
    parent.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert parent.poll() is None  # it waits for the handler
    parent.send_signal(signal.SIGINT)
    assert parent.wait(5) == 128 + signal.SIGINT
    eventually(lambda: are_gone(workers), 5)


@pytest.mark.apache_kafka
def test_a_worker_that_does_not_stop_is_killed(consume, publish):
    parent = consume.start("counting", "--workers", 1, stop_seconds=1)
    publish("stuck")
    eventually(waits_in_a_handler, 40)
    workers = workers_of(parent)
    parent.terminate()
    assert parent.wait(10) == 0
    assert are_gone(workers)
    assert "worker did not stop in time" in consume.logs()
    assert marks() == {}  # rolled back: to be handled again


@pytest.mark.apache_kafka
def test_a_worker_that_stops_at_an_event_ends_all(consume, publish):
    consume.environment["TEST_PARTITIONS"] = "1"
    parent = consume.start("strict", "--workers", 2)
    publish("bad")
    assert parent.wait(60) == 1
    log = consume.logs()
    assert "CommandError: strict stopped, as on_failure says: conversation.created" in log
    assert "starting it again" not in log
    assert "strict has 1 partitions: workers beyond that have nothing to do" in log
