"""People, their API clients, and the events in the outbox.

alice is an admin of the tenant Demo and may use the admin site, bob is a member of it, charlie is an admin of
the tenant Other.
"""

from collections.abc import Callable

import pytest
from django.utils import timezone
from rest_framework.test import APIClient

from events_outbox import Event
from events_outbox.testing import CapturedEvents, handle_now
from voicehelper.identity.models import ApiToken, Scope, Tenant, User
from voicehelper.identity.services import create_tenant, register_user

PASSWORD = "correct horse battery staple"


@pytest.fixture(autouse=True)
def quick_passwords(settings):
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]


@pytest.fixture
def tenant(db) -> Tenant:
    return create_tenant(name="Demo")


@pytest.fixture
def alice(tenant) -> User:
    user = register_user(tenant=tenant, username="alice", password=PASSWORD, role=User.Role.ADMIN)
    user.is_staff = user.is_superuser = True
    user.save()
    return user


@pytest.fixture
def bob(tenant) -> User:
    return register_user(tenant=tenant, username="bob", password=PASSWORD)


@pytest.fixture
def charlie(db) -> User:
    other = create_tenant(name="Other")
    return register_user(tenant=other, username="charlie", password=PASSWORD, role=User.Role.ADMIN)


@pytest.fixture
def api() -> Callable[..., APIClient]:
    """A client with a token of the user's, of all scopes unless some are named.

    The token was made without an event and is as if used just now, so that nothing is written for the request's sake.
    """

    def log_in(user: User, *scopes: str) -> APIClient:
        scopes = scopes or tuple(Scope.values)
        _, text = ApiToken.objects.issue(user=user, name="test", scopes=scopes, last_used_at=timezone.now())
        client = APIClient(raise_request_exception=False)
        client.credentials(HTTP_AUTHORIZATION=f"Token {text}")
        return client

    return log_in


def consume(consumer: str) -> None:
    """Have a consumer handle all that is in the outbox: what `manage.py consume` does, without Kafka."""
    handle_now(consumer)


@pytest.fixture
def emitted(db) -> Callable[..., list[Event]]:
    """The events of a type in the outbox, as a handler would see them; those of other fixtures as well."""
    return CapturedEvents(after_id=0).of


def assert_problem(response, status: int) -> dict:
    """Check that a response is a whole problem (RFC 9457), and return its body."""
    assert response.status_code == status, response.content
    assert response["Content-Type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status
    assert body["type"] == "about:blank"
    assert body["title"] and body["detail"]
    assert body["instance"] == response.wsgi_request.path
    assert body["correlation_id"] == response["X-Correlation-ID"]
    return body
