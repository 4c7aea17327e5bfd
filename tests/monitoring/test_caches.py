"""Hits, misses and errors of the cache backends: one contract, on Redis and on local memory."""

import asyncio
import itertools
import subprocess

import pytest
import redis
from django.core.cache import caches
from django.core.cache.backends.base import InvalidCacheKey
from django.core.cache.backends.locmem import LocMemCache as DjangosLocMemCache

from monitoring import metrics
from monitoring.caches import CacheMetrics, LocMemCache

from .conftest import counted, wait_until

LOCAL_MEMORY = "monitoring.caches.LocMemCache"
REDIS = "monitoring.caches.RedisCache"
FALSY = [0, "", None, False, [], b""]
_number = itertools.count()


class Redis:
    def __init__(self, directory):
        self.socket = directory / "redis"
        command = ["redis-server", "--port", "0", "--unixsocket", self.socket, "--save", ""]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(self.answers)

    def answers(self):
        try:
            with redis.Redis(unix_socket_path=str(self.socket)) as client:
                return client.ping()
        except redis.ConnectionError:
            return False

    def stop(self):
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory):
    server = Redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def make_cache(settings):
    """Make a cache under an alias of its own, so that its series begin at nothing."""

    def make(backend, location, **config):
        alias = f"cache-{next(_number)}"
        settings.CACHES = {
            "default": {"BACKEND": LOCAL_MEMORY},
            alias: {"BACKEND": backend, "LOCATION": location, "KEY_PREFIX": alias, **config},
        }
        return caches[alias]

    return make


@pytest.fixture(params=[LOCAL_MEMORY, pytest.param(REDIS, marks=pytest.mark.needs_tool("redis-server"))])
def cache(request, make_cache):
    is_redis = request.param == REDIS
    location = f"unix://{request.getfixturevalue('redis_server').socket}" if is_redis else f"memory-{next(_number)}"
    return make_cache(request.param, location)


@pytest.fixture
def broken(make_cache, tmp_path):
    """A cache whose server is away."""
    return make_cache(REDIS, f"unix://{tmp_path}/nobody")


def count(kind, cache, operation=None):
    labels = {"operation": operation} if operation else {}
    return counted(f"cache_{kind}_total", cache_name=cache.cache_name, **labels)


def total(cache):
    """(hits, misses, errors), and that they are all of one operation."""
    operations = {
        sample.labels["operation"]
        for metric in (metrics.CACHE_HITS, metrics.CACHE_MISSES, metrics.CACHE_ERRORS)
        for family in metric.collect()
        for sample in family.samples
        if sample.labels["cache_name"] == cache.cache_name and sample.value
    }
    return [*(count(kind, cache) for kind in ("hits", "misses", "errors")), *sorted(operations)]


def test_get(cache):
    assert cache.get("key") is None
    assert cache.get("key", "default") == "default"
    assert total(cache) == [0, 2, 0, "get"]
    cache.set("key", "value")
    assert cache.get("key") == "value"
    assert total(cache) == [1, 2, 0, "get"]


@pytest.mark.parametrize("value", FALSY)
def test_a_falsy_value_is_a_hit(cache, value):
    cache.set("key", value)
    assert cache.get("key", "default") == value
    assert cache.get_many(["key"]) == {"key": value}
    assert cache.get_or_set("key", "default") == value
    assert cache.has_key("key")
    assert [count(kind, cache) for kind in ("hits", "misses", "errors")] == [4, 0, 0]


def test_hits_and_misses_are_born_together(cache):
    cache.get("key")
    labels = {"cache_name": cache.cache_name, "operation": "get"}
    for metric in (metrics.CACHE_HITS, metrics.CACHE_ERRORS):
        [family] = metric.collect()
        assert [one.value for one in family.samples if one.labels == labels] == [0]


def test_get_many_counts_each_key(cache):
    cache.set_many({"a": 1, "b": None})
    assert cache.get_many(key for key in ["a", "b", "c", "d", "e", "a"]) == {"a": 1, "b": None}
    assert total(cache) == [2, 3, 0, "get_many"]
    assert cache.get_many([]) == {}
    assert total(cache) == [2, 3, 0, "get_many"]


def test_get_or_set_is_one_lookup(cache):
    assert cache.get_or_set("key", lambda: 0) == 0
    assert total(cache) == [0, 1, 0, "get_or_set"]
    assert cache.get_or_set("key", lambda: 1) == 0
    assert total(cache) == [1, 1, 0, "get_or_set"]
    assert cache.get_or_set("other", "plain", timeout=60) == "plain"
    assert total(cache) == [1, 2, 0, "get_or_set"]


def test_what_the_default_of_get_or_set_looks_up_counts_for_itself(cache):
    cache.set("source", 1)
    assert cache.get_or_set("key", lambda: cache.get("source") + 1) == 2
    assert (count("hits", cache, "get"), count("misses", cache, "get_or_set")) == (1, 1)


def test_a_default_of_get_or_set_that_raises_is_no_error_of_the_cache(cache):
    with pytest.raises(ZeroDivisionError):
        cache.get_or_set("key", lambda: 1 / 0)
    assert total(cache) == [0, 1, 0, "get_or_set"]
    cache.get("key")
    assert count("misses", cache, "get") == 1


@pytest.mark.parametrize("lookup", ["has_key", "touch"])
def test_lookups_without_a_value(cache, lookup):
    assert not getattr(cache, lookup)("key")
    cache.set("key", 0)
    assert getattr(cache, lookup)("key")
    assert total(cache) == [1, 1, 0, lookup]


def test_in_is_has_key(cache):
    assert "key" not in cache
    assert total(cache) == [0, 1, 0, "has_key"]


@pytest.mark.parametrize("change", ["incr", "decr", "incr_version"])
def test_changes_of_what_is_there(cache, change):
    with pytest.raises(ValueError, match="not found"):
        getattr(cache, change)("key")
    assert total(cache) == [0, 1, 0, change]
    cache.set("key", 0)
    getattr(cache, change)("key")
    assert total(cache) == [1, 1, 0, change]


def test_a_change_that_cannot_be_is_an_error(cache):
    cache.set("key", "no number")
    with pytest.raises((TypeError, redis.ResponseError)):
        cache.incr("key")
    assert total(cache) == [0, 0, 1, "incr"]


def test_versions_are_different_keys(cache):
    cache.set("key", 1, version=2)
    assert cache.get("key") is None
    assert cache.get("key", version=2) == 1
    assert cache.get_many(["key"], version=2) == {"key": 1}
    assert cache.get_or_set("key", 7, version=3) == 7
    assert (count("hits", cache, "get"), count("misses", cache, "get")) == (1, 1)
    assert (count("hits", cache, "get_many"), count("misses", cache, "get_or_set")) == (1, 1)


def test_writes_are_neither_hits_nor_misses(cache):
    cache.set("key", 1)
    assert not cache.add("key", 2)
    cache.set_many({"a": 1, "b": 2})
    assert cache.delete("key")
    assert not cache.delete("key")
    cache.delete_many(["a", "b"])
    cache.clear()
    assert total(cache) == [0, 0, 0]


def test_async_methods_count_once_under_the_same_name(cache):
    async def use():
        assert await cache.aget("key") is None
        assert await cache.aget_or_set("key", lambda: 0) == 0
        assert await cache.aget("key") == 0
        assert await cache.aget_many(["key", "other"]) == {"key": 0}
        assert await cache.ahas_key("key")
        assert await cache.atouch("key")
        assert await cache.aincr("key") == 1
        assert await cache.adecr("key") == 0
        await cache.aset("key", 2)
        await cache.adelete("key")

    asyncio.run(use())
    for operation, hits, misses in (
        ("get", 1, 1),
        ("get_or_set", 0, 1),
        ("get_many", 1, 1),
        ("has_key", 1, 0),
        ("touch", 1, 0),
        ("incr", 1, 0),
        ("decr", 1, 0),
    ):
        found = [count(kind, cache, operation) for kind in ("hits", "misses", "errors")]
        assert (operation, found) == (operation, [hits, misses, 0])
    assert [count(kind, cache) for kind in ("hits", "misses")] == [6, 3]


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        ("get", ["key"]),
        ("get_many", [["a", "b"]]),
        ("get_or_set", ["key", 1]),
        ("has_key", ["key"]),
        ("touch", ["key"]),
        ("incr", ["key"]),
        ("add", ["key", 1]),
        ("set", ["key", 1]),
        ("set_many", [{"a": 1, "b": 2}]),
        ("delete", ["key"]),
        ("delete_many", [["a", "b"]]),
        ("clear", []),
    ],
)
def test_an_error_is_neither_hit_nor_miss(broken, operation, arguments):
    with pytest.raises(redis.ConnectionError):
        getattr(broken, operation)(*arguments)
    assert total(broken) == [0, 0, 1, operation]
    with pytest.raises(redis.ConnectionError):
        asyncio.run(getattr(broken, f"a{operation}")(*arguments))
    assert total(broken) == [0, 0, 2, operation]


def test_a_key_that_the_cache_refuses_is_an_error(make_cache):
    class Strict(LocMemCache):
        def validate_key(self, key):
            raise InvalidCacheKey(key)

    cache = Strict("strict", {})
    with pytest.raises(InvalidCacheKey):
        cache.incr("key")
    assert count("errors", cache, "incr") == 1


@pytest.mark.needs_tool("redis-server")
def test_a_server_that_comes_back(tmp_path, make_cache):
    server = Redis(tmp_path)
    cache = make_cache(REDIS, f"unix://{server.socket}")
    cache.set("key", 1)
    server.stop()
    with pytest.raises(redis.ConnectionError):
        cache.get("key")
    server = Redis(tmp_path)
    try:
        assert cache.get("key") is None
        assert total(cache) == [0, 1, 1, "get"]
    finally:
        server.stop()


def test_the_name_is_the_alias(settings):
    settings.CACHES = {
        "default": {"BACKEND": LOCAL_MEMORY},
        "same-place": {"BACKEND": LOCAL_MEMORY, "LOCATION": "", "TIMEOUT": 5, "OPTIONS": {"MAX_ENTRIES": 9}},
        "other": {"BACKEND": REDIS, "LOCATION": ["redis://a", "redis://b"]},
    }
    assert [caches[alias].cache_name for alias in settings.CACHES] == ["default", "same-place", "other"]
    assert LocMemCache("made by hand", {}).cache_name == "unnamed"


def test_a_cache_in_two_layers_counts_each(settings):
    class Far(DjangosLocMemCache):
        def get(self, key, default=None, version=None):
            found = caches["near"].get(key)
            return super().get(key, default, version) if found is None else found

    class Layered(CacheMetrics, Far):
        pass

    settings.CACHES = {"default": {"BACKEND": LOCAL_MEMORY}, "near": {"BACKEND": LOCAL_MEMORY, "LOCATION": "near"}}
    layered, near = Layered("layered", {}), caches["near"]
    before = count("misses", layered), count("misses", near)
    layered.get("key")
    assert (count("misses", layered) - before[0], count("misses", near) - before[1]) == (1, 1)


def test_counting_that_fails_fails_nothing(cache, monkeypatch, caplog):
    monkeypatch.setattr("monitoring.caches._series", lambda *labels: 1 / 0)
    cache.set("key", 1)
    assert cache.get("key") == 1
    assert "could not be counted" in caplog.text
