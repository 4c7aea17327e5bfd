"""Mail server, receiver, and the events that notifications are made of."""

import uuid
from datetime import timedelta

import pytest
from django.db import transaction
from django.utils import timezone

from events_outbox import emit_event, register_event
from events_outbox.catalog import event_type_for
from events_outbox.exceptions import UnknownEventType
from tests.voicehelper.conftest import PASSWORD, consume
from tests.voicehelper.notifications.servers import MailServer, Receiver
from voicehelper.conversations.services import create_conversation
from voicehelper.identity.models import User
from voicehelper.identity.services import register_user
from voicehelper.notifications.deliveries import DeliveryLoop
from voicehelper.notifications.models import Delivery
from voicehelper.notifications.services import create_webhook
from voicehelper.proto.analytics_pb2 import BudgetExceededPayload
from voicehelper.proto.conversation_pb2 import ConversationFailedPayload
from voicehelper.proto.document_pb2 import DocumentFailedPayload, DocumentIndexedPayload


def _make_sure_of(event_type, payload):
    """These are registered by the domains they are of."""
    try:
        event_type_for(event_type, "v1")
    except UnknownEventType:
        register_event(event_type, payload)


_make_sure_of("document.failed", DocumentFailedPayload)
_make_sure_of("analytics.budget.exceeded", BudgetExceededPayload)


def happened(event_type, payload, *, tenant, user=None, aggregate_id=None, timestamp=None):
    """Emit an event as its domain would, have it handled, and return its row."""
    with transaction.atomic():
        row = emit_event(
            event_type,
            payload,
            aggregate_id=aggregate_id or uuid.uuid4(),
            tenant_id=tenant.id,
            user_id=user.id if user else "",
            timestamp=timestamp,
        )
    consume("notification")
    return row


def conversation_failed(opener, *, title="Roadmap", by=None, reason="provider_timeout"):
    conversation = create_conversation(user=opener, title=title)
    payload = ConversationFailedPayload(
        conversation_id=str(conversation.id), mode="voice", message_count=3, reason=reason
    )
    return happened(
        "conversation.failed", payload, tenant=opener.tenant, user=by or opener, aggregate_id=conversation.id
    )


def document_failed(uploader, *, title="Plan", error="It is no PDF.", timestamp=None):
    payload = DocumentFailedPayload(document_id="d-1", title=title, error=error)
    return happened("document.failed", payload, tenant=uploader.tenant, user=uploader, timestamp=timestamp)


def document_indexed(uploader):
    payload = DocumentIndexedPayload(document_id="d-1", chunk_count=12, collection="documents")
    return happened("document.indexed", payload, tenant=uploader.tenant, user=uploader)


def budget_exceeded(tenant, measure="cost_dollars"):
    payload = BudgetExceededPayload(day="2026-01-31", measure=measure, value=1234.5, average=100, limit=300)
    return happened("analytics.budget.exceeded", payload, tenant=tenant)


def deliver(**options):
    """Send all that is due, as `deliver_notifications --until-idle` does; return how many attempts that were."""
    attempts = 0
    for channel in ("email", "webhook"):
        loop = DeliveryLoop(channel, **options)
        while loop.deliver_next():
            attempts += 1
    return attempts


def make_due():
    """Let the pauses before further attempts be over."""
    Delivery.objects.update(next_attempt_at=timezone.now() - timedelta(seconds=1))


@pytest.fixture
def alice(alice):
    alice.email = "alice@example.com"
    alice.save()
    return alice


@pytest.fixture
def bob(bob):
    bob.email = "bob@example.com"
    bob.save()
    return bob


@pytest.fixture
def charlie(charlie):
    charlie.email = "charlie@example.org"
    charlie.save()
    return charlie


@pytest.fixture
def dora(tenant) -> User:
    """A second admin of alice's tenant, without an e-mail address."""
    return register_user(tenant=tenant, username="dora", password=PASSWORD, role=User.Role.ADMIN)


@pytest.fixture
def mail_server(settings):
    server = MailServer()
    settings.EMAIL_BACKEND = "django.core.mail.backends.smtp.EmailBackend"
    settings.EMAIL_HOST, settings.EMAIL_PORT = "127.0.0.1", server.port
    settings.EMAIL_TIMEOUT = 5
    settings.DEFAULT_FROM_EMAIL = "VoiceHelper <notify@example.com>"
    yield server
    server.close()


@pytest.fixture
def receiver():
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def webhook(alice, receiver):
    """alice's tenant's."""
    return create_webhook(by=alice, url=receiver.url)
