"""Backends for CACHES that count hits, misses and errors: `monitoring.caches.RedisCache` and `LocMemCache`.

Any other backend counts too when `CacheMetrics` stands before it in the bases of a class:
`class MemcachedCache(CacheMetrics, PyMemcacheCache)`. The series are the specification's.
"""

import logging
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from types import TracebackType
from typing import Any, NamedTuple, Self

from django.core.cache import caches
from django.core.cache.backends import locmem, redis
from django.core.cache.backends.base import DEFAULT_TIMEOUT, BaseCache, InvalidCacheKey
from prometheus_client import Counter

from monitoring.metrics import CACHE_ERRORS, CACHE_HITS, CACHE_MISSES

logger = logging.getLogger(__name__)

UNNAMED = "unnamed"
"""`cache_name` of a cache that was not made from CACHES."""

_MISSING = object()
# These say that a key is missing by raising ValueError.
_RAISE_WHEN_MISSING = frozenset({"incr", "decr", "incr_version", "decr_version"})
_current: ContextVar["_Operation | None"] = ContextVar("current_cache_operation", default=None)


class CacheMetrics(BaseCache):
    """Counts what a cache's operations find; `cache_name` is the alias in CACHES.

    A hit is a key that was there, whatever its value, None included. `get_many` counts each key it was asked for.
    Besides what is read, `has_key`, `touch`, `incr` and `decr` tell whether the key was there and are counted so;
    the others only when they fail. The label `operation` is the method that was called, sync or async: what it calls
    in its turn is a part of it. A failed operation is an error, and neither hit nor miss.
    """

    def __init__(self, location: Any, params: dict[str, Any]) -> None:
        super().__init__(location, params)  # type: ignore[call-arg]  # the backend's, not BaseCache's
        self.cache_name = _alias(type(self), location, params)

    def get(self, key: Any, default: Any = None, version: int | None = None) -> Any:
        with _Operation(self, "get") as operation:
            return operation.found(super().get(key, _MISSING, version), default)

    async def aget(self, key: Any, default: Any = None, version: int | None = None) -> Any:
        with _Operation(self, "get") as operation:
            return operation.found(await super().aget(key, _MISSING, version), default)

    def get_many(self, keys: Any, version: int | None = None) -> dict[Any, Any]:
        with _Operation(self, "get_many") as operation:
            keys = list(keys)
            return operation.found_many(super().get_many(keys, version), keys)

    async def aget_many(self, keys: Any, version: int | None = None) -> dict[Any, Any]:
        with _Operation(self, "get_many") as operation:
            keys = list(keys)
            return operation.found_many(await super().aget_many(keys, version), keys)

    def get_or_set(
        self, key: Any, default: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> Any | None:
        with _Operation(self, "get_or_set") as operation:
            return super().get_or_set(key, operation.computing(default), timeout, version)

    async def aget_or_set(
        self, key: Any, default: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> Any | None:
        with _Operation(self, "get_or_set") as operation:
            return await super().aget_or_set(key, operation.computing(default), timeout, version)


def _count(name: str, was_there: Callable[[Any], bool] | None = None) -> None:
    """Give CacheMetrics the method `name` and its async twin. `was_there`: what the answer says of the key."""

    def method(self: CacheMetrics, *args: Any, **kwargs: Any) -> Any:
        with _Operation(self, name) as operation:
            result = getattr(super(CacheMetrics, self), name)(*args, **kwargs)
            if was_there:
                operation.count(was_there(result))
            return result

    async def async_method(self: CacheMetrics, *args: Any, **kwargs: Any) -> Any:
        with _Operation(self, name) as operation:
            result = await getattr(super(CacheMetrics, self), f"a{name}")(*args, **kwargs)
            if was_there:
                operation.count(was_there(result))
            return result

    for function, own_name in ((method, name), (async_method, f"a{name}")):
        function.__name__, function.__qualname__ = own_name, f"CacheMetrics.{own_name}"
        setattr(CacheMetrics, own_name, function)


for _name in ("has_key", "touch"):
    _count(_name, bool)
for _name in _RAISE_WHEN_MISSING:
    _count(_name, lambda result: True)
for _name in ("add", "set", "set_many", "delete", "delete_many", "clear"):
    _count(_name)


class RedisCache(CacheMetrics, redis.RedisCache):
    """Django's Redis backend, counted."""


class LocMemCache(CacheMetrics, locmem.LocMemCache):
    """Django's local-memory backend, counted."""


class _Series(NamedTuple):
    hits: Counter
    misses: Counter
    errors: Counter


@cache
def _series(cache_name: str, operation: str) -> _Series:
    """The three are born together: a cache that only misses has a hit rate of 0, not none."""
    labels = (cache_name, operation)
    return _Series(CACHE_HITS.labels(*labels), CACHE_MISSES.labels(*labels), CACHE_ERRORS.labels(*labels))


class _Operation:
    """One call by the user of a cache: counted once, when it ends."""

    def __init__(self, of: CacheMetrics, name: str) -> None:
        self._cache = of
        self._name = name
        self._hits = self._misses = 0
        self._is_callers_error = False

    def __enter__(self) -> Self:
        # Backends build methods on each other: the outermost is what the user called. Another cache, as one in
        # two layers has, counts for itself.
        outer = _current.get()
        self._is_part = outer is not None and outer._cache is self._cache
        if not self._is_part:
            self._token = _current.set(self)
        return self

    def found(self, value: Any, default: Any) -> Any:
        """Count one lookup; `value` is _MISSING when the key was not there."""
        self.count(value is not _MISSING)
        return default if value is _MISSING else value

    def found_many(self, values: dict[Any, Any], keys: list[Any]) -> dict[Any, Any]:
        self._hits += len(values)
        self._misses += len(set(keys)) - len(values)
        return values

    def count(self, was_there: bool) -> None:
        if was_there:
            self._hits += 1
        else:
            self._misses += 1

    def computing(self, default: Any) -> Callable[[], Any]:
        """Return what get_or_set is to call for a key that is not there: the caller's work, not the cache's."""
        self.count(True)  # until it is called

        def compute() -> Any:
            self._hits, self._misses = 0, 1
            if not callable(default):
                return default
            token = _current.set(None)
            try:
                return default()
            except BaseException:
                self._is_callers_error = True
                raise
            finally:
                _current.reset(token)

        return compute

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_part:
            return
        _current.reset(self._token)
        try:
            self._record(error)
        except Exception:  # a full disk under the shared metrics must not become a failed request
            logger.exception("a cache operation could not be counted")

    def _record(self, error: BaseException | None) -> None:
        series = _series(self._cache.cache_name, self._name)
        if error is not None and not self._is_callers_error:
            if self._name in _RAISE_WHEN_MISSING and _says_missing(error):
                series.misses.inc()
            elif isinstance(error, Exception):  # not a task that was cancelled
                series.errors.inc()
            return
        if self._hits:
            series.hits.inc(self._hits)
        if self._misses:
            series.misses.inc(self._misses)


def _says_missing(error: BaseException) -> bool:
    return isinstance(error, ValueError) and not isinstance(error, InvalidCacheKey)


def _alias(backend: type[CacheMetrics], location: Any, params: dict[str, Any]) -> str:
    """Find the alias in CACHES that a cache is made for: Django does not tell its backends.

    Where two aliases say the same, they are the same cache, and the first gives the name.
    """
    path = f"{backend.__module__}.{backend.__qualname__}"
    wanted = {**params, "BACKEND": path, "LOCATION": location}
    for alias, config in caches.settings.items():
        if {"LOCATION": "", **config} == wanted:
            return str(alias)
    return UNNAMED
