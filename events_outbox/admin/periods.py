"""A year, month, day or hour of a list: found by the rows' keys, which follow time, not by an index on the time.

Such an index every emit would pay for; this costs some look-ups in the primary key, 50 at most.
"""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import count
from typing import Any, Self

from django.db import models
from django.utils import timezone

FORMATS = ("%Y", "%Y-%m", "%Y-%m-%d", "%Y-%m-%dT%H")
LABELS = ("%Y", "%B %Y", "%-d %B %Y", "%-d %B %Y, %H:00")
SHORT_LABELS = ("%Y", "%B", "%-d", "%H:00")
CLOCK_SLACK = timedelta(minutes=1)
"""How far a row's time may fall behind the order of keys: a statement that ran long, a clock that was set.

Less than a replay allows for: these rows are looked through before a page begins, and one that a list leaves out at
a period's edge is found without the period.
"""


@dataclass(frozen=True)
class Period:
    """A year, month, day or hour in the current time zone; `text` is how it stands in an address: "2026-11"."""

    text: str
    level: int
    start: datetime
    end: datetime

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError when it is none."""
        levels = [level for level, size in enumerate((4, 7, 10, 13)) if len(text) == size]
        if not levels:
            raise ValueError(text)
        start = datetime.strptime(text, FORMATS[levels[0]])
        if not 1970 <= start.year <= 9000:
            raise ValueError(text)
        return cls.at(start, levels[0])

    @classmethod
    def at(cls, moment: datetime, level: int) -> Self:
        """The one around a local time without zone."""
        text = moment.strftime(FORMATS[level])
        start = datetime.strptime(text, FORMATS[level])
        match level:
            case 0:
                end = start.replace(year=start.year + 1)
            case 1:
                end = (start + timedelta(days=32)).replace(day=1)
            case 2:
                end = start + timedelta(days=1)
            case _:
                end = start + timedelta(hours=1)
        return cls(text, level, timezone.make_aware(start), timezone.make_aware(end))

    def label(self) -> str:
        return timezone.make_naive(self.start).strftime(LABELS[self.level])

    def short_label(self) -> str:
        return timezone.make_naive(self.start).strftime(SHORT_LABELS[self.level])

    def outer(self) -> list["Period"]:
        """What it lies in, from the year on; itself is the last."""
        start = timezone.make_naive(self.start)
        return [Period.at(start, level) for level in range(self.level + 1)]

    def inner(self, first: datetime, last: datetime) -> list["Period"]:
        """Its months, days or hours between two times."""
        if self.level == len(FORMATS) - 1:
            return []
        return list(_between(max(first, self.start), min(last, self.end - timedelta.resolution), self.level + 1))


def years(first: datetime, last: datetime) -> list[Period]:
    return list(_between(first, last, 0))


def _between(first: datetime, last: datetime, level: int) -> Iterator[Period]:
    at = first
    while at <= last:
        period = Period.at(timezone.make_naive(at), level)
        yield period
        at = period.end


def outer_times(model: type[models.Model], time_field: str) -> tuple[datetime, datetime] | None:
    """When the first and the last row were made, or None without rows. Two look-ups."""
    rows = model._base_manager.values_list(time_field, flat=True)
    first, last = rows.order_by("pk").first(), rows.order_by("-pk").first()
    return None if first is None or last is None else (first, last)


def keys_of(model: type[models.Model], time_field: str, period: Period) -> tuple[Any, Any]:
    """A key that the period's rows have reached, and one that they do not reach, as far as keys follow time."""
    before, after = period.start - CLOCK_SLACK, period.end + CLOCK_SLACK
    if isinstance(model._meta.pk, models.UUIDField):
        # Version 7: they begin with the time.
        return uuid.UUID(int=_milliseconds(before) << 80), uuid.UUID(int=_milliseconds(after) << 80)
    rows = model._base_manager.order_by("pk").values_list("pk", time_field)
    first, last = rows.first(), rows.last()
    if first is None or last is None:
        return 0, 0
    outer = first, (last[0] + 1, last[1])
    return _key_at(rows, outer, before - CLOCK_SLACK, before), _key_at(rows, outer, after, after + CLOCK_SLACK)


def _milliseconds(moment: datetime) -> int:
    return max(0, int(moment.timestamp() * 1000))  # the minute before 1970, too


def _key_at(
    rows: models.QuerySet[Any, Any], outer: tuple[tuple[int, datetime], ...], earliest: datetime, latest: datetime
) -> int:
    """The key of a row of these times, or else the first after them.

    Where rows came evenly, a guess by proportion finds one within a few look-ups; each other one halves what is left.
    """
    (low, low_time), (high, high_time) = outer
    for step in count():
        if low >= high:
            break
        share = (latest - low_time) / max(high_time - low_time, timedelta.resolution) if step % 2 == 0 else 0.5
        middle = low + int((high - low) * min(max(share, 0.0), 1.0))
        middle = min(middle, high - 1)
        found = rows.filter(pk__gte=middle).first()
        if found is None or found[1] > latest:
            high, high_time = middle, found[1] if found else high_time
        elif found[1] < earliest:
            low, low_time = found[0] + 1, found[1]
        else:
            return int(found[0])
    return int(low)
