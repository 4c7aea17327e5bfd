"""How much a tenant may ask for, and how often a password may be guessed."""

import math

import pytest
from django.core.cache import caches
from django.core.exceptions import ImproperlyConfigured
from rest_framework.test import APIClient

from tests.monitoring.conftest import counted
from tests.voicehelper.conftest import PASSWORD, assert_problem
from voicehelper.identity.conf import tenant_requests_per_minute
from voicehelper.identity.services import register_user
from voicehelper.identity.throttling import LoginThrottle, MinuteThrottle
from voicehelper.shared_cache import SharedOrOwnCache

ME = "/api/v1/me"
LOGIN = "/api/v1/auth/token"
WRONG = "wrong"


@pytest.fixture(autouse=True)
def forgotten_requests(monkeypatch):
    monkeypatch.setattr(MinuteThrottle, "cache", SharedOrOwnCache())
    for cache in caches.all():
        cache.clear()


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Set the throttles' clock to a second of some hour, at first the beginning."""

    def set_to(seconds: float) -> None:
        monkeypatch.setattr(MinuteThrottle, "timer", staticmethod(lambda: 3600 * 1000 + seconds))

    set_to(0)
    return set_to


@pytest.fixture
def cache_is_away(settings, tmp_path):
    """Have the shared cache be away from now on."""

    def leave() -> None:
        away = {"BACKEND": "monitoring.caches.RedisCache", "LOCATION": f"unix://{tmp_path}/nobody"}
        settings.CACHES = {**settings.CACHES, "default": away}

    return leave


@pytest.fixture
def log_in(db):
    """Try to log in; return the answer."""
    client = APIClient(raise_request_exception=False)

    def attempt(username, password=WRONG):
        return client.post(LOGIN, {"username": username, "password": password}, format="json")

    return attempt


def test_the_users_of_a_tenant_share_its_rate(bob, alice, charlie, api, settings, clock):
    settings.TENANT_REQUESTS_PER_MINUTE = 5
    clients = [api(bob), api(bob), api(alice)]
    clock(12.5)
    for number in range(5):
        assert clients[number % 3].get(ME).status_code == 200
    for client in clients:
        answer = client.get(ME)
        assert_problem(answer, 429)
        assert int(answer["Retry-After"]) == math.ceil(47.5)
    assert api(charlie).get(ME).status_code == 200

    clock(59.999)
    assert int(clients[0].get(ME)["Retry-After"]) == 1
    clock(60)
    assert clients[0].get(ME).status_code == 200


def test_what_is_refused_before_is_not_counted(bob, api, settings):
    settings.TENANT_REQUESTS_PER_MINUTE = 2
    reader = api(bob, "read")
    for _ in range(5):
        assert_problem(reader.post("/api/v1/conversations", {"title": "x"}, format="json"), 403)
    assert [reader.get(ME).status_code for _ in range(3)] == [200, 200, 429]


def test_zero_is_no_limit(bob, api, settings):
    settings.TENANT_REQUESTS_PER_MINUTE = 0
    client = api(bob)
    assert {client.get(ME).status_code for _ in range(10)} == {200}


def test_a_throttled_tenant_logs_in_all_the_same(bob, api, log_in, settings):
    settings.TENANT_REQUESTS_PER_MINUTE = 1
    throttled = api(bob)
    assert [throttled.get(ME).status_code for _ in range(2)] == [200, 429]
    assert log_in("bob", PASSWORD).status_code == 200


def test_requests_are_counted_while_the_shared_cache_is_away(bob, api, settings, cache_is_away, caplog):
    settings.TENANT_REQUESTS_PER_MINUTE = 3
    cache_is_away()
    client = api(bob)
    assert [client.get(ME).status_code for _ in range(4)] == [200, 200, 200, 429]
    assert caplog.text.count("cannot be reached") == 1


def test_a_cache_that_is_away_is_asked_again_after_a_while(bob, api, settings, cache_is_away, caplog, monkeypatch):
    settings.TENANT_REQUESTS_PER_MINUTE = 3
    caches_before = settings.CACHES
    cache_is_away()
    client = api(bob)
    errors_before = counted("cache_errors_total", cache_name="default")
    for _ in range(2):
        client.get(ME)
    assert counted("cache_errors_total", cache_name="default") - errors_before == 1
    settings.CACHES = caches_before
    assert client.get(ME).status_code == 200
    assert client.get(ME).status_code == 429
    MinuteThrottle.cache._away_until -= SharedOrOwnCache.AWAY_SECONDS
    assert client.get(ME).status_code == 200  # the shared one knows of none so far


def test_a_tenant_of_many_users_keeps_one_counter(tenant, api, settings):
    settings.TENANT_REQUESTS_PER_MINUTE = 10
    users = [register_user(tenant=tenant, username=f"user-{n}", password=PASSWORD) for n in range(12)]
    statuses = [api(user).get(ME).status_code for user in users]
    assert statuses == [200] * 10 + [429] * 2


def test_guessing_is_throttled_for_one_username_only(alice, bob, log_in, clock):
    clock(20)
    assert {log_in("bob").status_code for _ in range(20)} == {400}
    answer = log_in("bob", PASSWORD)
    assert_problem(answer, 429)
    assert int(answer["Retry-After"]) == 40
    assert log_in("alice", PASSWORD).status_code == 200
    clock(60)
    assert log_in("bob", PASSWORD).status_code == 200


@pytest.mark.parametrize("name", [12345, "12345", " 12345 ", 123.5])
def test_a_number_for_a_name_is_no_way_around(tenant, log_in, name):
    register_user(tenant=tenant, username=str(name).strip(), password=PASSWORD)
    for _ in range(20):
        log_in(name)
    assert_problem(log_in(str(name).strip(), PASSWORD), 429)


def test_of_attempts_at_once_each_counts(bob, log_in, monkeypatch):
    """Whenever one looks how many there were, another one does so, too, before it goes on."""
    cache, seen = caches["default"], []

    def with_another(method):
        def look(*args, **kwargs):
            found = method(*args, **kwargs)
            if len(seen) % 2 == 0:
                seen.append(1)
                statuses.append(log_in("bob").status_code)
                seen.append(2)
            return found

        return look

    statuses = []
    for name in ("get", "incr"):
        monkeypatch.setattr(cache, name, with_another(getattr(cache, name)))
    for _ in range(20):
        statuses.append(log_in("bob").status_code)
    assert len(statuses) == 40 and statuses.count(400) == 20


def test_many_other_names_make_no_attempt_forgotten(bob, log_in):
    for _ in range(20):
        log_in("bob")
    for number in range(1000):
        LoginThrottle().may_try(f"user-{number}")
    assert_problem(log_in("bob"), 429)


def test_the_admin_site_and_the_api_count_attempts_together(alice, bob, log_in, client, clock):
    def log_in_to_the_site(username, password=WRONG):
        return client.post("/admin/login/", {"username": username, "password": password, "next": "/admin/"})

    for _ in range(10):
        log_in("alice")
        assert "Please enter the correct" in log_in_to_the_site("alice").content.decode()
    page = log_in_to_the_site("alice", PASSWORD)
    assert page.status_code == 200
    assert "Too many attempts to log in" in page.content.decode()
    assert_problem(log_in("alice", PASSWORD), 429)
    clock(60)
    assert log_in_to_the_site("alice", PASSWORD)["Location"] == "/admin/"


def test_guessing_is_throttled_while_the_shared_cache_is_away(bob, log_in, cache_is_away):
    cache_is_away()
    assert {log_in("bob").status_code for _ in range(20)} == {400}
    assert_problem(log_in("bob"), 429)


@pytest.mark.parametrize(("text", "rate"), [("", 6000), ("0", 0), ("17", 17)])
def test_the_rate_comes_from_the_environment(text, rate):
    assert tenant_requests_per_minute({"TENANT_REQUESTS_PER_MINUTE": text}) == rate
    assert tenant_requests_per_minute({}) == 6000


@pytest.mark.parametrize("text", ["many", "-1", "1.5", "10/min", "9" * 12, "²"])
def test_a_rate_that_is_no_number_is_named(text):
    with pytest.raises(ImproperlyConfigured, match="TENANT_REQUESTS_PER_MINUTE"):
        tenant_requests_per_minute({"TENANT_REQUESTS_PER_MINUTE": text})
