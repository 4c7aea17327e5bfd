"""Consumers under faults, alone and mixed: effects once, in order, dead letters as meant, recovered by themselves."""

import time

import pytest

from tests.faults import consumers, harness
from tests.faults.consumers import ALL_FAULTS
from tests.faults.harness import mixed_faults

pytestmark = pytest.mark.apache_kafka


@pytest.mark.parametrize(
    ("fault", "seconds"),
    [
        (consumers.members_killed, 0.2),
        (consumers.members_terminated, 0.2),
        (consumers.members_frozen, 0.5),
        (harness.broker_killed, 0.5),
        (harness.postgres_restarted_immediately, 0.5),
        (harness.postgres_connections_terminated, 0.2),
    ],
)
def test_alone(fault_harness, fault, seconds):
    with fault_harness.consumer_run() as run:
        fault_harness.wait_for_handled(run, 60)
        with run.fault(fault):
            time.sleep(seconds)
        fault_harness.wait_for_handled(run, 60)


def test_members_come_and_go_under_load(fault_harness):
    """Most partitions move while their member is in the midst of a full batch, often event by event."""
    with fault_harness.consumer_run(members=1, writers_pause_seconds=0.04) as run:
        fault_harness.wait_for_handled(run, 60)
        with run.fault(consumers.members_come_and_go):
            pass
        fault_harness.wait_for_handled(run, 60)
        with run.fault(consumers.members_join):
            pass


def test_mixed_at_random(fault_harness):
    with fault_harness.consumer_run(replays=True) as run:
        deadline = time.monotonic() + 6
        mixed_faults(run, lambda: time.monotonic() > deadline, ALL_FAULTS)
