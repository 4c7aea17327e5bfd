"""Limits on guessing."""

import hashlib
import logging
from typing import Any

from django.core.cache import caches
from rest_framework.request import Request
from rest_framework.throttling import SimpleRateThrottle

logger = logging.getLogger(__name__)


class SharedOrOwnCache:
    """The default cache; while it cannot be reached, that of this process, because nobody should be locked out."""

    def get(self, key: str, default: Any) -> Any:
        try:
            return caches["default"].get(key, default)
        except Exception as error:
            logger.warning("the cache cannot be reached: each process limits for itself (%s)", type(error).__name__)
            return caches["process"].get(key, default)

    def set(self, key: str, value: Any, timeout: int) -> None:
        # Kept here as well: the attempts so far count on when the shared cache goes away.
        caches["process"].set(key, value, timeout)
        try:
            caches["default"].set(key, value, timeout)
        except Exception as error:
            logger.warning("the cache cannot be reached: each process limits for itself (%s)", type(error).__name__)


class LoginThrottle(SimpleRateThrottle):
    """At most 20 attempts a minute on one username: of all web processes with a Redis, of each one without.

    By username and not by address: an address can be made up in X-Forwarded-For, and one proxy may stand for
    many people. Tokens already issued keep working while an account is throttled.
    """

    rate = "20/min"
    cache = SharedOrOwnCache()  # type: ignore[assignment]  # of a cache's methods only two are called

    def get_cache_key(self, request: Request, view: Any) -> str | None:
        username = request.data.get("username") if isinstance(request.data, dict) else None
        if not isinstance(username, str):
            return None
        # Hashed: a cache key is short and plain, a username need not be.
        name = username.strip().encode("utf-8", "backslashreplace")
        return f"login:{hashlib.sha256(name).hexdigest()}"
