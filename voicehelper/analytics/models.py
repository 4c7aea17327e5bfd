"""Totals counted from events."""

from uuid import UUID

from django.db import models


class DailyTotalQuerySet(models.QuerySet["DailyTotal"]):
    def for_tenant(self, tenant_id: UUID) -> "DailyTotalQuerySet":
        """What the users of a tenant may see."""
        return self.filter(tenant_id=tenant_id)


class DailyTotal(models.Model):
    """What happened in one tenant on one UTC day in conversations of one mode.

    `tenant_id` is no foreign key: events are counted whether or not their tenant's row is still here.
    """

    tenant_id = models.UUIDField()
    day = models.DateField()
    mode = models.CharField(max_length=20)
    conversations = models.BigIntegerField(default=0)
    messages = models.BigIntegerField(default=0)

    objects = DailyTotalQuerySet.as_manager()

    class Meta:
        ordering = ["-day", "mode"]
        constraints = [models.UniqueConstraint(fields=["tenant_id", "day", "mode"], name="daily_total_key")]

    def __str__(self) -> str:
        return f"{self.day} {self.mode}"
