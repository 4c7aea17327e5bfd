"""What users are told about."""

from django.conf import settings
from django.db import models
from uuid_utils.compat import uuid7

from voicehelper.identity.models import User


class NotificationQuerySet(models.QuerySet["Notification"]):
    def for_recipient(self, user: User) -> "NotificationQuerySet":
        """Notifications of one user, in the tenant the user belongs to."""
        return self.filter(recipient=user, tenant_id=user.own_tenant_id)


class Notification(models.Model):
    """One line to one user. `kind` is the event type that caused it, `aggregate_id` what it is about."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    tenant = models.ForeignKey("identity.Tenant", on_delete=models.PROTECT, related_name="+", db_index=False)
    # No index of its own: the one below begins with it.
    recipient = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+", db_index=False)
    kind = models.CharField(max_length=128)
    aggregate_id = models.CharField(max_length=255)
    subject = models.TextField()
    created_at = models.DateTimeField(auto_now_add=True)
    read_at = models.DateTimeField(null=True, help_text="When the recipient first marked it read.")

    objects = NotificationQuerySet.as_manager()

    class Meta:
        ordering = ["-id"]
        indexes = [models.Index(fields=["recipient", "-id"], name="notification_newest_first")]

    def __str__(self) -> str:
        return self.subject
