"""Limits on guessing."""

import hashlib
from typing import Any

from rest_framework.request import Request
from rest_framework.throttling import SimpleRateThrottle


class LoginThrottle(SimpleRateThrottle):
    """At most 20 attempts a minute on one username, in each web process.

    By username and not by address: an address can be made up in X-Forwarded-For, and one proxy may stand for
    many people. Tokens already issued keep working while an account is throttled.
    """

    rate = "20/min"

    def get_cache_key(self, request: Request, view: Any) -> str | None:
        username = request.data.get("username") if isinstance(request.data, dict) else None
        if not isinstance(username, str):
            return None
        # Hashed: a cache key is short and plain, a username need not be.
        name = username.strip().encode("utf-8", "backslashreplace")
        return f"login:{hashlib.sha256(name).hexdigest()}"
