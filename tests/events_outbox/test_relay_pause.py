"""The relay's pause: whoever leads publishes nothing, says so, and goes on in order when it is resumed."""

import json
import time

import httpx
import pytest
from django.core.management import call_command
from django.core.management.base import CommandError

from events_outbox.leader import Leader, open_session
from events_outbox.models import OperatorAction, RelayCursor, UndeliverableEvent, Worker
from events_outbox.pauses import pause_relay, relay_pause, resume_relay
from events_outbox.relay import Relay
from events_outbox.status import read_status
from events_outbox.undeliverable import redrive, with_ids
from tests.events_outbox.conftest import counted, eventually, in_thread
from tests.events_outbox.test_relay import numbers_by_key
from tests.events_outbox.test_status import people, sample
from tests.faults.conftest import kill_hard, processes  # noqa: F401  (a fixture)
from tests.services import free_ports

pytestmark = pytest.mark.django_db(transaction=True)

NOTICED_SECONDS = 1.5
"""About a second, on a busy machine."""


def pause(reason="maintenance"):
    assert pause_relay(by="alice", reason=reason)


def published_so_far():
    return counted("outbox_events_published_total", topic="conversation.events")


def is_paused_by(relay):
    return relay.vitals.state == "paused"


def test_a_paused_leader_publishes_nothing_and_then_everything_in_order(emit, kafka, topic_reader):
    relay, ticks = Relay(on_tick=lambda: ticks.append(None)), []
    with in_thread(relay):
        emit("c1", 0)
        topic_reader.read(1)
        leader = read_status().leader
        pause()
        eventually(lambda: is_paused_by(relay), NOTICED_SECONDS)
        before = len(ticks)
        for number in range(1, 30):
            emit("c1", number)
        eventually(lambda: len(ticks) > before + 8)  # the loop goes round, as /livez wants it
        status = read_status()
        assert status.pending == 29 and status.leader == leader and status.heartbeat_age_seconds < 3
        assert status.last_error == "" and status.relay_paused_by == "alice"
        assert resume_relay(by="alice")
        resumed = time.monotonic()
        eventually(lambda: read_status().pending == 0)
        assert time.monotonic() - resumed < NOTICED_SECONDS
        assert relay.vitals.state == "leads" and relay.vitals.last_error == ""
    assert numbers_by_key(topic_reader.read_rest()) == {"c1": list(range(30))}


def test_the_pause_takes_hold_within_a_window(emit, kafka, topic_reader):
    for number in range(3000):
        emit("c1", number)
    relay = Relay(batch_size=1)
    with in_thread(relay):
        eventually(lambda: read_status().pending < 3000)
        pause()
        eventually(lambda: is_paused_by(relay), NOTICED_SECONDS)
        pending = read_status().pending
        assert 0 < pending < 3000 and RelayCursor.read().window is not None
        time.sleep(0.5)
        assert read_status().pending == pending
        resume_relay(by="alice")
        eventually(lambda: read_status().pending == 0, 60)
    assert numbers_by_key(topic_reader.read_rest()) == {"c1": list(range(3000))}


def test_a_relay_that_comes_to_lead_stays_paused(emit, kafka):
    pause()
    emit("c1")
    relay = Relay()
    before = published_so_far()
    with in_thread(relay):
        eventually(lambda: is_paused_by(relay))
        with in_thread(second := Relay()):
            eventually(lambda: second.vitals.state == "stands by")
            relay.stop()
            eventually(lambda: is_paused_by(second))
    assert read_status().pending == 1 and published_so_far() == before


def test_a_paused_relay_stops_when_told_to_and_publishes_nothing_for_that(emit, kafka):
    pause()
    emit("c1")
    before = published_so_far()
    with in_thread(relay := Relay()):
        eventually(lambda: is_paused_by(relay))
        stopping = time.monotonic()
    assert time.monotonic() - stopping < 2
    assert read_status().pending == 1 and published_so_far() == before


def test_a_leader_that_waits_for_the_broker_goes_by_it_too(emit, kafka, topic_reader):
    relay = Relay()
    with in_thread(relay):
        emit("c1", 0)
        topic_reader.read(1)
        kafka.pause()
        emit("c1", 1)
        eventually(lambda: relay.vitals.state == "waits for Kafka")
        pause()
        eventually(lambda: is_paused_by(relay), 10)
        kafka.resume()
        emit("c1", 2)
        time.sleep(2)  # a producer that had kept it would deliver it now
        assert read_status().pending == 2 and read_status().last_error == ""
        resume_relay(by="alice")
        eventually(lambda: read_status().pending == 0)
    # What the frozen broker had been sent already comes again.
    assert numbers_by_key(topic_reader.read_rest()) == {"c1": [0, 1, 2]}


def test_nothing_is_redriven_meanwhile(emit, kafka):
    parked = emit("c1")
    Relay().run(until_empty=True)
    UndeliverableEvent.objects.create(event=parked, topic=parked.topic, aggregate_id="c1", reason="X", error="x")
    pause()
    redrive(with_ids([UndeliverableEvent.objects.get().pk]), by="alice")
    with in_thread(relay := Relay()):
        eventually(lambda: is_paused_by(relay))
        time.sleep(1.2)  # it looks once a second
        assert UndeliverableEvent.objects.exists()
        resume_relay(by="alice")
        eventually(lambda: not UndeliverableEvent.objects.exists())


def test_a_save_tells_the_leader(kafka):
    with open_session() as session:
        leader = Leader(session)
        assert leader.try_lead() and leader.paused is None
        pause("the disk is full")
        leader.save()
        assert leader.paused == "alice: the disk is full"
        resume_relay(by="alice")
        leader.save()
        assert leader.paused is None


def output_of(capsys, *command, **options):
    call_command(*command, **options)
    return capsys.readouterr().out


def test_the_commands_and_their_trail(capsys):
    assert output_of(capsys, "relay_pause", "--reason", "the disk is full").startswith("the relay is paused:")
    again = output_of(capsys, "relay_pause", "--reason", "another")
    assert "paused already, since" in again and again.endswith("the disk is full\n")
    assert relay_pause().reason == "the disk is full"
    assert output_of(capsys, "relay_resume").startswith("the relay goes on")
    assert output_of(capsys, "relay_resume") == "the relay is not paused\n"
    assert relay_pause() is None
    trail = [(a.action, a.subject, a.reason) for a in OperatorAction.objects.order_by("id")]
    assert trail == [("relay.paused", "relay", "the disk is full"), ("relay.resumed", "relay", "")]


def test_the_status_says_so(emit, capsys):
    assert "paused" not in people(capsys) and sample("outbox_relay_paused") == 0
    pause("the disk is full")
    assert people(capsys)["paused"].startswith("by alice since 20")
    assert people(capsys)["paused"].endswith(": the disk is full")
    shown = json.loads(output_of(capsys, "outbox_status", "--json", "--no-lag"))
    assert (shown["relay_paused_by"], shown["relay_pause_reason"]) == ("alice", "the disk is full")
    assert shown["relay_paused_at"]
    assert sample("outbox_relay_paused") == 1
    call_command("outbox_status", "--no-lag", "--fail-if-older-than", "60s")  # nothing waits: it is well
    emit("c1")
    why = r"the oldest of 1 pending .* \(the relay is paused by alice: the disk is full\)"
    with pytest.raises(CommandError, match=why):
        call_command("outbox_status", "--no-lag", "--fail-if-older-than", "0s")


def test_processes_go_by_it_too(processes, emit, topic_reader):  # noqa: F811
    (port,) = free_ports(1)
    leader = processes.manage("relay_outbox", "--metrics-port", port)
    eventually(lambda: Worker.objects.filter(state="leads", pid=leader.pid).exists(), 60)
    standby = processes.manage("relay_outbox")
    eventually(lambda: Worker.objects.filter(state="stands by").exists(), 60)
    processes.output("relay_pause", "--reason", "maintenance")
    eventually(lambda: Worker.objects.filter(state="paused", pid=leader.pid).exists(), 5)
    for number in range(10):
        emit("c1", number)
    assert httpx.get(f"http://127.0.0.1:{port}/livez").status_code == 200
    assert "outbox_relay_paused 1.0" in httpx.get(f"http://127.0.0.1:{port}/metrics").text
    kill_hard(leader)
    eventually(lambda: Worker.objects.filter(state="paused", pid=standby.pid).exists())
    assert read_status().pending == 10 and "the relay is paused" in processes.logs()
    processes.output("relay_resume")
    assert numbers_by_key(topic_reader.read(10)) == {"c1": list(range(10))}
