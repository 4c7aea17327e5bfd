"""The product's settings, for the processes of the fault tests: who is frozen is given up sooner."""

from voicehelper.settings import *  # noqa: F403
from voicehelper.settings import EVENTS_OUTBOX, INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "tests.faults.effects"]
SESSION_TIMEOUT_MS = 2000
MAX_POLL_INTERVAL_MS = 3000

EVENTS_OUTBOX = {
    **EVENTS_OUTBOX,
    "LEADER_SESSION_TIMEOUT_SECONDS": 2,
    "LEADER_POLL_SECONDS": 0.2,
    "KAFKA_CONSUMER": {
        "session.timeout.ms": SESSION_TIMEOUT_MS,
        "heartbeat.interval.ms": 300,
        "max.poll.interval.ms": MAX_POLL_INTERVAL_MS,
    },
}
