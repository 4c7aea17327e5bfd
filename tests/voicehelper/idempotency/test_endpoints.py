"""Every POST of the API takes an Idempotency-Key, or says that it does not."""

import re
from pathlib import Path

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from rest_framework.test import APIClient

from tests.voicehelper.conftest import PASSWORD, assert_problem
from tests.voicehelper.endpoints import PK, endpoints, new_rows, rows
from tests.voicehelper.knowledge.files import pdf
from voicehelper.conversations.services import create_conversation, send_message
from voicehelper.idempotency.models import KeptAnswer
from voicehelper.identity.models import User
from voicehelper.identity.services import create_token
from voicehelper.knowledge.models import Document
from voicehelper.notifications.services import create_webhook, notify

GUIDE = Path(__file__).parents[3] / "docs" / "api.md"
DOCUMENTS, USERS = "/api/v1/documents", "/api/v1/users"
KEY = {"Idempotency-Key": "k1"}
TAKES = {
    "users": {"username": "eve", "password": PASSWORD},
    "conversations": {"title": "Talk"},
    "conversations/<uuid:pk>/complete": {},
    "conversations/<uuid:pk>/fail": {},
    "messages": {"conversation_id": "{conversation}", "content": "Hello"},
    "documents": None,  # a form
    "notifications/<uuid:pk>/read": {},
    "webhooks/<uuid:pk>/test": {},
}
REFUSES = {
    "auth/token": {"username": "alice", "password": PASSWORD},
    "tokens": {"name": "t", "scopes": ["read"]},
    "tokens/<uuid:pk>/rotate": {},
    "webhooks": {"url": "http://127.0.0.1:9/"},
    "webhooks/<uuid:pk>/rotate-secret": {},
    "conversations/<uuid:pk>/replies": {},
}


@pytest.fixture
def client(api, alice) -> APIClient:
    return api(alice)


@pytest.fixture
def ids(alice) -> dict[str, str]:
    conversation = create_conversation(user=alice, title="Talk")
    send_message(user=alice, conversation_id=conversation.id, content="Hello?")
    return {
        "conversations": str(conversation.id),
        "tokens": str(create_token(user=alice, name="t", scopes=["read"]).token.id),
        "notifications": str(notify(recipient=alice, kind="document.indexed", aggregate_id="x", subject="x").id),
        "webhooks": str(create_webhook(by=alice, url="http://127.0.0.1:9/").id),
    }


def upload(client, data: bytes = b"Elephants", name="notes.txt", content_type="text/plain", headers=KEY, **fields):
    file = SimpleUploadedFile(name, data, content_type)
    return client.post(DOCUMENTS, {"file": file, **fields}, format="multipart", headers=headers)


def post(client, route: str, body, ids: dict[str, str]):
    if body is None:
        return upload(client)
    body = {name: ids["conversations"] if name == "conversation_id" else value for name, value in body.items()}
    url = f"/api/v1/{route.replace(PK, ids.get(route.split('/')[0], ''))}"
    return client.post(url, body, format="json", headers=KEY | {"Accept": "application/json"})


def test_every_post_is_known():
    posts = {one.route for one in endpoints() if "POST" in one.methods} | {"auth/token"}
    assert posts == {*TAKES, *REFUSES}
    assert not TAKES.keys() & REFUSES.keys()


def test_the_guide_tells_which():
    table = re.findall(r"^\| (`/.+?) \| is (heeded|refused)", GUIDE.read_text(), re.MULTILINE)
    told = {word: set() for word in ("heeded", "refused")}
    for paths, word in table:
        told[word] |= set(re.findall(r"`/(.+?)`", paths.replace("{id}", PK)))
    assert told == {"heeded": set(TAKES), "refused": set(REFUSES)}


@pytest.mark.parametrize("route", TAKES)
def test_those_that_take_a_key(route, client, ids):
    first = post(client, route, TAKES[route], ids)
    assert first.status_code in (200, 201, 202)
    before = rows()
    second = post(client, route, TAKES[route], ids)
    assert (second.status_code, second.json()) == (first.status_code, first.json())
    assert second["Idempotency-Replayed"] == "true" and "Idempotency-Replayed" not in first
    assert new_rows(before) == []


@pytest.mark.parametrize("route", REFUSES)
def test_those_that_do_not(route, client, ids):
    before = rows()
    problem = assert_problem(post(client, route, REFUSES[route], ids), 400)
    assert list(problem["errors"]) == ["Idempotency-Key"]
    assert new_rows(before) == []


def test_a_file_sent_again_is_one_document(client, emitted):
    data = pdf("One", "Two") + b"\xff\x00"
    answers = [upload(client, data, "a.pdf", "application/pdf", title="A") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [201] * 3
    assert len({answer.json()["id"] for answer in answers}) == 1
    # The fingerprint has left the file whole.
    assert bytes(Document.objects.get().content.data) == data
    assert len(emitted("document.uploaded")) == 1


def test_a_large_file_is_one_document(client):
    """It comes in pieces, and from the disk."""
    data = b"Elephant " * 500_000
    assert len({upload(client, data).json()["id"] for _ in range(2)}) == 1
    assert bytes(Document.objects.get().content.data) == data
    assert_problem(upload(client, data[:-1] + b"!"), 422)


@pytest.mark.parametrize(
    "other",
    [{"data": b"Elephant!"}, {"name": "other.txt"}, {"content_type": "text/markdown"}, {"title": "Other"}],
    ids=str,
)
def test_another_file_is_another_request(client, other):
    assert upload(client).status_code == 201
    assert_problem(upload(client, **other), 422)
    assert Document.objects.count() == 1


def test_a_form_that_is_refused_is_not_kept(client):
    assert_problem(upload(client, b"\x00"), 400)
    assert not KeptAnswer.objects.exists()
    assert upload(client).status_code == 201


def test_a_users_password_cannot_be_guessed_from_what_is_kept(client, settings):
    body = {"username": "eve", "password": PASSWORD}
    prints = []
    for key in ("first key of the server", "another"):
        settings.SECRET_KEY = key
        client.post(USERS, body, format="json", headers=KEY)
        prints.append(bytes(KeptAnswer.objects.get().fingerprint))
        KeptAnswer.objects.all().delete()
        User.objects.filter(username="eve").delete()
    assert prints[0] != prints[1]


def test_a_username_that_is_taken_is_not_kept(client, bob):
    body = {"username": "bob", "password": PASSWORD}
    assert_problem(client.post(USERS, body, format="json", headers=KEY), 400)
    assert not KeptAnswer.objects.exists()


def test_who_moves_to_another_tenant_leaves_the_answers_behind(api, bob, charlie):
    client = api(bob)
    assert client.post("/api/v1/conversations", {"title": "Secret"}, format="json", headers=KEY).status_code == 201
    bob.tenant = charlie.tenant
    bob.save()
    answer = client.post("/api/v1/conversations", {"title": "Secret"}, format="json", headers=KEY)
    assert_problem(answer, 422)


def test_a_key_opens_nothing(api, alice, bob):
    """Who may not do it any more is not told what was answered."""
    body = {"username": "eve", "password": PASSWORD}
    client = api(alice)
    assert client.post(USERS, body, format="json", headers=KEY).status_code == 201
    assert_problem(api(alice, "read", "write").post(USERS, body, format="json", headers=KEY), 403)
    alice.role = User.Role.MEMBER
    alice.save()
    assert_problem(client.post(USERS, body, format="json", headers=KEY), 403)
    assert_problem(APIClient().post(USERS, body, format="json", headers=KEY), 401)
