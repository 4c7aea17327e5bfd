import pytest
from django.db import transaction

from events_outbox import emit_event
from events_outbox.models import DeadLetter
from tests.voicehelper.conftest import PASSWORD, consume
from voicehelper.conversations.services import create_conversation
from voicehelper.identity.models import User
from voicehelper.identity.services import register_user
from voicehelper.notifications.models import Notification
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload


@pytest.fixture
def dora(tenant) -> User:
    """A second admin of alice's tenant."""
    return register_user(tenant=tenant, username="dora", password=PASSWORD, role=User.Role.ADMIN)


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
