"""Writes of the notification domain."""

from uuid import UUID

from django.db import transaction
from django.db.models.functions import Coalesce, Now

from events_outbox import emit_event
from voicehelper.identity.models import User
from voicehelper.proto.notification_pb2 import NotificationCreatedPayload

from .events import NOTIFICATION_CREATED
from .models import Notification


@transaction.atomic
def notify(*, recipient: User, kind: str, aggregate_id: str, subject: str) -> Notification:
    """Tell a user of something and emit notification.created."""
    notification = Notification.objects.create(
        tenant_id=recipient.own_tenant_id,
        recipient=recipient,
        kind=kind,
        aggregate_id=aggregate_id,
        subject=subject,
    )
    emit_event(
        NOTIFICATION_CREATED,
        NotificationCreatedPayload(
            notification_id=str(notification.id), recipient_id=str(recipient.id), kind=kind, subject=subject
        ),
        aggregate_id=notification.id,
        tenant_id=notification.tenant_id,
        metadata={"source": "notification-service"},
    )
    return notification


@transaction.atomic
def mark_read(*, recipient: User, notification_id: UUID) -> Notification:
    """Mark a user's notification as read; a second time changes nothing.

    Raises Notification.DoesNotExist when the user has no such notification.
    """
    own = Notification.objects.for_recipient(recipient).filter(id=notification_id)
    own.update(read_at=Coalesce("read_at", Now()))
    return own.get()
