"""Writes of the analytics domain."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from uuid import UUID

from django.db import connection, transaction

from events_outbox import Event, emit_event
from voicehelper.proto.analytics_pb2 import BudgetExceededPayload

from .conf import analytics_settings
from .counting import Counts, TotalKey
from .events import BUDGET_EXCEEDED
from .models import COUNTED, KEY, MEASURES, SUMMED, BudgetDay, DailyTotal

METADATA = {"source": "analytics-service"}
BUDGET_FACTOR = 3
"""A day that exceeds the average by more is alerted."""
BUDGET_DAYS = 30
"""Days before that the average is taken of, as far as something was used on them."""
BUDGET_MIN_DAYS = 3
"""With fewer such days there is no average to speak of."""

LIVE_TABLE = DailyTotal._meta.db_table
DayKey = tuple[UUID, date]
_TYPES = ("uuid[]", "date[]", "text[]", "text[]", *["bigint[]"] * len(COUNTED), *["numeric[]"] * len(SUMMED))

# One statement for a whole batch. The database adds, under the row's lock, so that workers that count the same day at
# once lose nothing. What is inserted into the text are names of this module alone.
ADD_TO_TOTALS = f"""
INSERT INTO {{table}} AS total ({", ".join((*KEY, *MEASURES))})
SELECT * FROM unnest({", ".join(f"%s::{kind}" for kind in _TYPES)})
ON CONFLICT ({", ".join(KEY)}) DO UPDATE
SET {", ".join(f"{name} = total.{name} + excluded.{name}" for name in MEASURES)}
"""  # noqa: S608
# Makes the rows that are missing, and locks all of them, one after the other in the order given.
LOCK_BUDGET_DAYS = """
INSERT INTO analytics_budgetday AS known (tenant_id, day, cost_exceeded, tokens_exceeded)
SELECT tenant_id, day, false, false FROM unnest(%s::uuid[], %s::date[]) AS wanted (tenant_id, day)
ON CONFLICT (tenant_id, day) DO UPDATE SET day = known.day
RETURNING tenant_id, day, cost_exceeded, tokens_exceeded
"""
# For each of the tenants' days: what it came to, and what the days before it did.
SPENT = """
WITH spent AS (
    SELECT wanted.tenant_id, wanted.day, total.day AS on_day,
           sum(total.cost_dollars) AS cost_dollars, sum(total.input_tokens + total.output_tokens) AS tokens
      FROM unnest(%(tenants)s::uuid[], %(days)s::date[]) AS wanted (tenant_id, day)
      JOIN analytics_dailytotal AS total
        ON total.tenant_id = wanted.tenant_id AND total.day BETWEEN wanted.day - %(before)s AND wanted.day
     GROUP BY wanted.tenant_id, wanted.day, total.day
)
SELECT tenant_id, day,
       coalesce(sum(cost_dollars) FILTER (WHERE on_day = day), 0),
       coalesce(sum(cost_dollars) FILTER (WHERE on_day < day), 0),
       count(*) FILTER (WHERE on_day < day AND cost_dollars > 0),
       coalesce(sum(tokens) FILTER (WHERE on_day = day), 0),
       coalesce(sum(tokens) FILTER (WHERE on_day < day), 0),
       count(*) FILTER (WHERE on_day < day AND tokens > 0)
  FROM spent GROUP BY tenant_id, day ORDER BY tenant_id, day
"""


@dataclass(frozen=True)
class Spent:
    """What a tenant's day came to in one measure, and the days before it: their sum, and how many had any."""

    measure: str
    value: Decimal
    sum_before: Decimal
    days_before: int

    def exceeds(self, minimum: Decimal) -> bool:
        """Whether the day is more than it may be. Without a division, which would round."""
        is_known = self.days_before >= BUDGET_MIN_DAYS
        return is_known and self.value >= minimum and self.value * self.days_before > BUDGET_FACTOR * self.sum_before


# Without a savepoint: the batch is one transaction, and all of it is done again when this raises.
@transaction.atomic(savepoint=False)
def count_events(*, events: Sequence[Event]) -> None:
    """Add events to the daily totals, and emit analytics.budget.exceeded for what they make a day exceed.

    Raises PermanentEventError for an event that cannot be counted; nothing was written then.
    """
    counts, causes = Counts(), dict[DayKey, Event]()
    for event in events:
        key = counts.add(event)
        if key.model:
            causes[key.tenant_id, key.day] = event
    # A day is judged under its lock: whoever adds to it last sees what all others have added, so the alert is neither
    # missed nor given twice. First these rows, then the totals, each sorted: in one order in all workers, which
    # therefore never deadlock.
    alerted = _lock_days(sorted(causes))
    add_to_totals(counts=counts)
    if causes:
        _alert(causes, alerted)


def add_to_totals(*, counts: Mapping[TotalKey, Mapping[str, int | Decimal]], table: str = LIVE_TABLE) -> None:
    """Add counts to the daily totals, which are created where they are missing.

    `table`: another one of the same shape, for a rebuild.
    """
    # Sorted: concurrent workers lock the rows in one order and so never deadlock.
    keys = sorted(counts)
    columns: list[list[object]] = [[getattr(key, name) for key in keys] for name in KEY]
    columns += [[counts[key][name] for key in keys] for name in COUNTED]
    columns += [[Decimal(counts[key][name]) for key in keys] for name in SUMMED]
    with connection.cursor() as cursor:
        cursor.execute(ADD_TO_TOTALS.format(table=connection.ops.quote_name(table)), columns)


def _lock_days(days: Sequence[DayKey]) -> set[tuple[DayKey, str]]:
    """Lock these days to the end of the transaction, in this order; return what was alerted of them already."""
    if not days:
        return set()
    with connection.cursor() as cursor:
        cursor.execute(LOCK_BUDGET_DAYS, [[tenant_id for tenant_id, _ in days], [day for _, day in days]])
        rows = cursor.fetchall()
    alerted = {((tenant_id, day), "cost_dollars") for tenant_id, day, cost, _ in rows if cost}
    return alerted | {((tenant_id, day), "tokens") for tenant_id, day, _, tokens in rows if tokens}


def _alert(causes: Mapping[DayKey, Event], alerted: set[tuple[DayKey, str]]) -> None:
    """Emit, for each of these days and each measure, once that it exceeds."""
    conf = analytics_settings()
    minimum = {"cost_dollars": conf.BUDGET_MIN_COST_DOLLARS, "tokens": conf.BUDGET_MIN_TOKENS}
    flags = {"cost_dollars": "cost_exceeded", "tokens": "tokens_exceeded"}
    days = sorted(causes)
    with connection.cursor() as cursor:
        tenant_ids = [tenant_id for tenant_id, _ in days]
        cursor.execute(SPENT, {"tenants": tenant_ids, "days": [day for _, day in days], "before": BUDGET_DAYS})
        rows = cursor.fetchall()
    for tenant_id, day, cost, cost_before, cost_days, tokens, tokens_before, token_days in rows:
        for spent in (
            Spent("cost_dollars", cost, cost_before, cost_days),
            Spent("tokens", tokens, tokens_before, token_days),
        ):
            if ((tenant_id, day), spent.measure) in alerted or not spent.exceeds(minimum[spent.measure]):
                continue
            BudgetDay.objects.filter(tenant_id=tenant_id, day=day).update(**{flags[spent.measure]: True})
            _emit_exceeded(tenant_id, day, spent, causes[tenant_id, day])


def _emit_exceeded(tenant_id: UUID, day: date, spent: Spent, cause: Event) -> None:
    average = spent.sum_before / spent.days_before
    emit_event(
        BUDGET_EXCEEDED,
        BudgetExceededPayload(
            day=day.isoformat(),
            measure=spent.measure,
            value=float(spent.value),
            average=float(average),
            limit=float(BUDGET_FACTOR * average),
        ),
        aggregate_id=tenant_id,
        tenant_id=tenant_id,
        # The event that made it exceed, or a later one of the same batch.
        correlation_id=cause.correlation_id,
        causation_id=str(cause.event_id),
        metadata=METADATA,
    )
