from datetime import datetime, timedelta

import pytest
from django.core.cache import caches
from django.utils import timezone
from rest_framework.test import APIClient

from tests.voicehelper.conftest import PASSWORD, assert_problem
from voicehelper.identity.models import User

TOKEN = "/api/v1/auth/token"
ME = "/api/v1/auth/me"


@pytest.fixture(autouse=True)
def forgotten_attempts():
    for cache in caches.all():
        cache.clear()


@pytest.fixture
def anybody() -> APIClient:
    return APIClient(raise_request_exception=False)


def test_a_token_opens_the_api(anybody, bob):
    answer = anybody.post(TOKEN, {"username": "bob", "password": PASSWORD}, format="json")
    assert answer.status_code == 200
    assert answer["Cache-Control"] == "no-store"
    lifetime = datetime.fromisoformat(answer.json()["expires_at"]) - timezone.now()
    assert timedelta(days=29) < lifetime <= timedelta(days=30)

    anybody.credentials(HTTP_AUTHORIZATION=f"Token {answer.json()['token']}")
    assert anybody.get(ME).json() == {
        "id": str(bob.id),
        "username": "bob",
        "role": "member",
        "tenant": {"id": str(bob.tenant_id), "name": "Demo"},
    }


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"username": "bob", "password": "wrong"}, "non_field_errors"),
        ({"username": "nobody", "password": PASSWORD}, "non_field_errors"),
        ({"username": "bob"}, "password"),
        ({"username": "b\x00b", "password": PASSWORD}, "username"),
        ({"username": ["bob"], "password": PASSWORD}, "username"),
        ([], "non_field_errors"),
    ],
)
def test_bad_credentials(anybody, bob, body, field):
    problem = assert_problem(anybody.post(TOKEN, body, format="json"), 400)
    assert list(problem["errors"]) == [field]


def test_an_inactive_user_gets_no_token_and_loses_the_old_one(anybody, api, bob):
    client = api(bob)
    bob.is_active = False
    bob.save()

    assert_problem(anybody.post(TOKEN, {"username": "bob", "password": PASSWORD}, format="json"), 400)
    assert_problem(client.get(ME), 401)


def test_the_access_log_names_the_tenant(api, bob, caplog):
    caplog.set_level("INFO", logger="monitoring.access")
    api(bob).get(ME)
    [line] = [record for record in caplog.records if record.name == "monitoring.access"]
    assert line.tenant_id == str(bob.tenant_id)


def test_without_a_token(anybody, db):
    answer = anybody.get(ME)
    assert_problem(answer, 401)
    assert answer["WWW-Authenticate"] == "Token"


def test_with_a_wrong_token(anybody, db):
    anybody.credentials(HTTP_AUTHORIZATION="Token nonsense")
    assert_problem(anybody.get(ME), 401)


@pytest.mark.parametrize("path", [ME, "/api/v1/conversations", "/api/v1/notifications", "/api/v1/analytics/summary"])
def test_an_operator_without_a_tenant_may_not_use_the_api(api, db, path):
    operator = User.objects.create_superuser("operator", password=PASSWORD)
    problem = assert_problem(api(operator).get(path), 403)
    assert problem["detail"] == "Your account belongs to no tenant."
