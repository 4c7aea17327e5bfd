"""The product's settings, for the relays and writers of the fault tests: a frozen leader is given up sooner."""

from voicehelper.settings import *  # noqa: F403
from voicehelper.settings import EVENTS_OUTBOX

EVENTS_OUTBOX = {**EVENTS_OUTBOX, "LEADER_SESSION_TIMEOUT_SECONDS": 2, "LEADER_POLL_SECONDS": 0.2}
