"""Types of command-line arguments: ages, moments, counts."""

import re
from argparse import ArgumentTypeError
from datetime import datetime, timedelta

from django.utils import timezone

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def age(text: str) -> timedelta:
    """Parse "90s", "15m", "2h", "7d" or "1w"."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d+)?)([smhdw])", text.strip())
    if match is None:
        raise ArgumentTypeError(f"{text!r} is no age such as 90s, 15m, 2h, 7d or 1w")
    return timedelta(**{_UNITS[match[2]]: float(match[1])})


def moment(text: str) -> datetime:
    """Parse a time in ISO 8601, in the current time zone where it names none, or an age: so long ago."""
    try:
        return timezone.now() - age(text)
    except ArgumentTypeError:
        pass
    try:
        parsed = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ArgumentTypeError(
            f"{text!r} is neither a time such as 2026-01-31T14:00 or 2026-01-31T14:00+01:00 nor an age such as 2h"
        ) from None
    return parsed if timezone.is_aware(parsed) else timezone.make_aware(parsed)


def positive(text: str) -> int:
    """Parse a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def event_type_pattern(text: str) -> str:
    """Parse an event type, or a pattern as handlers have them: "conversation.*" or "*"."""
    if not re.fullmatch(r"\*|[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*(\.\*)?", text):
        raise ArgumentTypeError(f"{text!r} is neither an event type nor a pattern such as conversation.* or *")
    return text
