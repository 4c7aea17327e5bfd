import hashlib
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from django.db import connection, transaction

from events_outbox import emit_event
from events_outbox.handlers import consumer_named
from events_outbox.models import DeadLetter, OutboxEvent, ProcessedEvent
from events_outbox.testing import handle_now, make_event
from tests.events_outbox.conftest import eventually
from tests.voicehelper.audit.conftest import entries_of
from tests.voicehelper.conftest import consume
from voicehelper.audit.chain import GENESIS
from voicehelper.audit.event_handlers import record
from voicehelper.audit.models import AuditChain, AuditEntry
from voicehelper.audit.verification import verify
from voicehelper.conversations.services import complete_conversation, create_conversation, send_message
from voicehelper.knowledge.events import DOCUMENT_UPLOADED
from voicehelper.proto.conversation_pb2 import MessageSentPayload
from voicehelper.proto.document_pb2 import DocumentUploadedPayload


def test_it_hears_every_topic(db):
    consumer = consumer_named("audit")
    assert consumer.group_id == "audit-service"
    assert consumer.topics == ["conversation.events", "default.events", "document.events", "identity.events"]


def test_every_event_is_recorded_whole(bob, emitted):
    conversation = create_conversation(user=bob, title="Roadmap")
    message = send_message(user=bob, conversation_id=conversation.id, content="Hi")
    consume("audit")
    consume("audit")

    recorded = sorted(AuditEntry.objects.values_list("event_id", flat=True))
    assert recorded == sorted(OutboxEvent.objects.values_list("event_id", flat=True))
    assert len(recorded) == 4
    [sent] = emitted("conversation.message.sent")
    entry = AuditEntry.objects.get(event_type="conversation.message.sent")
    assert entry.event_id == sent.event_id
    assert entry.event_version == "v1"
    assert (entry.tenant_id, entry.user_id) == (str(bob.tenant_id), str(bob.id))
    assert entry.aggregate_id == str(conversation.id)
    assert entry.occurred_at == sent.timestamp
    assert (entry.correlation_id, entry.causation_id) == (sent.correlation_id, "")
    assert entry.metadata == {"source": "conversation-service"}
    assert entry.payload == {
        "conversation_id": str(conversation.id),
        "message_id": str(message.id),
        "role": "user",
        "content": "Hi",
        "mode": "chat",
        "content_length": 2,
        "model": "",
        "input_tokens": 0,
        "output_tokens": 0,
        "cost_dollars": 0.0,
        "latency_seconds": 0.0,
    }


def test_the_end_of_a_conversation_is_recorded(bob):
    conversation = create_conversation(user=bob, title="Roadmap")
    complete_conversation(user=bob, conversation_id=conversation.id)
    consume("audit")
    entry = AuditEntry.objects.get(event_type="conversation.completed")
    assert entry.payload.pop("duration_seconds") > 0
    assert entry.payload == {"conversation_id": str(conversation.id), "mode": "chat", "message_count": 0}


def test_a_batch_is_four_statements(alice, bob, charlie, emitted, django_assert_num_queries):
    events = emitted("identity.user.created") + emitted("identity.tenant.created")
    with django_assert_num_queries(4):  # lock the chains, what is there already, insert, move the chains
        record(events)
    assert AuditEntry.objects.count() == 5


def test_entries_are_chained_within_their_tenant(log, charlie):
    for tenant_id, count in ((log, 7), (str(charlie.tenant_id), 2)):
        entries = entries_of(tenant_id)
        assert [entry.position for entry in entries] == list(range(1, count + 1))
        assert [entry.previous_hash for entry in entries] == [GENESIS, *(entry.hash for entry in entries[:-1])]
        chain = AuditChain.objects.get(tenant_id=tenant_id)
        assert (chain.position, chain.hash) == (count, entries[-1].hash)


def test_the_hash_is_the_documented_one(log):
    """Computed here from what the database holds, with nothing of ours."""
    entry = entries_of(log)[3]
    fields = {
        "tenant_id": log,
        "position": 4,
        "id": str(entry.id),
        "event_id": str(entry.event_id),
        "event_type": "conversation.message.sent",
        "event_version": "v1",
        "user_id": entry.user_id,
        "aggregate_id": entry.aggregate_id,
        "occurred_at": f"{entry.occurred_at:%Y-%m-%dT%H:%M:%S.%fZ}",
        "correlation_id": entry.correlation_id,
        "causation_id": "",
        "payload": {name: 0 if value == 0 else value for name, value in entry.payload.items()},
        "metadata": {"source": "conversation-service"},
        "recorded_at": f"{entry.recorded_at:%Y-%m-%dT%H:%M:%S.%fZ}",
        "previous_hash": entries_of(log)[2].hash,
    }
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert entry.hash == hashlib.sha256(text.encode()).hexdigest()


def test_an_event_that_is_there_twice_in_a_batch_is_one_entry(tenant, emitted):
    [event] = emitted("identity.tenant.created")
    record([event, event])
    record([event])
    assert [entry.position for entry in entries_of(str(tenant.id))] == [1]


def test_what_the_database_gives_back_has_the_same_hash(tenant):
    """Numbers go through PostgreSQL's own type: 1e22 comes back as a whole number, 1.0 as such, -0.0 as 0."""
    for number, cost in enumerate((0.0, -0.0, 1.0, 0.1, 1e-7, 1.5e-9, 1e16, 1e22, 123456789.125, 5e-324, 1.7e308)):
        payload = MessageSentPayload(content='"\u2028\n😀\\', model="m", cost_dollars=cost)
        event = make_event(
            "conversation.message.sent", payload, tenant_id=tenant.id, metadata={"😀": "x", "\ufb33": "y"}
        )
        record([event])
        assert verify(str(tenant.id)).bad_position is None, cost
        assert verify(str(tenant.id)).entries == number + 1


@pytest.mark.django_db(transaction=True)
def test_concurrent_batches_keep_one_chain(tenant, alice, bob, charlie):
    """Several workers, each with batches of several tenants, in different orders, some tenants new."""
    tenant_ids = [f"t-{number}" for number in range(8)]
    batches = [
        [make_event("conversation.created", tenant_id=tenant_id) for tenant_id in random.sample(tenant_ids, 5) * 3]
        for _ in range(40)
    ]

    def work(worker: int) -> None:
        try:
            for batch in batches[worker::4]:
                with transaction.atomic():
                    record(batch)
        finally:
            connection.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))

    assert AuditEntry.objects.count() == 40 * 15
    for tenant_id in tenant_ids:
        assert [entry.position for entry in entries_of(tenant_id)] == list(range(1, len(entries_of(tenant_id)) + 1))
        assert verify(tenant_id).bad_position is None


@pytest.mark.django_db(transaction=True)
def test_the_same_event_in_two_batches_at_once_is_one_entry():
    event = make_event("conversation.created", tenant_id="t-1")
    inserted, goes_on = threading.Event(), threading.Event()

    def first() -> None:
        try:
            with transaction.atomic():
                record([event])
                inserted.set()
                goes_on.wait(10)
        finally:
            connection.close()

    def second() -> None:
        try:
            record([event])
        finally:
            connection.close()

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first)
        assert inserted.wait(10)
        two = pool.submit(second)
        eventually(waits_for_a_lock, 10)
        goes_on.set()
        one.result(10), two.result(10)
    assert [entry.event_id for entry in AuditEntry.objects.all()] == [event.event_id]
    assert verify("t-1").entries == 1


def waits_for_a_lock() -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        return cursor.fetchone()[0] > 0


def test_an_event_replayed_after_its_mark_was_pruned_stays_one_entry(bob):
    consume("audit")
    ProcessedEvent.objects.all().delete()
    consume("audit")
    assert AuditEntry.objects.count() == OutboxEvent.objects.count() == 2
    assert not DeadLetter.objects.exists()
    assert verify(str(bob.tenant_id)).bad_position is None


def test_fields_without_a_value_are_recorded_too(tenant):
    with transaction.atomic():
        emit_event(
            DOCUMENT_UPLOADED,
            DocumentUploadedPayload(document_id="d-1", title="Plan"),
            aggregate_id="d-1",
            tenant_id=tenant.id,
        )
    consume("audit")
    assert AuditEntry.objects.get(event_type=DOCUMENT_UPLOADED).payload == {
        "document_id": "d-1",
        "title": "Plan",
        "content_type": "",
        "size_bytes": "0",  # 64-bit numbers are strings in Protobuf's JSON
    }


def test_a_text_that_the_database_cannot_hold_costs_itself_only_and_is_not_logged(tenant, caplog):
    caplog.set_level("INFO")
    payload = MessageSentPayload(content="My secret\0")
    bad = make_event("conversation.message.sent", payload, tenant_id=tenant.id)
    handle_now("audit", events=[bad, make_event("conversation.created", tenant_id=tenant.id)])
    letter = DeadLetter.objects.get()
    assert (letter.reason, letter.attempts, letter.event_id) == ("permanent", 1, bad.event_id)
    assert len(entries_of(str(tenant.id))) == 1
    told = [caplog.text, letter.error, letter.traceback, *(str(vars(record)) for record in caplog.records)]
    assert "event not handled" in told[0] and not any("secret" in text for text in told)


@pytest.mark.parametrize("action", ["add", "{id}/change", "{id}/delete"])
def test_the_admin_cannot_change_the_log(client, alice, emitted, action):
    record(emitted("identity.user.created"))
    entry = AuditEntry.objects.get()
    client.force_login(alice)

    answer = client.post(f"/admin/audit/auditentry/{action.format(id=entry.id)}/", {"post": "yes"})

    assert answer.status_code == 403
    assert AuditEntry.objects.get() == entry
