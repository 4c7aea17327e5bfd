"""Totals counted from events."""

from decimal import Decimal
from typing import Any
from uuid import UUID

from django.db import models

COST_PLACES = 12
LATENCY_PLACES = 6

LATENCY_BUCKETS: tuple[tuple[str, float], ...] = (
    ("replies_to_100ms", 0.1),
    ("replies_to_500ms", 0.5),
    ("replies_to_1s", 1.0),
    ("replies_to_2s", 2.0),
    ("replies_to_5s", 5.0),
    ("replies_to_10s", 10.0),
    ("replies_to_30s", 30.0),
    ("replies_over_30s", float("inf")),
)
"""Columns of the latency's histogram, and the seconds that each reaches to (inclusive): the bounds of
`llm_request_duration_seconds`. A reply is in one of them alone."""
KEY = ("tenant_id", "day", "mode", "model")
COUNTED = (
    "conversations",
    "completed",
    "failed",
    "messages",
    "replies",
    "input_tokens",
    "output_tokens",
    *(column for column, _ in LATENCY_BUCKETS),
)
SUMMED = ("cost_dollars", "latency_seconds")
MEASURES = (*COUNTED, *SUMMED)
"""Columns that events are added to."""


class DailyTotalQuerySet(models.QuerySet["DailyTotal"]):
    def for_tenant(self, tenant_id: UUID) -> "DailyTotalQuerySet":
        """What the users of a tenant may see."""
        return self.filter(tenant_id=tenant_id)

    def added_up(self) -> dict[str, int | Decimal]:
        """Every measure, added up over the rows; 0 where there are none."""
        sums: dict[str, Any] = self.order_by().aggregate(**{name: models.Sum(name) for name in MEASURES})
        return {name: value or 0 for name, value in sums.items()}


class DailyTotal(models.Model):
    """What happened in one tenant on one UTC day in conversations of one mode, as far as one model had to do with it.

    `model` is empty for what no model answered: conversations, their ends, and the messages of users. Cost, tokens and
    latency are exact sums of what the events say, cost to 12 and latency to 6 decimal places of each event.

    `tenant_id` is no foreign key: events are counted whether or not their tenant's row is still here.
    """

    tenant_id = models.UUIDField()
    day = models.DateField()
    mode = models.CharField(max_length=20)
    model = models.CharField(max_length=200, default="", blank=True)
    conversations = models.BigIntegerField(default=0)
    completed = models.BigIntegerField(default=0)
    failed = models.BigIntegerField(default=0)
    messages = models.BigIntegerField(default=0)
    replies = models.BigIntegerField(default=0, help_text="Messages that a model answered with.")
    input_tokens = models.BigIntegerField(default=0)
    output_tokens = models.BigIntegerField(default=0)
    cost_dollars = models.DecimalField(default=0, max_digits=24, decimal_places=COST_PLACES)
    latency_seconds = models.DecimalField(
        default=0, max_digits=20, decimal_places=LATENCY_PLACES, help_text="Of all replies together."
    )
    replies_to_100ms = models.BigIntegerField(default=0)
    replies_to_500ms = models.BigIntegerField(default=0)
    replies_to_1s = models.BigIntegerField(default=0)
    replies_to_2s = models.BigIntegerField(default=0)
    replies_to_5s = models.BigIntegerField(default=0)
    replies_to_10s = models.BigIntegerField(default=0)
    replies_to_30s = models.BigIntegerField(default=0)
    replies_over_30s = models.BigIntegerField(default=0)

    objects = DailyTotalQuerySet.as_manager()

    class Meta:
        ordering = ["-day", "mode", "model"]
        constraints = [
            models.UniqueConstraint(fields=["tenant_id", "day", "mode", "model"], name="daily_total_of_model")
        ]

    def __str__(self) -> str:
        return f"{self.day} {self.mode} {self.model}".rstrip()


class BudgetDay(models.Model):
    """A tenant's UTC day on which models were used: the lock under which its cost is judged, and what was alerted."""

    tenant_id = models.UUIDField()
    day = models.DateField()
    cost_exceeded = models.BooleanField(default=False)
    tokens_exceeded = models.BooleanField(default=False)

    class Meta:
        ordering = ["-day"]
        constraints = [models.UniqueConstraint(fields=["tenant_id", "day"], name="budget_day_key")]

    def __str__(self) -> str:
        return f"{self.day} {self.tenant_id}"
