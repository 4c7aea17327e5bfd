"""The consumer `notification`: tells a tenant's admins what happens in it."""

from uuid import UUID

from events_outbox import Consumer, Event, PermanentEventError
from voicehelper.conversations.events import CONVERSATION_CREATED
from voicehelper.identity.models import User
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload

from .services import notify

notification = Consumer("notification", group_id="notification-service")


@notification.handles(CONVERSATION_CREATED)
def notify_admins(event: Event[ConversationCreatedPayload]) -> None:
    """Tell every admin of the tenant but the one who opened the conversation."""
    try:
        tenant_id = UUID(event.tenant_id)
    except ValueError as error:
        raise PermanentEventError(f"tenant_id {event.tenant_id!r} is not a UUID") from error
    admins = User.objects.filter(tenant_id=tenant_id, role=User.Role.ADMIN, is_active=True).order_by("id")
    for admin in admins:
        if str(admin.id) != event.user_id:
            notify(
                recipient=admin,
                kind=event.event_type,
                aggregate_id=event.aggregate_id,
                subject=f"New conversation: {event.payload.title}",
            )
