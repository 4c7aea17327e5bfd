"""Operators: who acts, and the audit trail of what they did."""

import logging
import os
import pwd
import socket
from typing import Any

from .models import OperatorAction

logger = logging.getLogger(__name__)

ACTIONS = (
    "dead_letter.replayed",
    "dead_letter.replay_failed",
    "dead_letter.discarded",
    "consumer.paused",
    "consumer.resumed",
    "relay.paused",
    "relay.resumed",
    "offsets.reset",
    "events.replayed",
    "events.exported",
    "undeliverable.redriven",
    "undeliverable.discarded",
    "payload.viewed",
    "token.revoked",
    "delivery.retried",
)
"""What the audit trail speaks of."""


def system_operator() -> str:
    """Who runs a command: the user of the system, not what the environment says."""
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        name = f"uid {os.getuid()}"
    return f"{name}@{socket.gethostname()}"


def note_action(action: str, *, consumer: str, subject: str, by: str, reason: str = "", **detail: Any) -> None:
    """Write a line of the audit trail, in the current transaction: what is rolled back was not done.

    `action`: one of ACTIONS. `by`: at most 150 characters are kept, of
    `subject` 255. `detail`: what JSON can hold.
    """
    OperatorAction.objects.create(
        action=action, consumer=consumer, subject=subject[:255], by=by[:150], reason=reason, detail=detail
    )
    logger.info(
        "operator action", extra={"action": action, "consumer": consumer, "subject": subject, "by": by, **detail}
    )
