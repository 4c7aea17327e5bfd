"""What the identity domain takes from the environment (README, Settings)."""

from collections.abc import Mapping

from django.core.exceptions import ImproperlyConfigured

DEFAULT_REQUESTS_PER_MINUTE = 6000


def tenant_requests_per_minute(environment: Mapping[str, str]) -> int:
    """How many requests a tenant's users may make in a minute, all together; 0: as many as they like.

    Raises ImproperlyConfigured for what is no whole number.
    """
    text = environment.get("TENANT_REQUESTS_PER_MINUTE") or str(DEFAULT_REQUESTS_PER_MINUTE)
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ImproperlyConfigured(
            f"TENANT_REQUESTS_PER_MINUTE={text[:50]!r} must be a whole number of requests, or 0 for no limit"
        )
    return int(text)
