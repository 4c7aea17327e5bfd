"""The standard OTEL_* variables, read strictly: a value that means nothing is an error, not a warning.

As OpenTelemetry has it, an empty variable counts as not set.
"""

import os
import re
from collections.abc import Mapping
from urllib.parse import unquote

from django.core.exceptions import ImproperlyConfigured


def text(*names: str) -> str:
    """The first of the variables that is set, else empty."""
    return next((value for name in names if (value := os.environ.get(name, "").strip())), "")


def choice(name: str, allowed: Mapping[str, str] | frozenset[str]) -> str:
    """One of `allowed`, in any case, or empty."""
    value = text(name).lower()
    if value and value not in allowed:
        raise ImproperlyConfigured(f"{name} is {value!r}; here it can be {', '.join(sorted(allowed))}")
    return value


def flag(name: str) -> bool | None:
    """True, False, or None where it is not set."""
    value = choice(name, frozenset({"true", "false"}))
    return value == "true" if value else None


def number(name: str, default: float, *, minimum: float, maximum: float, unit: str = "") -> float:
    value = text(name)
    try:
        given = float(value) if value else default
    except ValueError:
        raise ImproperlyConfigured(f"{name} is {value!r}; it must be a number") from None
    if not minimum <= given <= maximum:
        raise ImproperlyConfigured(
            f"{name} is {value}; it must be from {minimum:g} to {maximum:g}{unit and ' ' + unit}"
        )
    return given


def pairs(*names: str) -> dict[str, str]:
    """`name=value,other=value`, percent-encoded, as headers and resource attributes are given."""
    value = text(*names)
    found = {}
    for item in filter(None, (part.strip() for part in re.split(",", value))):
        key, separator, content = item.partition("=")
        if not separator or not key.strip():
            # The item itself is not repeated: it may be a secret.
            raise ImproperlyConfigured(f"{' or '.join(names)} must be name=value pairs with commas between")
        found[unquote(key.strip())] = unquote(content.strip())
    return found


def service_name() -> str:
    return text("OTEL_SERVICE_NAME") or pairs("OTEL_RESOURCE_ATTRIBUTES").get("service.name", "") or "django"


def service_version() -> str:
    return pairs("OTEL_RESOURCE_ATTRIBUTES").get("service.version", "")


def environment() -> str:
    given = pairs("OTEL_RESOURCE_ATTRIBUTES")
    return given.get("deployment.environment.name") or given.get("deployment.environment") or "dev"
