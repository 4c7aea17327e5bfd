"""ETags, and who may keep an answer."""

import pytest
from rest_framework.test import APIClient

from tests.voicehelper.conftest import PASSWORD, assert_problem
from tests.voicehelper.identity.test_races import meanwhile
from voicehelper.assistant.conf import AssistantSettings
from voicehelper.conversations.services import create_conversation, send_message
from voicehelper.identity.services import create_token
from voicehelper.knowledge.services import upload_document
from voicehelper.notifications.services import create_webhook

ONE = "/api/v1/conversations/{}"
WEBHOOKS = "/api/v1/webhooks"
PREFERENCES = "/api/v1/notification-preferences"


@pytest.fixture
def conversation(bob):
    return create_conversation(user=bob, title="Talk")


@pytest.fixture
def webhook(alice):
    return create_webhook(by=alice, url="http://127.0.0.1:9/hook")


def vary(answer) -> set[str]:
    return {name.strip() for name in answer["Vary"].split(",")}


def test_what_has_not_changed_is_not_sent_again(api, bob, conversation):
    client, url = api(bob), ONE.format(conversation.id)
    first = client.get(url)
    etag = first["ETag"]
    assert first["Cache-Control"] == "private, no-cache"
    assert {"Authorization", "Cookie"} <= vary(first)

    second = client.get(url, headers={"If-None-Match": etag})
    assert (second.status_code, second.content) == (304, b"")
    assert (second["ETag"], second["Cache-Control"], second["Vary"]) == (etag, "private, no-cache", first["Vary"])
    assert "Content-Length" not in second and "Content-Type" not in second
    assert second["X-Correlation-ID"]
    for others in ('"x", ' + etag, "W/" + etag, "*"):
        assert client.get(url, headers={"If-None-Match": others}).status_code == 304
    assert client.head(url)["ETag"] == etag
    assert client.head(url, headers={"If-None-Match": etag}).status_code == 304

    send_message(user=bob, conversation_id=conversation.id, content="Hello")
    third = client.get(url, headers={"If-None-Match": etag})
    assert (third.status_code, third.json()["message_count"]) == (200, 1)
    assert third["ETag"] != etag


def test_lists_and_files_have_one_too(api, bob, conversation):
    document = upload_document(user=bob, data=b"Elephants", file_name="notes.txt")
    client = api(bob)
    for url in ("/api/v1/conversations", "/api/v1/me", f"/api/v1/documents/{document.id}/content"):
        etag = client.get(url)["ETag"]
        assert client.get(url, headers={"If-None-Match": etag}).status_code == 304, url
    create_conversation(user=bob, title="Another")
    assert client.get("/api/v1/conversations")["ETag"] != etag


def test_an_etag_says_nothing_to_another_tenant(api, bob, charlie, conversation):
    url = ONE.format(conversation.id)
    etag = api(bob).get(url)["ETag"]
    for matching in (etag, "*"):
        answer = api(charlie).get(url, headers={"If-None-Match": matching})
        assert_problem(answer, 404)
        assert "ETag" not in answer
    assert_problem(APIClient().get(url, headers={"If-None-Match": etag}), 401)


@pytest.mark.parametrize("header", ["nonsense", '"', 'W/"', "\xff", '"' * 5000])
def test_an_etag_that_is_none(api, alice, conversation, webhook, header):
    client = api(alice)
    assert client.get(ONE.format(conversation.id), headers={"If-None-Match": header}).status_code == 200
    answer = client.patch(f"{WEBHOOKS}/{webhook.id}", {"active": False}, format="json", headers={"If-Match": header})
    assert_problem(answer, 412)


def test_what_is_refused_may_be_kept_by_nobody_else(api, bob, db):
    for answer in (api(bob).get("/api/v1/nothing"), APIClient().get("/api/v1/me")):
        assert "ETag" not in answer
        assert answer["Cache-Control"] == "private, no-cache"
        assert {"Authorization", "Cookie"} <= vary(answer)


def test_the_admins_pages_are_left_alone(client, alice):
    client.force_login(alice)
    answer = client.get("/admin/login/")
    assert "ETag" not in answer
    assert "Authorization" not in answer.get("Vary", "")


@pytest.fixture
def secrets(api, alice, webhook):
    """Every answer that holds a secret."""
    client, token = api(alice), create_token(user=alice, name="t", scopes=["read"], by=alice).token
    login = {"username": "alice", "password": PASSWORD}
    return {
        "login": client.post("/api/v1/auth/token", login, format="json"),
        "token": client.post("/api/v1/tokens", {"name": "t", "scopes": ["read"]}, format="json"),
        "rotated": client.post(f"/api/v1/tokens/{token.id}/rotate"),
        "webhook": client.post(WEBHOOKS, {"url": "http://127.0.0.1:9/other"}, format="json"),
        "secret": client.post(f"{WEBHOOKS}/{webhook.id}/rotate-secret"),
    }


def test_secrets_are_not_kept(secrets):
    for name, answer in secrets.items():
        assert answer.status_code in (200, 201), name
        assert {"token", "secret"} & set(answer.json()), name
        assert answer["Cache-Control"] == "no-store", name
        assert "ETag" not in answer, name


def test_a_stream_is_not_touched(api, bob, conversation, settings):
    settings.ASSISTANT = AssistantSettings(offline_word_seconds=0, search="tests.no_such_module.search")
    send_message(user=bob, conversation_id=conversation.id, content="Hello?")
    answer = api(bob).post(f"{ONE.format(conversation.id)}/replies", headers={"If-None-Match": "*"})
    assert answer.streaming
    assert answer["Cache-Control"] == "no-store"
    assert "ETag" not in answer
    assert b"event: message" in b"".join(answer.streaming_content)


# -- If-Match


@pytest.fixture
def changes(api, alice, bob, webhook):
    """What can be changed: where, a change, and another one."""
    preferences = [{"kind": "document.indexed", "channel": "in_app", "enabled": False}]
    return {
        "user": (f"/api/v1/users/{bob.id}", "patch", {"role": "admin"}, {"role": "member"}),
        "webhook": (f"{WEBHOOKS}/{webhook.id}", "patch", {"active": False}, {"description": "Mine"}),
        "preferences": (PREFERENCES, "put", {"preferences": preferences}, {"preferences": []}),
    }


@pytest.mark.parametrize("name", ["user", "webhook", "preferences"])
def test_of_two_who_change_the_same_the_second_is_told(name, changes, api, alice, emitted):
    url, method, change, other = changes[name]
    client = api(alice)
    send = getattr(client, method)
    etag = client.get(url)["ETag"]
    first = send(url, change, format="json", headers={"If-Match": etag})
    assert first.status_code == 200
    assert first["ETag"] == client.get(url)["ETag"] != etag

    events = len(emitted("identity.user.role.changed"))
    second = send(url, other, format="json", headers={"If-Match": etag})
    assert "ETag" not in second
    assert_problem(second, 412)
    assert client.get(url).json() == first.json()
    assert len(emitted("identity.user.role.changed")) == events
    # With the new one, with any, and without.
    for headers in ({"If-Match": f'"x", {first["ETag"]}'}, {"If-Match": "*"}, {}):
        assert send(url, other, format="json", headers=headers).status_code == 200
    assert client.get(url).json() != first.json()


def test_the_etag_is_that_of_the_same_representation(api, alice, webhook):
    client, url = api(alice), f"{WEBHOOKS}/{webhook.id}"
    indented = {"Accept": "application/json; indent=4"}
    etag = client.get(url, headers=indented)["ETag"]
    assert etag != client.get(url)["ETag"]
    headers = {"If-Match": etag}
    assert_problem(client.patch(url, {"active": False}, format="json", headers=headers), 412)
    assert client.patch(url, {"active": False}, format="json", headers=headers | indented).status_code == 200


def test_a_weak_etag_does_not_match(api, alice, webhook):
    client, url = api(alice), f"{WEBHOOKS}/{webhook.id}"
    headers = {"If-Match": "W/" + client.get(url)["ETag"]}
    assert_problem(client.patch(url, {"active": False}, format="json", headers=headers), 412)


def test_what_is_not_there_is_404_whatever_should_match(api, charlie, webhook, bob):
    for url in (f"{WEBHOOKS}/{webhook.id}", f"/api/v1/users/{bob.id}"):
        answer = api(charlie).patch(url, {}, format="json", headers={"If-Match": "*"})
        assert_problem(answer, 404)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("name", ["user", "webhook", "preferences"])
def test_nobody_comes_between_the_look_and_the_change(name, api, alice, changes):
    url, method, change, other = changes[name]
    client, another = api(alice), api(alice)
    headers = {"If-Match": client.get(url)["ETag"]}
    with meanwhile(lambda: getattr(another, method)(url, other, format="json", headers=headers)) as second:
        first = getattr(client, method)(url, change, format="json", headers=headers)
    assert first.status_code == 200
    assert second["waited"]
    assert_problem(second["result"], 412)
    assert client.get(url).json() == first.json()
