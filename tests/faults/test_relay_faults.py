"""The relay under every fault, alone and mixed: nothing missed, nothing made up, in order, recovered by itself."""

import subprocess
import time
from contextlib import suppress

import pytest

from events_outbox.publisher import STUCK_SECONDS
from tests.faults import harness as faults
from tests.faults.harness import FAULTS, mixed_faults, wait_until
from voicehelper.devstack.child import Child

pytestmark = pytest.mark.apache_kafka


@pytest.mark.parametrize(
    ("fault", "relays", "seconds"),
    [
        (faults.leader_killed, 3, 0.2),
        (faults.leader_killed, 1, 0.2),
        (faults.leader_killed_with_a_batch_in_hand, 2, 0.2),
        (faults.leader_terminated, 2, 0.2),
        (faults.leader_frozen, 3, 0.5),
        (faults.leader_frozen, 1, 0.5),
        (faults.broker_killed, 2, 0.5),
        (faults.broker_restarted, 2, 0.5),
        (faults.broker_frozen, 2, 1),
        (faults.broker_slow, 2, 1.5),
        (faults.broker_connections_cut, 2, 0.2),
        (faults.broker_answers_lost, 2, 1),
        (faults.postgres_restarted_fast, 2, 0.5),
        (faults.postgres_restarted_immediately, 2, 0.5),
        (faults.postgres_connections_terminated, 3, 0.2),
        (faults.postgres_connections_cut, 2, 0.2),
        (faults.postgres_answers_lost, 2, 1),
        (faults.postgres_slow, 2, 1),
        (faults.postgres_held, 2, 1),
    ],
)
def test_alone(fault_harness, fault, relays, seconds):
    with fault_harness.run(relays=relays) as run:
        # A slow broker: nearly always a batch is under way when the fault comes.
        fault_harness.kafka_proxy.to_client.delay_seconds = 0.03
        run.wait_for_published(300)
        with run.fault(fault):
            time.sleep(seconds)
    assert run.committed > 300


def test_every_fault_is_tried_alone():
    (parameters,) = [mark for mark in test_alone.pytestmark if mark.name == "parametrize"]
    assert {case[0] for case in parameters.args[1]} == {fault for kind in FAULTS.values() for fault in kind}


def test_a_relay_is_told_to_stop_while_its_database_hangs(fault_harness):
    """The line to PostgreSQL stands still, and nobody hangs up."""
    with fault_harness.run(relays=1, writers=1) as run:
        run.wait_for_published(20)
        leader = fault_harness.wait_for_leader()
        for way in (fault_harness.postgres_proxy.to_client, fault_harness.postgres_proxy.to_server):
            way.held = True
        run.crashes += 1
        fault_harness.end_relay(leader, Child.ask_to_stop)
        with suppress(subprocess.TimeoutExpired):
            leader.process.wait(8)
        stopped = leader.process.returncode is not None
        fault_harness.postgres_proxy.heal()
        assert leader.process.wait(30) == 0
    assert stopped


def test_a_producer_that_has_lost_a_broker_which_is_there_is_replaced(fault_harness):
    """The broker answers everybody but the leader's connections of before: nobody hangs up, nothing comes."""
    with fault_harness.run(relays=1, writers=1) as run:
        run.wait_for_published(20)
        ports = fault_harness.wait_for_leader().ports()
        fault_harness.kafka_proxy.hold(ports)
        run.crashes += 1  # what it holds back was acknowledged, and is published again
        before = run.published()
        wait_until(lambda: run.published() > before + 100, "events are published again", STUCK_SECONDS + 20)
        fault_harness.kafka_proxy.let_go(ports)


def test_mixed_at_random(fault_harness):
    with fault_harness.run(relays=3) as run:
        deadline = time.monotonic() + 8
        mixed_faults(run, lambda: time.monotonic() > deadline)


def test_a_transaction_of_many_events(fault_harness):
    """Killed and frozen amidst them."""
    count = 50_000
    with fault_harness.run(relays=2, batch_size=500, writers=1) as run:
        fault_harness.tell_writers("big", count, 100)
        run.wait_for_committed(count)
        run.wait_for_published(count // 10)
        with run.fault(faults.leader_killed):
            run.wait_for_published(count // 4)
    assert run.committed > count


def test_a_leader_frozen_while_the_server_sends_it_a_page(fault_harness):
    """Its backend is not idle but stands in the middle of a write, so no timeout of idle sessions ends it."""
    with fault_harness.run(relays=2, writers=1) as run:
        leader = fault_harness.wait_for_leader()
        fault_harness.postgres_proxy.to_client.delay_seconds = 0.02
        fault_harness.tell_writers("big", 80, 200_000)
        wait_until(lambda: ("Client", "ClientWrite") in relays_wait_for(fault_harness), "a page is being sent")
        run.crashes += 1
        ports = leader.ports()
        leader.pause()
        fault_harness.postgres_proxy.hold(ports)
        fault_harness.postgres_proxy.to_client.delay_seconds = 0
        assert ("Client", "ClientWrite") in relays_wait_for(fault_harness)
        fault_harness.wait_for_leader(other_than=leader)
        fault_harness.postgres_proxy.let_go(ports)
        leader.resume()
    assert run.committed > 80


def relays_wait_for(fault_harness):
    return fault_harness.query(
        "SELECT wait_event_type, wait_event FROM pg_stat_activity WHERE application_name = %s", faults.RELAY
    )
