"""Writes of the analytics domain."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from uuid import UUID

from django.db import connection

# One statement for a whole batch. The database adds, under the row's lock, so that workers that count the
# same day at once lose nothing.
ADD_TO_TOTALS = """
INSERT INTO analytics_dailytotal AS total (tenant_id, day, mode, conversations, messages)
SELECT * FROM unnest(%s::uuid[], %s::date[], %s::text[], %s::bigint[], %s::bigint[])
ON CONFLICT (tenant_id, day, mode) DO UPDATE
SET conversations = total.conversations + excluded.conversations,
    messages = total.messages + excluded.messages
"""


@dataclass(order=True, frozen=True)
class TotalKey:
    tenant_id: UUID
    day: date
    mode: str


@dataclass
class Count:
    conversations: int = 0
    messages: int = 0


def add_to_totals(*, counts: Mapping[TotalKey, Count]) -> None:
    """Add counts to the daily totals, which are created where they are missing."""
    # Sorted: concurrent workers lock the rows in one order and so never deadlock.
    keys = sorted(counts)
    with connection.cursor() as cursor:
        cursor.execute(
            ADD_TO_TOTALS,
            [
                [key.tenant_id for key in keys],
                [key.day for key in keys],
                [key.mode for key in keys],
                [counts[key].conversations for key in keys],
                [counts[key].messages for key in keys],
            ],
        )
