"""Limits on guessing, and on how much a tenant may ask for."""

import hashlib
import logging
import time
from typing import Any

from django.conf import settings
from django.core.cache import BaseCache, caches
from rest_framework.request import Request
from rest_framework.throttling import BaseThrottle, SimpleRateThrottle

from .models import User

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

    def count(self, key: str, timeout: int) -> int:
        """Add one to a counter that is kept for `timeout` seconds; return what it comes to. No count is lost."""
        try:
            return _count(caches["default"], key, timeout)
        except Exception as error:
            logger.warning("the cache cannot be reached: each process limits for itself (%s)", type(error).__name__)
            return _count(caches["process"], key, timeout)


def _count(cache: BaseCache, key: str, timeout: int) -> int:
    try:
        return cache.incr(key)
    except ValueError:  # it is not there yet
        cache.add(key, 0, timeout)  # of many at once one does
        return cache.incr(key)


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


class TenantThrottle(BaseThrottle):
    """At most TENANT_REQUESTS_PER_MINUTE requests in a minute of the clock, of all users of a tenant together.

    Of all web processes with a Redis, of each one without. 0 is no limit. A minute that begins starts from nothing:
    Retry-After says when that is.
    """

    cache = SharedOrOwnCache()
    timer = staticmethod(time.time)

    def allow_request(self, request: Request, view: Any) -> bool:
        limit: int = settings.TENANT_REQUESTS_PER_MINUTE
        if limit == 0 or not isinstance(request.user, User) or request.user.tenant_id is None:
            return True
        self._now = self.timer()
        key = f"requests:{request.user.tenant_id}:{self._now // 60:.0f}"
        return self.cache.count(key, timeout=120) <= limit

    def wait(self) -> float:
        """Seconds to the next minute."""
        return 60 - self._now % 60
