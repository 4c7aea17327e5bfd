"""Nothing of one tenant is visible to another, nor changed by it: every endpoint of the API is tried.

The tenant Demo, of alice and bob, has one of everything. charlie, an admin of the tenant Other, and dora, a member of
it, ask for it in every way the API has. What is not theirs has to look exactly as what does not exist.
"""

import json
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from django.utils import timezone
from rest_framework.test import APIClient

from tests.voicehelper.conftest import PASSWORD, consume
from tests.voicehelper.endpoints import METHODS, PK, UNSAFE, Endpoint, endpoints, new_rows, rows
from tests.voicehelper.knowledge.conftest import change, milvus, milvus_server  # noqa: F401
from voicehelper.analytics.models import DailyTotal
from voicehelper.assistant.conf import AssistantSettings
from voicehelper.conversations.services import create_conversation, send_message
from voicehelper.identity.models import Scope, User
from voicehelper.identity.services import create_token, register_user
from voicehelper.knowledge.services import index_document, upload_document
from voicehelper.notifications.services import create_webhook, notify, try_webhook
from voicehelper.pagination import NewestFirst

# Of each endpoint with an id: what of the first tenant has such an id. A new endpoint is to be added here.
OBJECTS: dict[str, str] = {
    "users/<uuid:pk>": "user",
    "tokens/<uuid:pk>": "token",
    "tokens/<uuid:pk>/rotate": "token",
    "conversations/<uuid:pk>": "conversation",
    "conversations/<uuid:pk>/complete": "conversation",
    "conversations/<uuid:pk>/fail": "conversation",
    "conversations/<uuid:pk>/messages": "conversation",
    "conversations/<uuid:pk>/replies": "conversation",
    "documents/<uuid:pk>": "document",
    "documents/<uuid:pk>/content": "document",
    "notifications/<uuid:pk>/read": "notification",
    "webhooks/<uuid:pk>": "webhook",
    "webhooks/<uuid:pk>/test": "webhook",
    "webhooks/<uuid:pk>/rotate-secret": "webhook",
    "webhooks/<uuid:pk>/deliveries": "webhook",
}
# Of each endpoint without one: the queries that name something of the first tenant, or would find it.
COLLECTIONS: dict[str, list[str]] = {
    "auth/me": [],
    "me": [],
    "tenant": [],
    "users": [],
    "tokens": ["user_id={user}"],
    "conversations": [],
    "messages": [],
    "documents": [],
    "search": ["q=elephant", "q=elephant&limit=20"],
    "notifications": [],
    "notification-preferences": [],
    "webhooks": [],
    "analytics/summary": ["model=m1", "mode=voice"],
    "analytics/daily": ["model=m1", "mode=voice"],
    "audit": ["event_type=conversation.created", "since=2020-01-01T00:00:00Z"],
}
# Bodies with which the endpoints do something, if they are let.
BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("PATCH", "users/<uuid:pk>"): {"role": "admin"},
    ("PATCH", "webhooks/<uuid:pk>"): {"active": False},
    ("POST", "users"): {"username": "eve", "password": PASSWORD},
    ("POST", "tokens"): {"name": "another", "scopes": ["read"]},
    ("POST", "conversations"): {"title": "Mine"},
    ("POST", "messages"): {"conversation_id": "{conversation}", "content": "Hello"},
    ("POST", "webhooks"): {"url": "http://127.0.0.1:9/mine"},
    ("PUT", "notification-preferences"): {
        "preferences": [{"kind": "document.indexed", "channel": "in_app", "enabled": False}]
    },
}
# What anybody might think the API takes, with what it could name.
GUESSES = "tenant={tenant}&tenant_id={tenant}&user={user}&user_id={user}&id={conversation}&pk={conversation}\
&conversation={conversation}&conversation_id={conversation}&document_id={document}&webhook={webhook}&search=elephant"


def ids(endpoint: Endpoint) -> str:
    return endpoint.route


WITH_ID = pytest.mark.parametrize("endpoint", [one for one in endpoints() if PK in one.route], ids=ids)
WITHOUT_ID = pytest.mark.parametrize("endpoint", [one for one in endpoints() if PK not in one.route], ids=ids)


@pytest.fixture(autouse=True)
def without_search(settings):
    """Replies that need nothing else."""
    settings.ASSISTANT = AssistantSettings(offline_word_seconds=0, search="tests.no_such_module.search")


@pytest.fixture
def demo(alice, bob) -> SimpleNamespace:
    """One of everything that a tenant may have."""
    conversation = create_conversation(user=bob, title="elephant talk", mode="voice")
    send_message(user=bob, conversation_id=conversation.id, content="elephant question")
    document = upload_document(user=bob, data=b"The elephant is grey.", file_name="elephant.txt")
    webhook = create_webhook(by=alice, url="http://127.0.0.1:9/elephant")
    delivery = try_webhook(by=alice, endpoint_id=webhook.id)
    notification = notify(recipient=bob, kind="document.indexed", aggregate_id="elephant", subject="elephant")
    token = create_token(user=bob, name="elephant", scopes=["read"]).token
    DailyTotal.objects.create(
        tenant_id=bob.tenant_id, day=timezone.now().date(), mode="voice", model="m1", messages=424242
    )
    for consumer in ("analytics", "notification", "audit"):
        consume(consumer)
    return SimpleNamespace(
        tenant=bob.tenant_id,
        user=bob.id,
        admin=alice.id,
        conversation=conversation.id,
        message=conversation.messages.get().id,
        document=document.id,
        webhook=webhook.id,
        delivery=delivery.id,
        notification=notification.id,
        token=token.id,
        prefix=token.prefix,
    )


@pytest.fixture
def dora(charlie) -> User:
    return register_user(tenant=charlie.tenant, username="dora", password=PASSWORD)


@pytest.fixture
def others(api, charlie, dora) -> dict[str, APIClient]:
    """Clients of another tenant's users, with tokens of all scopes and of each single one."""
    create_conversation(user=charlie, title="Other talk")
    return {
        f"{user.username}, {', '.join(scopes)}": api(user, *scopes)
        for user in (charlie, dora)
        for scopes in (tuple(Scope.values), *((scope,) for scope in Scope.values))
    }


def traces(demo: SimpleNamespace, text: str) -> list[str]:
    """What of the first tenant a text tells."""
    names = [*(str(value) for value in vars(demo).values()), "elephant", "424242", "Demo", "alice", "bob"]
    return [name for name in names if name in text or name.replace("-", "") in text]


def send(client: APIClient, method: str, url: str, body: dict[str, Any] | None = None):
    if url.endswith("/documents") and method == "POST":
        return client.post(url, {"title": "no file"}, format="multipart")
    return client.generic(method, url, json.dumps(body or {}), "application/json", headers={"Accept": "*/*"})


def text_of(answer) -> str:
    content = b"".join(answer.streaming_content) if answer.streaming else answer.content
    return "\n".join((*(f"{name}: {value}" for name, value in answer.items()), content.decode()))


def looks_like(answer, pk: UUID) -> tuple[int, str]:
    """A status and what was said, without what is different for each request."""
    own = answer["X-Correlation-ID"]
    return answer.status_code, text_of(answer).replace(own, "ID").replace(str(pk), "PK")


def filled(value: Any, demo: SimpleNamespace) -> Any:
    if isinstance(value, dict):
        return {name: filled(item, demo) for name, item in value.items()}
    return value.format(**vars(demo)) if isinstance(value, str) else value


def try_everything(client: APIClient, demo: SimpleNamespace, only: Callable[[Endpoint, str], bool] | None = None):
    """Ask for all there is with every method; yield what was asked, and the answer."""
    for endpoint in endpoints():
        for method in METHODS:
            if only is None or only(endpoint, method):
                url = endpoint.url(getattr(demo, OBJECTS.get(endpoint.route, ""), ""))
                answer = send(client, method, url, filled(BODIES.get((method, endpoint.route)), demo))
                yield f"{method} {endpoint.route}", answer


def test_every_endpoint_has_its_object():
    with_id = {one.route for one in endpoints() if PK in one.route}
    without = {one.route for one in endpoints() if PK not in one.route}
    assert all("<" not in route.replace(PK, "") for route in with_id | without), "ids of another kind"
    assert with_id == set(OBJECTS), "tell OBJECTS what an id of the endpoint is of"
    assert without == set(COLLECTIONS), "tell COLLECTIONS which queries the endpoint takes"
    methods = {(method, one.route) for one in endpoints() for method in one.methods}
    assert set(BODIES) <= methods


@WITH_ID
def test_what_is_anothers_looks_as_if_it_were_not_there(endpoint, demo, others):
    pk, missing = getattr(demo, OBJECTS[endpoint.route]), uuid4()
    before = rows()
    for who, client in others.items():
        for method in METHODS:
            body = BODIES.get((method, endpoint.route))
            theirs, nobodys = (send(client, method, endpoint.url(one), body) for one in (pk, missing))
            case = f"{method} as {who}"
            assert looks_like(theirs, pk) == looks_like(nobodys, missing), case
            if method not in endpoint.methods:
                assert theirs.status_code in (403, 405), case
            elif method != "OPTIONS":
                assert theirs.status_code in (403, 404), case
            assert not traces(demo, looks_like(theirs, pk)[1]), case
    # At least who may do everything gets as far as the object.
    everything = next(iter(others.values()))
    for method in endpoint.methods - {"OPTIONS"}:
        assert send(everything, method, endpoint.url(pk), BODIES.get((method, endpoint.route))).status_code == 404
    assert new_rows(before) == []


@WITHOUT_ID
def test_what_is_anothers_is_in_no_list(endpoint, demo, others, request):
    if endpoint.route == "search":
        request.getfixturevalue("milvus")
        index_document(document_id=demo.document)
    before = rows()
    for who, client in others.items():
        for query in ["", *COLLECTIONS[endpoint.route], GUESSES]:
            url = f"{endpoint.url()}?{filled(query, demo)}"
            for method in METHODS:
                body = filled(BODIES.get((method, endpoint.route)), demo)
                answer = send(client, method, url, body)
                case = f"{method} {query} as {who}"
                assert answer.status_code < 500, case
                assert not traces(demo, text_of(answer)), case
                if method == "GET" and endpoint.route == "tokens" and "user_id" in query:
                    assert answer.status_code == 403 or answer.json()["results"] == [], case
    # What they made is theirs, and so are the events of it.
    for row in new_rows(before):
        assert not traces(demo, row)


def test_a_message_to_anothers_conversation(demo, others):
    before = rows()
    for who, client in others.items():
        answer = send(client, "POST", "/api/v1/messages", filled(BODIES["POST", "messages"], demo))
        assert answer.status_code == (404 if "write" in who else 403), who
    assert new_rows(before) == []


@pytest.mark.parametrize("route", ["users", "tokens", "conversations", "notifications", "webhooks", "documents"])
def test_anothers_cursor_leads_to_nothing(route, api, alice, charlie, demo, monkeypatch):
    """A link to the next page, handed on."""
    monkeypatch.setattr(NewestFirst, "page_size", 1)
    create_conversation(user=alice, title="elephant again")
    consume("notification")
    upload_document(user=alice, data=b"elephant", file_name="elephant.txt")
    create_webhook(by=alice, url="http://127.0.0.1:9/elephant")
    notify(recipient=alice, kind="document.indexed", aggregate_id="elephant", subject="elephant")
    notify(recipient=alice, kind="document.indexed", aggregate_id="elephant", subject="elephant")
    link = api(alice).get(f"/api/v1/{route}").json()["next"]
    assert link is not None
    answer = api(charlie).get(link)
    assert answer.status_code == 200
    assert not traces(demo, text_of(answer))


def test_without_a_token_nothing_opens(demo, api, bob):
    revoked = api(bob)
    bob.api_tokens.filter(name="test").update(revoked_at=timezone.now())
    expired = api(bob)
    bob.api_tokens.filter(name="test", revoked_at=None).update(expires_at=timezone.now() - timedelta(seconds=1))
    anybody, wrong = APIClient(raise_request_exception=False), APIClient(raise_request_exception=False)
    wrong.credentials(HTTP_AUTHORIZATION=f"Token {demo.prefix}_{'x' * 43}")
    before = rows()
    for who, client in {"anybody": anybody, "wrong": wrong, "revoked": revoked, "expired": expired}.items():
        for case, answer in try_everything(client, demo):
            assert (answer.status_code, answer["WWW-Authenticate"]) == (401, "Token"), f"{case} {who}"
            assert answer["Content-Type"] == "application/problem+json", f"{case} {who}"
    assert new_rows(before) == []


def test_an_operator_without_a_tenant_gets_in_nowhere(demo, api):
    client = api(User.objects.create_superuser("operator", password=PASSWORD))
    before = rows()
    assert [case for case, answer in try_everything(client, demo) if answer.status_code != 403] == []
    assert new_rows(before) == []


@pytest.mark.parametrize("scope", Scope.values)
def test_a_token_does_no_more_than_its_scope_says(scope, demo, api, alice):
    """Also within the tenant, and for its admin."""

    def lacks(endpoint: Endpoint, method: str) -> bool:
        return scope != getattr(endpoint.view, "scopes", {}).get(
            method, Scope.WRITE if method in UNSAFE else Scope.READ
        )

    client = api(alice, scope)
    before = rows()
    tried = list(try_everything(client, demo, only=lacks))
    assert len(tried) > 50
    assert [case for case, answer in tried if answer.status_code != 403] == []
    assert new_rows(before) == []
