"""Event types of the notification domain. The aggregate is the notification, of a webhook the delivery.

A webhook belongs to a tenant and not to a user: there `notification_id` is the delivery (the receiver's webhook-id),
and `recipient_id` the endpoint.
"""

from events_outbox import register_event
from voicehelper.proto.notification_pb2 import (
    NotificationCreatedPayload,
    NotificationFailedPayload,
    NotificationSentPayload,
)

NOTIFICATION_CREATED = register_event("notification.created", NotificationCreatedPayload)
NOTIFICATION_SENT = register_event("notification.sent", NotificationSentPayload)
NOTIFICATION_FAILED = register_event("notification.failed", NotificationFailedPayload)
