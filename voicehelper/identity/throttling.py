"""Limits on guessing, and on how much a tenant may ask for."""

import hashlib
import time
from typing import Any

from django.conf import settings
from rest_framework.request import Request
from rest_framework.throttling import BaseThrottle

from voicehelper.shared_cache import SharedOrOwnCache

from .models import User

LOGINS_PER_MINUTE = 20


class MinuteThrottle(BaseThrottle):
    """At most so many in a minute of the clock: of all web processes with a Redis, of each one without.

    A minute that begins starts from nothing: Retry-After says when that is.
    """

    cache = SharedOrOwnCache()
    timer = staticmethod(time.time)

    def is_within(self, limit: int, key: str) -> bool:
        """Count one more of this key; whether that is still within the limit."""
        self._now = self.timer()
        return self.cache.count(f"{key}:{self._now // 60:.0f}", timeout=120) <= limit

    def wait(self) -> float:
        """Seconds to the next minute."""
        return 60 - self._now % 60


class LoginThrottle(MinuteThrottle):
    """At most LOGINS_PER_MINUTE attempts on one username.

    By username and not by address: an address can be made up in X-Forwarded-For, and one proxy may stand for
    many people. Tokens already issued keep working while an account is throttled.
    """

    def allow_request(self, request: Request, view: Any) -> bool:
        username = request.data.get("username") if isinstance(request.data, dict) else None
        return username is None or self.may_try(str(username))  # a number is taken for a name, too

    def may_try(self, username: str) -> bool:
        """Count an attempt on a username; whether it may be made."""
        # Hashed: a cache key is short and plain, a username need not be.
        name = username.strip().encode("utf-8", "backslashreplace")
        return self.is_within(LOGINS_PER_MINUTE, f"login:{hashlib.sha256(name).hexdigest()}")


class TenantThrottle(MinuteThrottle):
    """At most TENANT_REQUESTS_PER_MINUTE requests of all users of a tenant together; 0 is no limit."""

    def allow_request(self, request: Request, view: Any) -> bool:
        limit: int = settings.TENANT_REQUESTS_PER_MINUTE
        if limit == 0 or not isinstance(request.user, User) or request.user.tenant_id is None:
            return True
        return self.is_within(limit, f"requests:{request.user.tenant_id}")
