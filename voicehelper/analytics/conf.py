"""The setting `ANALYTICS`, parsed once and strictly."""

from dataclasses import dataclass, fields
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed


@dataclass(frozen=True)
class AnalyticsSettings:
    """Values of `ANALYTICS`; a key that is left out has the default shown here."""

    BUDGET_MIN_COST_DOLLARS: Decimal = Decimal(1)
    """A tenant's day that costs less is never alerted, however cheap the days before were."""
    BUDGET_MIN_TOKENS: Decimal = Decimal(100_000)
    """The same for its tokens, input and output together."""


@cache
def analytics_settings() -> AnalyticsSettings:
    """Return the parsed settings. Raises ImproperlyConfigured for an unknown key and for what is no number."""
    given = getattr(settings, "ANALYTICS", {})
    known = [field.name for field in fields(AnalyticsSettings)]
    for name in given:
        if name not in known:
            raise ImproperlyConfigured(f"ANALYTICS has no key {name!r}; it knows {', '.join(known)}")
    return AnalyticsSettings(**{name: _number(name, value) for name, value in given.items()})


def _number(name: str, value: Any) -> Decimal:
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        number = Decimal("NaN")
    if isinstance(value, bool) or not number.is_finite() or number < 0:
        raise ImproperlyConfigured(f"ANALYTICS[{name!r}] is {value!r}: it must be a number, 0 or more")
    return number


def _forget(*, setting: str, **_: Any) -> None:
    if setting == "ANALYTICS":
        analytics_settings.cache_clear()


setting_changed.connect(_forget)
