"""The audit log: every event that happened, appended once and never changed."""

from django.db import models
from uuid_utils.compat import uuid7


class AuditEntry(models.Model):
    """One event. The ids are text without limits, because no event may be refused for its shape."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    event_id = models.UUIDField(unique=True)
    event_type = models.CharField()
    event_version = models.CharField()
    tenant_id = models.CharField()
    user_id = models.CharField(blank=True)
    aggregate_id = models.CharField()
    occurred_at = models.DateTimeField()
    correlation_id = models.CharField(blank=True)
    causation_id = models.CharField(blank=True)
    payload = models.JSONField()
    metadata = models.JSONField()
    recorded_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["-id"]
        verbose_name_plural = "audit entries"
        indexes = [
            models.Index(fields=["tenant_id", "-id"], name="audit_tenant_newest_first"),
            models.Index(fields=["aggregate_id"], name="audit_aggregate"),
            models.Index(fields=["correlation_id"], name="audit_correlation"),
        ]

    def __str__(self) -> str:
        return f"{self.event_type} {self.event_id}"
