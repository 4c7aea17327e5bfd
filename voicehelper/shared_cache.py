"""The cache that web processes share, and while it cannot be reached that of each process alone."""

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from django.core.cache import BaseCache, caches

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class SharedOrOwnCache:
    """The default cache; while it is away that of this process: neither a login nor a search fails for a cache."""

    AWAY_SECONDS = 5
    """How long one that could not be reached is not asked again: a request may wait for it, not all of them."""

    def __init__(self) -> None:
        self._away_until = 0.0

    def get(self, key: str) -> Any:
        """What is kept under the key; None when nothing is."""
        return self._ask(lambda cache: cache.get(key))

    def set(self, key: str, value: Any, timeout: int) -> None:
        """Keep a value for `timeout` seconds."""
        self._ask(lambda cache: cache.set(key, value, timeout))

    def count(self, key: str, timeout: int) -> int:
        """Add one to a counter that is kept for `timeout` seconds; return what it comes to. No count is lost."""
        return self._ask(lambda cache: _count(cache, key, timeout))

    def _ask(self, question: Callable[[BaseCache], Answer]) -> Answer:
        if time.monotonic() >= self._away_until:
            try:
                return question(caches["default"])
            except Exception as error:
                self._away_until = time.monotonic() + self.AWAY_SECONDS
                name = type(error).__name__
                logger.warning("the cache cannot be reached: each process has its own meanwhile (%s)", name)
        return question(caches["process"])


def _count(cache: BaseCache, key: str, timeout: int) -> int:
    try:
        return cache.incr(key)
    except ValueError:  # it is not there yet
        cache.add(key, 0, timeout)  # of many at once one does
        return cache.incr(key)
