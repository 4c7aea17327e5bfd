"""How values are shown."""

from datetime import datetime

from django.utils import timezone
from django.utils.html import format_html

from events_outbox.decoding import decoded


def readable(value: bytes | memoryview | None) -> str:
    """A BaseEvent's bytes as JSON, or as hex when they are none."""
    return format_html("<pre>{}</pre>", decoded(value))


def exact_time(moment: datetime) -> str:
    """A time to the millisecond, with its offset from UTC."""
    return timezone.localtime(moment).isoformat(sep=" ", timespec="milliseconds")
