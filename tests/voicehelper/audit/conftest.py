"""A log with entries of two tenants, and what somebody with all rights could do to it."""

from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection

from tests.voicehelper.conftest import consume
from voicehelper.audit.models import AuditEntry
from voicehelper.audit.services import audit_maintenance
from voicehelper.conversations.services import create_conversation, send_message


@pytest.fixture
def log(bob, charlie) -> str:
    """Seven entries of bob's tenant (its id is returned), two of charlie's."""
    conversation = create_conversation(user=bob, title="Roadmap")
    for number in range(4):
        send_message(user=bob, conversation_id=conversation.id, content=f"Message {number}")
    consume("audit")
    return str(bob.tenant_id)


@pytest.fixture
def tamper(db) -> Callable[..., None]:
    """Run a statement on the log as one who can get around the triggers."""

    def run(statement: str, *parameters: Any) -> None:
        with audit_maintenance(), connection.cursor() as cursor:
            cursor.execute(statement, parameters)

    return run


def entries_of(tenant_id: str) -> list[AuditEntry]:
    return list(AuditEntry.objects.filter(tenant_id=tenant_id).order_by("position"))
