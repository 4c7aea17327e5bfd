"""The audit log: every event that happened, appended once and never changed. `chain.py` says how entries are hashed."""

from uuid import UUID

from django.db import models
from django.utils import timezone
from uuid_utils.compat import uuid7

from .chain import GENESIS


class AuditEntryQuerySet(models.QuerySet["AuditEntry"]):
    def for_tenant(self, tenant_id: UUID) -> "AuditEntryQuerySet":
        """What the admins of a tenant may see."""
        return self.filter(tenant_id=str(tenant_id))


class AuditEntry(models.Model):
    """One event. The ids are text without limits, because no event may be refused for its shape.

    The database refuses to change or delete entries, other than as `services.audit_maintenance()` says.
    """

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    tenant_id = models.CharField()
    position = models.BigIntegerField(help_text="1, 2, ... within the tenant, without gaps.")
    event_id = models.UUIDField(unique=True)
    event_type = models.CharField()
    event_version = models.CharField()
    user_id = models.CharField(blank=True)
    aggregate_id = models.CharField()
    occurred_at = models.DateTimeField()
    correlation_id = models.CharField(blank=True)
    causation_id = models.CharField(blank=True)
    payload = models.JSONField()
    metadata = models.JSONField()
    # Not `auto_now_add`, which would set it when it is saved: the hash is of it, and made before.
    recorded_at = models.DateTimeField(default=timezone.now)
    previous_hash = models.CharField(max_length=64, help_text="The hash of the tenant's entry before this one.")
    hash = models.CharField(max_length=64, help_text="SHA-256 of all other fields.")

    objects = AuditEntryQuerySet.as_manager()

    class Meta:
        ordering = ["-id"]
        verbose_name_plural = "audit entries"
        indexes = [
            models.Index(fields=["tenant_id", "-id"], name="audit_tenant_newest_first"),
            models.Index(fields=["tenant_id", "occurred_at"], name="audit_tenant_time"),
            models.Index(fields=["tenant_id", "event_type", "position"], name="audit_tenant_type"),
            models.Index(fields=["aggregate_id"], name="audit_aggregate"),
            models.Index(fields=["correlation_id"], name="audit_correlation"),
        ]
        constraints = [models.UniqueConstraint(fields=["tenant_id", "position"], name="audit_position")]

    def __str__(self) -> str:
        return f"{self.event_type} {self.event_id}"


class AuditChain(models.Model):
    """Where a tenant's chain stands: one row per tenant, locked by whoever appends.

    `position` and `hash` are those of the last entry, so that entries cut off at the end are missed. `dropped_position`
    and `dropped_hash` are those of the last entry that retention has deleted: the chain begins after it.
    """

    tenant_id = models.CharField(primary_key=True)
    position = models.BigIntegerField(default=0)
    hash = models.CharField(max_length=64, default=GENESIS)
    dropped_position = models.BigIntegerField(default=0)
    dropped_hash = models.CharField(max_length=64, default=GENESIS)

    class Meta:
        ordering = ["tenant_id"]

    def __str__(self) -> str:
        return f"{self.tenant_id} at {self.position}"
