"""Long runs of the fault harness: `make soak`. SOAK_SEED repeats a run's choice of faults and of transactions."""

import os
import random
import time

import pytest

from tests.faults import harness as faults
from tests.faults.consumers import ALL_FAULTS
from tests.faults.harness import mixed_faults

SECONDS = int(os.environ.get("SOAK_SECONDS") or 600) // 2  # half for the relay alone, half for consumers
SEED = int(os.environ.get("SOAK_SEED") or random.SystemRandom().randrange(10**9))
ROUND_SECONDS = 60

pytestmark = [pytest.mark.soak, pytest.mark.apache_kafka, pytest.mark.timeout(SECONDS + 1800)]


def test_mixed_for_long(fault_harness):
    """Rounds of a minute, each judged; a transaction stays open through each, and some have thousands of events."""
    rng = random.Random(SEED)
    print(f"\nSOAK_SEED={SEED}")
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        relays, batch_size = rng.choice([1, 2, 3]), rng.choice([20, 100, 500])
        with fault_harness.run(relays=relays, batch_size=batch_size, seed=rng.randrange(10**9)) as run:
            if run.rng.random() < 0.5:
                fault_harness.tell_writers("big", run.rng.randrange(1000, 30_000), 100)
            end = min(time.monotonic() + ROUND_SECONDS, deadline)
            mixed_faults(run, lambda end=end: time.monotonic() > end)


def test_consumers_mixed_for_long(fault_harness):
    """Rounds of a minute, each judged: one to four members of two consumers, relays, broker and PostgreSQL."""
    rng = random.Random(SEED)
    print(f"\nSOAK_SEED={SEED}")
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        members, relays = rng.choice([1, 2, 3, 4]), rng.choice([1, 2])
        with fault_harness.consumer_run(members=members, relays=relays, seed=rng.randrange(10**9), replays=True) as run:
            end = min(time.monotonic() + ROUND_SECONDS, deadline)
            mixed_faults(run, lambda end=end: time.monotonic() > end, ALL_FAULTS)


def test_a_transaction_of_half_a_million_events(fault_harness):
    """Relays are killed and frozen, and the broker and PostgreSQL restarted, while they publish it."""
    count = 500_000
    with fault_harness.run(relays=2, batch_size=500, seed=SEED, writers=1) as run:
        fault_harness.tell_writers("big", count, 100)
        run.wait_for_committed(count, timeout_seconds=900)
        hits = [faults.leader_killed, faults.leader_frozen, faults.broker_killed, faults.postgres_restarted_immediately]
        for fault in hits:
            run.wait_for_published(count // 10)
            with run.fault(fault):
                time.sleep(0.5)
    assert run.committed > count
