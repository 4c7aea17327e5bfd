"""How values are shown."""

from datetime import datetime

from django.utils import timezone


def exact_time(moment: datetime) -> str:
    """A time to the millisecond, with its offset from UTC."""
    return timezone.localtime(moment).isoformat(sep=" ", timespec="milliseconds")
