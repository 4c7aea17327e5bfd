"""Event types of the notification domain. The aggregate is the notification."""

from events_outbox import register_event
from voicehelper.proto.notification_pb2 import NotificationCreatedPayload

NOTIFICATION_CREATED = register_event("notification.created", NotificationCreatedPayload)
