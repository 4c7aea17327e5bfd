"""What users are told about, how they want to be told, and what goes out to them."""

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from django.conf import settings
from django.db import models
from django.db.models.functions import Now
from django.utils import timezone
from uuid_utils.compat import uuid7

from voicehelper.identity.models import User

GIVE_UP_AFTER = timedelta(days=1)
"""So long a delivery is tried at most."""


class Channel(models.TextChoices):
    """A way to tell somebody. In the app it is the notification itself."""

    IN_APP = "in_app", "in the app"
    EMAIL = "email", "e-mail"
    WEBHOOK = "webhook", "webhook"


class NotificationQuerySet(models.QuerySet["Notification"]):
    def for_recipient(self, user: User) -> "NotificationQuerySet":
        """Notifications of one user in the app, in the tenant the user belongs to."""
        return self.filter(recipient=user, tenant_id=user.own_tenant_id, in_app=True)


class Notification(models.Model):
    """What one user was told. `kind` is the event type that caused it, `aggregate_id` what it is about.

    `event_id`: the event that caused it, of which a user is told once; null where none did.
    """

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    tenant = models.ForeignKey("identity.Tenant", on_delete=models.PROTECT, related_name="+", db_index=False)
    # No index of its own: the one below begins with it.
    recipient = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+", db_index=False)
    kind = models.CharField(max_length=128)
    aggregate_id = models.CharField(max_length=255)
    subject = models.TextField()
    # By the database as well, for the version before this one, which may still be running when it is migrated.
    body = models.TextField(default="", db_default="", blank=True)
    in_app = models.BooleanField(default=True, db_default=True, help_text="Whether the user sees it in the app.")
    event_id = models.UUIDField(null=True, editable=False)
    created_at = models.DateTimeField(auto_now_add=True)
    read_at = models.DateTimeField(null=True, help_text="When the recipient first marked it read.")

    objects = NotificationQuerySet.as_manager()

    class Meta:
        ordering = ["-id"]
        indexes = [models.Index(fields=["recipient", "-id"], name="notification_newest_first")]
        constraints = [
            models.UniqueConstraint(fields=["event_id", "recipient"], name="notification_once_an_event"),
        ]

    def __str__(self) -> str:
        return self.subject


class NotificationPreference(models.Model):
    """That a user wants, or does not want, to be told of a kind by a channel. No row: the kind's default."""

    # No index of its own: the constraint below begins with it.
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="+", db_index=False)
    kind = models.CharField(max_length=128)
    channel = models.CharField(max_length=10, choices=Channel.choices)
    enabled = models.BooleanField()

    class Meta:
        ordering = ["-id"]
        constraints = [models.UniqueConstraint(fields=["user", "kind", "channel"], name="one_preference")]

    def __str__(self) -> str:
        return f"{self.kind} by {self.channel}: {'yes' if self.enabled else 'no'}"


class WebhookEndpointQuerySet(models.QuerySet["WebhookEndpoint"]):
    def for_tenant(self, tenant_id: UUID) -> "WebhookEndpointQuerySet":
        """A tenant's, without those it has deleted."""
        return self.filter(tenant_id=tenant_id, deleted_at__isnull=True)


class WebhookEndpoint(models.Model):
    """An address of a tenant that is told of its events. The secret is not stored: see `webhooks.secrets_of()`.

    A deleted one stays, as its deliveries refer to it.
    """

    URL_MAX_CHARS = 500
    MOST_OF_A_TENANT = 20

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    # No index of its own: the one below begins with it.
    tenant = models.ForeignKey("identity.Tenant", on_delete=models.PROTECT, related_name="+", db_index=False)
    url = models.CharField(max_length=URL_MAX_CHARS)
    description = models.CharField(max_length=200, blank=True)
    kinds = models.JSONField(default=list, blank=True, help_text="Event types that it is told of; empty: of all.")
    active = models.BooleanField(default=True, help_text="Off: nothing is sent to it.")
    failures = models.PositiveIntegerField(default=0, help_text="Attempts that failed since one succeeded.")
    resting_until = models.DateTimeField(null=True, help_text="After a failure: what is new waits until then.")
    salt = models.CharField(max_length=64, editable=False)
    previous_salt = models.CharField(max_length=64, default="", blank=True, editable=False)
    previous_salt_until = models.DateTimeField(null=True, editable=False)
    created_by = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+", db_index=False)
    created_at = models.DateTimeField(auto_now_add=True)
    deleted_at = models.DateTimeField(null=True)

    objects = WebhookEndpointQuerySet.as_manager()

    class Meta:
        ordering = ["-id"]
        indexes = [models.Index(fields=["tenant", "-id"], name="webhook_endpoint_newest_first")]

    def __str__(self) -> str:
        return self.url


def give_up_at() -> datetime:
    return timezone.now() + GIVE_UP_AFTER


class DeliveryQuerySet(models.QuerySet["Delivery"]):
    def due(self, channel: str) -> "DeliveryQuerySet":
        """What is to be sent now. Of those due together, those that failed least often go first."""
        pending = self.filter(state=Delivery.State.PENDING, channel=channel, next_attempt_at__lte=Now())
        return pending.order_by("next_attempt_at", "attempts", "id")

    def overdue(self, channel: str) -> "DeliveryQuerySet":
        """What was not sent in time."""
        pending = self.filter(state=Delivery.State.PENDING, channel=channel, give_up_at__lte=Now())
        return pending.order_by("give_up_at")

    def waiting_for(self, endpoint_id: UUID) -> "DeliveryQuerySet":
        """What is still to be sent to a webhook."""
        return self.filter(state=Delivery.State.PENDING, endpoint_id=endpoint_id)

    def with_now(self) -> "models.QuerySet[Any]":
        """Each with `now`, the database's time: the clocks of workers may differ."""
        return self.annotate(now=Now())

    def abandoned(self, channel: str, lease: timedelta) -> "DeliveryQuerySet":
        """What a worker began to send and never came back from."""
        sending = self.filter(state=Delivery.State.SENDING, channel=channel, claimed_at__lt=Now() - lease)
        return sending.order_by("claimed_at")


class Delivery(models.Model):
    """One thing that goes out, to one user by e-mail or to one webhook. See `deliveries` for its states.

    Unique by event and receiver, so that handling an event again sends nothing again. `body` of a webhook is the
    JSON that is posted, the same at each attempt; `body_html` is an e-mail's.
    """

    class State(models.TextChoices):
        PENDING = "pending"
        SENDING = "sending"
        SENT = "sent"
        FAILED = "failed"

    UNDER_WAY = (State.PENDING, State.SENDING)

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    tenant = models.ForeignKey("identity.Tenant", on_delete=models.PROTECT, related_name="+", db_index=False)
    channel = models.CharField(max_length=10, choices=[choice for choice in Channel.choices if choice[0] != "in_app"])
    kind = models.CharField(max_length=128)
    event_id = models.UUIDField()
    correlation_id = models.CharField(max_length=255, default="", blank=True)
    notification = models.ForeignKey(
        Notification, on_delete=models.PROTECT, related_name="deliveries", null=True, help_text="Of a webhook: none."
    )
    recipient = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+", null=True, db_index=False
    )
    endpoint = models.ForeignKey(
        WebhookEndpoint, on_delete=models.PROTECT, related_name="deliveries", null=True, db_index=False
    )
    subject = models.TextField()
    body = models.TextField()
    body_html = models.TextField(default="", blank=True)
    state = models.CharField(max_length=10, choices=State.choices, default=State.PENDING)
    attempts = models.PositiveSmallIntegerField(default=0)
    next_attempt_at = models.DateTimeField(default=timezone.now)
    give_up_at = models.DateTimeField(default=give_up_at)
    claimed_at = models.DateTimeField(null=True, help_text="When the last attempt began.")
    finished_at = models.DateTimeField(null=True, help_text="When it was sent, or given up.")
    last_error = models.TextField(default="", blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    objects = DeliveryQuerySet.as_manager()

    class Meta:
        ordering = ["-id"]
        verbose_name_plural = "deliveries"
        permissions = [("retry_delivery", "Can have failed deliveries tried again")]
        constraints = [
            models.UniqueConstraint(
                fields=["event_id", "recipient", "channel"],
                condition=models.Q(recipient__isnull=False),
                name="delivery_once_a_user",
            ),
            models.UniqueConstraint(
                fields=["event_id", "endpoint"],
                condition=models.Q(endpoint__isnull=False),
                name="delivery_once_an_endpoint",
            ),
            models.CheckConstraint(
                condition=models.Q(
                    channel="email", recipient__isnull=False, notification__isnull=False, endpoint__isnull=True
                )
                | models.Q(channel="webhook", recipient__isnull=True, endpoint__isnull=False),
                name="delivery_has_one_receiver",
            ),
        ]
        indexes = [
            models.Index(
                fields=["channel", "next_attempt_at", "attempts", "id"],
                condition=models.Q(state="pending"),
                name="delivery_due",
            ),
            models.Index(
                fields=["channel", "claimed_at"], condition=models.Q(state="sending"), name="delivery_under_way"
            ),
            models.Index(
                fields=["channel", "give_up_at"], condition=models.Q(state="pending"), name="delivery_overdue"
            ),
            models.Index(
                fields=["endpoint", "next_attempt_at"],
                condition=models.Q(state="pending", endpoint__isnull=False),
                name="delivery_waiting",
            ),
            models.Index(fields=["endpoint", "-id"], name="delivery_of_endpoint"),
        ]

    def __str__(self) -> str:
        return f"{self.kind} by {self.channel}"
