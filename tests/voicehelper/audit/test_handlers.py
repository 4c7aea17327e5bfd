import pytest
from django.db import transaction

from events_outbox import emit_event
from events_outbox.handlers import consumer_named
from events_outbox.models import DeadLetter, OutboxEvent, ProcessedEvent
from tests.voicehelper.conftest import consume
from voicehelper.audit.event_handlers import record
from voicehelper.audit.models import AuditEntry
from voicehelper.conversations.services import complete_conversation, create_conversation, send_message
from voicehelper.knowledge.events import DOCUMENT_UPLOADED
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
    }


def test_the_end_of_a_conversation_is_recorded(bob):
    conversation = create_conversation(user=bob, title="Roadmap")
    complete_conversation(user=bob, conversation_id=conversation.id)
    consume("audit")
    entry = AuditEntry.objects.get(event_type="conversation.completed")
    assert entry.payload == {"conversation_id": str(conversation.id), "mode": "chat", "message_count": 0}


def test_a_batch_is_one_statement(alice, bob, emitted, django_assert_num_queries):
    events = emitted("identity.user.created")
    with django_assert_num_queries(1):
        record(events)
    assert AuditEntry.objects.count() == 2


def test_an_event_replayed_after_its_mark_was_pruned_stays_one_entry(bob):
    consume("audit")
    ProcessedEvent.objects.all().delete()
    consume("audit")
    assert AuditEntry.objects.count() == OutboxEvent.objects.count() == 2
    assert not DeadLetter.objects.exists()


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


@pytest.mark.parametrize("action", ["add", "{id}/change", "{id}/delete"])
def test_the_admin_cannot_change_the_log(client, alice, emitted, action):
    record(emitted("identity.user.created"))
    entry = AuditEntry.objects.get()
    client.force_login(alice)

    answer = client.post(f"/admin/audit/auditentry/{action.format(id=entry.id)}/", {"post": "yes"})

    assert answer.status_code == 403
    assert AuditEntry.objects.get() == entry
