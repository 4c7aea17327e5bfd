import uuid
from datetime import timedelta

import pytest
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from events_outbox import emit_event
from events_outbox.models import DeadLetter
from tests.voicehelper.conftest import PASSWORD, consume
from tests.voicehelper.notifications.conftest import (
    budget_exceeded,
    conversation_failed,
    document_failed,
    document_indexed,
    happened,
)
from voicehelper.conversations.services import create_conversation
from voicehelper.identity.models import User
from voicehelper.identity.services import register_user
from voicehelper.notifications.event_handlers import notification as consumer
from voicehelper.notifications.kinds import KINDS
from voicehelper.notifications.models import Delivery, Notification
from voicehelper.notifications.services import announce
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload, ConversationFailedPayload
from voicehelper.proto.document_pb2 import DocumentIndexedPayload


def test_every_other_admin_of_the_tenant_is_told(alice, bob, charlie, dora):
    conversation = create_conversation(user=alice, title="Roadmap")
    consume("notification")

    notification = Notification.objects.get()
    assert notification.recipient == dora
    assert notification.tenant_id == alice.tenant_id
    assert notification.kind == "conversation.created"
    assert notification.aggregate_id == str(conversation.id)
    assert notification.subject == "New conversation: Roadmap"
    assert notification.read_at is None


def test_a_member_s_conversation_is_told_to_all_admins_once(alice, bob, dora, emitted):
    create_conversation(user=bob, title="Roadmap")
    consume("notification")
    consume("notification")

    assert Notification.objects.count() == len(emitted("notification.created")) == 2
    assert {notification.recipient for notification in Notification.objects.all()} == {alice, dora}


def test_the_notification_is_emitted_with_its_cause(alice, bob, emitted):
    create_conversation(user=bob, title="Roadmap")
    consume("notification")

    notification = Notification.objects.get()
    [cause], [event] = emitted("conversation.created"), emitted("notification.created")
    assert event.topic == "default.events"
    assert event.aggregate_id == event.payload.notification_id == str(notification.id)
    assert event.tenant_id == str(bob.tenant_id)
    assert event.payload.recipient_id == str(alice.id)
    assert (event.payload.kind, event.payload.subject) == (notification.kind, notification.subject)
    assert event.causation_id == str(cause.event_id)
    assert event.correlation_id == cause.correlation_id


def test_an_admin_alone_is_told_nothing(alice, charlie, emitted):
    create_conversation(user=alice, title="Roadmap")
    consume("notification")
    assert not Notification.objects.exists()
    assert emitted("notification.created") == []


def test_an_inactive_admin_is_not_told(alice, bob, dora):
    User.objects.filter(id=dora.id).update(is_active=False)
    create_conversation(user=bob, title="Roadmap")
    consume("notification")
    assert Notification.objects.get().recipient == alice


def test_an_event_without_a_proper_tenant_is_kept_without_a_retry(alice, bob):
    with transaction.atomic():
        emit_event("conversation.created", ConversationCreatedPayload(), aggregate_id="c-1", tenant_id="nonsense")
    create_conversation(user=bob, title="Roadmap")
    consume("notification")

    dead = DeadLetter.objects.get()
    assert (dead.consumer, dead.reason, dead.attempts) == ("notification", "permanent", 1)
    assert "nonsense" in dead.error
    assert Notification.objects.get().recipient == alice


def told(event):
    """Who was told of an event, and who of them by e-mail."""
    in_app = Notification.objects.filter(event_id=event.event_id, in_app=True)
    by_email = Delivery.objects.filter(event_id=event.event_id, channel="email")
    return {one.recipient.username for one in in_app}, {one.recipient.username for one in by_email}


def test_a_failed_conversation_is_told_to_who_opened_it_and_to_the_admins(alice, bob, charlie, dora):
    event = conversation_failed(bob)

    # dora has no address.
    assert told(event) == ({"alice", "bob", "dora"}, {"alice", "bob"})
    notification = Notification.objects.get(recipient=bob)
    assert (notification.kind, notification.aggregate_id) == ("conversation.failed", event.aggregate_id)
    assert notification.subject == "Conversation failed: Roadmap"
    assert notification.body == (
        "A conversation (voice) ended without success after 3 messages: Roadmap.\nReason: provider_timeout"
    )


def test_who_ended_a_conversation_so_is_not_told(alice, bob, dora):
    assert told(conversation_failed(bob, by=bob, reason=""))[0] == {"alice", "dora"}
    assert told(conversation_failed(bob, by=alice, reason=""))[0] == {"bob", "dora"}


def test_a_failed_conversation_that_is_not_to_be_found(alice, bob):
    event = happened("conversation.failed", ConversationFailedPayload(reason="x"), tenant=bob.tenant, user=bob)
    assert told(event)[0] == {"alice", "bob"}
    assert Notification.objects.get(recipient=bob).subject == "Conversation failed"


def test_a_document_is_told_to_who_uploaded_it_and_its_failure_to_the_admins_as_well(alice, bob, dora):
    assert told(document_indexed(bob)) == ({"bob"}, set())
    assert Notification.objects.get(recipient=bob).subject == "Document ready"
    assert told(document_failed(bob)) == ({"alice", "bob", "dora"}, {"alice", "bob"})
    assert Notification.objects.filter(recipient=bob).first().body.endswith("Reason: It is no PDF.")


def test_a_document_of_nobody_in_the_tenant_is_told_to_no_stranger(alice, bob, charlie):
    payload = DocumentIndexedPayload(document_id="d-1", chunk_count=1)
    assert told(happened("document.indexed", payload, tenant=bob.tenant, user=charlie)) == (set(), set())
    assert told(happened("document.indexed", payload, tenant=bob.tenant)) == (set(), set())


@pytest.mark.parametrize(
    ("measure", "subject"),
    [
        ("cost_dollars", "Budget exceeded: $1,234.50 on 2026-01-31"),
        ("tokens", "Budget exceeded: 1,234 tokens on 2026-01-31"),
    ],
)
def test_a_budget_is_told_to_the_admins(alice, bob, dora, measure, subject):
    assert told(budget_exceeded(alice.tenant, measure)) == ({"alice", "dora"}, {"alice"})
    assert Notification.objects.filter(recipient=alice).get().subject == subject


def test_an_e_mail_waits_with_its_texts(bob):
    event = document_failed(bob)
    delivery = Delivery.objects.get()
    assert (delivery.state, delivery.attempts, delivery.last_error) == ("pending", 0, "")
    assert (delivery.recipient, delivery.notification.recipient) == (bob, bob)
    assert delivery.event_id == event.event_id
    assert delivery.correlation_id == event.correlation_id
    assert delivery.subject == "Document could not be read: Plan"
    assert "about Demo" in delivery.body and "<strong>Plan</strong>" in delivery.body_html


def test_without_a_mail_server_no_e_mail_is_made(bob, settings):
    settings.EMAIL_IS_CONFIGURED = False
    assert told(document_failed(bob)) == ({"bob"}, set())


def test_an_event_that_is_handled_again_tells_nothing_again(alice, bob, webhook, emitted, handle_now):
    document_failed(bob)
    [event] = emitted("document.failed")
    for _ in range(2):
        with transaction.atomic():
            announce(event=event, tenant_id=bob.tenant_id)  # its processed mark was deleted meanwhile
    assert Notification.objects.count() == len(emitted("notification.created")) == 2
    assert Delivery.objects.filter(channel="email").count() == 2
    assert Delivery.objects.filter(channel="webhook").count() == 1


@pytest.mark.parametrize(("days", "in_app", "goes_out"), [(29, True, True), (31, True, False), (366, False, False)])
def test_what_is_older_than_what_is_kept_is_not_told_again(bob, webhook, days, in_app, goes_out):
    document_failed(bob, timestamp=timezone.now() - timedelta(days=days))
    assert Notification.objects.filter(recipient=bob).exists() == in_app
    assert set(Delivery.objects.values_list("channel", flat=True)) == ({"email", "webhook"} if goes_out else set())


def test_to_tell_many_takes_as_many_queries_as_to_tell_one(bob, tenant, webhook, emitted):
    def queries_with(*names):
        for name in names:
            user = register_user(tenant=tenant, username=name, password=PASSWORD, role=User.Role.ADMIN)
            User.objects.filter(id=user.id).update(email=f"{name}@example.com")
        document_failed(bob)
        event = emitted("document.failed")[-1]
        Delivery.objects.all().delete()
        Notification.objects.all().delete()
        with CaptureQueriesContext(connection) as queries:
            announce(event=event, tenant_id=tenant.id)
        assert Delivery.objects.filter(channel="email").count() == User.objects.filter(tenant=tenant).count()
        return len(queries)

    assert queries_with() == queries_with("one", "two", "three")


def test_who_comes_later_is_told_when_an_event_is_handled_again(alice, bob, dora, emitted):
    User.objects.filter(id=dora.id).update(is_active=False)
    event = document_failed(bob)
    User.objects.filter(id=dora.id).update(is_active=True)
    announce(event=emitted("document.failed")[0], tenant_id=bob.tenant_id)
    assert told(event)[0] == {"alice", "bob", "dora"}


def test_what_is_told_in_the_app_is_emitted_as_sent(bob, emitted):
    event = document_indexed(bob)
    notification = Notification.objects.get()
    [sent] = emitted("notification.sent")
    assert sent.aggregate_id == sent.payload.notification_id == str(notification.id)
    assert (sent.payload.recipient_id, sent.payload.channel) == (str(bob.id), "in_app")
    assert (sent.payload.kind, sent.payload.attempts) == ("document.indexed", 1)
    assert (sent.tenant_id, sent.causation_id) == (str(bob.tenant_id), str(event.event_id))


def test_an_unknown_tenant_is_nobody(db):
    with transaction.atomic():
        emit_event("document.indexed", DocumentIndexedPayload(), aggregate_id="d-1", tenant_id=uuid.uuid4())
    consume("notification")
    assert not DeadLetter.objects.exists() and not Notification.objects.exists()


def test_the_consumer_handles_all_kinds_and_nothing_it_emits():
    assert set(consumer.event_types) == set(KINDS)
    assert consumer.topics == ["conversation.events", "default.events", "document.events"]
    assert not [kind for kind in KINDS if kind.startswith("notification.")]
