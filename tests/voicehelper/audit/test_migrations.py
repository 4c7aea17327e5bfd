"""The chain is made of entries that are there already."""

from importlib import import_module

import pytest
from django.core.management import call_command
from django.db import connection
from uuid_utils.compat import uuid7

from events_outbox.testing import make_event
from tests.conftest import let_audit_log_be_truncated
from tests.voicehelper.audit.conftest import entries_of
from voicehelper.audit.event_handlers import record
from voicehelper.audit.models import AuditChain, AuditEntry
from voicehelper.audit.verification import tenants, verify

OLD_ENTRY = """
INSERT INTO audit_auditentry (id, event_id, event_type, event_version, tenant_id, user_id, aggregate_id, occurred_at,
       correlation_id, causation_id, payload, metadata, recorded_at)
VALUES (%s, gen_random_uuid(), 'conversation.message.sent', 'v1', %s, '', 'a', now(), 'r', '',
        '{"content": "é\\n", "cost_dollars": 1e-7, "tokens": 1.0}', '{}', now())"""
chaining = import_module("voicehelper.audit.migrations.0003_chain_entries")


def migrate(name: str) -> None:
    call_command("migrate", "audit", name, verbosity=0)


@pytest.fixture
def before_the_chain(transactional_db):
    """The database as it was before there were chains."""
    migrate("0001")
    yield
    call_command("migrate", verbosity=0)
    let_audit_log_be_truncated()


def add_old(cursor, tenant_id: str, count: int) -> list:
    ids = [uuid7() for _ in range(count)]
    for id_ in ids:
        cursor.execute(OLD_ENTRY, [id_, tenant_id])
    return ids


def test_entries_that_are_there_are_chained_in_bounded_steps(before_the_chain, monkeypatch):
    monkeypatch.setattr(chaining, "STEP_ROWS", 4)
    with connection.cursor() as cursor:
        ids = {tenant_id: add_old(cursor, tenant_id, count) for tenant_id, count in (("t-1", 11), ("t-2", 4), ("", 1))}
    migrate("0003")
    with connection.cursor() as cursor:
        # An older version's consumer goes on meanwhile; its ids can be older than some that are chained.
        ids["t-1"] += add_old(cursor, "t-1", 2)
        ids["t-3"] = add_old(cursor, "t-3", 1)
    migrate("0004")

    assert tenants() == ["", "t-1", "t-2", "t-3"]
    for tenant_id, expected in ids.items():
        assert [entry.id for entry in entries_of(tenant_id)] == expected
        assert (verify(tenant_id).bad_position, verify(tenant_id).entries) == (None, len(expected))
        assert AuditChain.objects.get(tenant_id=tenant_id).position == len(expected)
    record([make_event("conversation.created", tenant_id="t-1")])
    assert (verify("t-1").bad_position, verify("t-1").entries) == (None, 14)


def test_a_migration_that_was_stopped_goes_on(before_the_chain, monkeypatch):
    monkeypatch.setattr(chaining, "STEP_ROWS", 4)
    with connection.cursor() as cursor:
        ids = add_old(cursor, "t-1", 10)
    step, steps = chaining._step, []

    def stopped_step(*arguments):
        if len(steps) == 2:
            raise KeyboardInterrupt
        steps.append(arguments)
        return step(*arguments)

    monkeypatch.setattr(chaining, "_step", stopped_step)
    with pytest.raises(KeyboardInterrupt):
        migrate("0004")
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM audit_auditentry WHERE position IS NOT NULL")
        assert cursor.fetchone() == (8,)
    monkeypatch.setattr(chaining, "_step", step)
    migrate("0004")
    assert [entry.id for entry in entries_of("t-1")] == ids
    assert verify("t-1").bad_position is None


def test_an_empty_log_and_back(before_the_chain):
    migrate("0004")
    record([make_event("conversation.created", tenant_id="t-1")])
    migrate("0001")
    migrate("0004")
    assert (AuditEntry.objects.count(), verify("t-1").bad_position) == (1, None)
