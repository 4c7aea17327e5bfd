"""How much a tenant may ask for."""

import math

import pytest
from django.core.cache import caches
from django.core.exceptions import ImproperlyConfigured

from tests.voicehelper.conftest import PASSWORD, assert_problem
from voicehelper.identity.conf import tenant_requests_per_minute
from voicehelper.identity.services import register_user
from voicehelper.identity.throttling import TenantThrottle

ME = "/api/v1/me"


@pytest.fixture(autouse=True)
def forgotten_requests():
    for cache in caches.all():
        cache.clear()


@pytest.fixture
def clock(monkeypatch):
    """Set the throttle's clock to a second of some hour."""

    def set_to(seconds: float) -> None:
        monkeypatch.setattr(TenantThrottle, "timer", staticmethod(lambda: 3600 * 1000 + seconds))

    set_to(0)
    return set_to


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


def test_what_is_refused_before_is_not_counted(bob, api, settings, clock):
    settings.TENANT_REQUESTS_PER_MINUTE = 2
    reader = api(bob, "read")
    for _ in range(5):
        assert_problem(reader.post("/api/v1/conversations", {"title": "x"}, format="json"), 403)
    assert [reader.get(ME).status_code for _ in range(3)] == [200, 200, 429]


def test_zero_is_no_limit(bob, api, settings, clock):
    settings.TENANT_REQUESTS_PER_MINUTE = 0
    client = api(bob)
    assert {client.get(ME).status_code for _ in range(10)} == {200}


def test_a_throttled_tenant_logs_in_all_the_same(bob, api, client, settings, clock):
    settings.TENANT_REQUESTS_PER_MINUTE = 1
    throttled = api(bob)
    assert [throttled.get(ME).status_code for _ in range(2)] == [200, 429]
    body = {"username": "bob", "password": PASSWORD}
    assert client.post("/api/v1/auth/token", body, content_type="application/json").status_code == 200


def test_requests_are_counted_while_the_shared_cache_is_away(bob, api, settings, tmp_path, clock, caplog):
    settings.TENANT_REQUESTS_PER_MINUTE = 3
    away = {"BACKEND": "monitoring.caches.RedisCache", "LOCATION": f"unix://{tmp_path}/nobody"}
    settings.CACHES = {**settings.CACHES, "default": away}
    client = api(bob)
    assert [client.get(ME).status_code for _ in range(4)] == [200, 200, 200, 429]
    assert "cannot be reached" in caplog.text


def test_a_tenant_of_many_users_keeps_one_counter(tenant, api, settings, clock):
    settings.TENANT_REQUESTS_PER_MINUTE = 10
    users = [register_user(tenant=tenant, username=f"user-{n}", password=PASSWORD) for n in range(12)]
    statuses = [api(user).get(ME).status_code for user in users]
    assert statuses == [200] * 10 + [429] * 2


@pytest.mark.parametrize(("text", "rate"), [("", 6000), ("0", 0), ("17", 17)])
def test_the_rate_comes_from_the_environment(text, rate):
    assert tenant_requests_per_minute({"TENANT_REQUESTS_PER_MINUTE": text}) == rate
    assert tenant_requests_per_minute({}) == 6000


@pytest.mark.parametrize("text", ["many", "-1", "1.5", "10/min", "9" * 12, "²"])
def test_a_rate_that_is_no_number_is_named(text):
    with pytest.raises(ImproperlyConfigured, match="TENANT_REQUESTS_PER_MINUTE"):
        tenant_requests_per_minute({"TENANT_REQUESTS_PER_MINUTE": text})
