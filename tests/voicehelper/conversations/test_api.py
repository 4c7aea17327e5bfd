import base64
import json
import uuid

import pytest
from rest_framework.test import APIClient

from tests.voicehelper.conftest import assert_problem
from voicehelper.conversations.models import Conversation, Message
from voicehelper.conversations.services import create_conversation, send_message

CONVERSATIONS = "/api/v1/conversations"
MESSAGES = "/api/v1/messages"
MISSING = "01936d2e-0000-7000-8000-000000000000"
LONGEST_TITLE = "ü" * 200
LONGEST_CONTENT = "👋" * 32_000


@pytest.fixture
def conversation(bob) -> Conversation:
    return create_conversation(user=bob, title="Roadmap")


def walk(client, path: str) -> list[dict]:
    """Follow a list's pages from the first to the last."""
    rows, url = [], path
    while url:
        page = client.get(url).json()
        rows += page["results"]
        url = page["next"]
    return rows


def test_create_and_read_a_conversation(api, alice, bob, emitted):
    answer = api(bob).post(CONVERSATIONS, {"title": " Roadmap ", "mode": "workflow"}, format="json")

    assert answer.status_code == 201
    body = answer.json()
    assert (body["title"], body["mode"], body["message_count"]) == ("Roadmap", "workflow", 0)
    assert (body["status"], body["ended_at"], body["failure_reason"]) == ("active", None, "")
    assert body["user_id"] == str(bob.id)
    assert uuid.UUID(body["id"]).version == 7
    assert len(emitted("conversation.created")) == 1
    # A colleague sees it, too.
    assert api(alice).get(f"{CONVERSATIONS}/{body['id']}").json() == body
    assert api(alice).get(CONVERSATIONS).json()["results"] == [body]


def test_the_default_mode_is_chat(api, bob):
    assert api(bob).post(CONVERSATIONS, {"title": "Roadmap"}, format="json").json()["mode"] == "chat"


def test_post_and_read_messages(api, alice, bob, conversation):
    first = api(bob).post(MESSAGES, {"conversation_id": conversation.id, "content": " Hi\n"}, format="json")
    reply = {"conversation_id": conversation.id, "content": "Hello", "role": "assistant"}
    second = api(alice).post(MESSAGES, reply, format="json")

    assert (first.status_code, second.status_code) == (201, 201)
    assert (first.json()["content"], first.json()["role"], first.json()["position"]) == (" Hi\n", "user", 1)
    assert (second.json()["role"], second.json()["user_id"]) == ("assistant", str(alice.id))
    messages = api(bob).get(f"{CONVERSATIONS}/{conversation.id}/messages").json()["results"]
    assert messages == [first.json(), second.json()]
    assert api(bob).get(f"{CONVERSATIONS}/{conversation.id}").json()["message_count"] == 2


def test_another_tenant_sees_nothing(api, charlie, conversation, emitted):
    client = api(charlie)

    assert client.get(CONVERSATIONS).json()["results"] == []
    assert_problem(client.get(f"{CONVERSATIONS}/{conversation.id}"), 404)
    assert_problem(client.get(f"{CONVERSATIONS}/{conversation.id}/messages"), 404)
    new = {"conversation_id": conversation.id, "content": "Let me in"}
    assert_problem(client.post(MESSAGES, new, format="json"), 404)
    assert emitted("conversation.message.sent") == []


def test_an_unknown_conversation(api, bob):
    assert_problem(api(bob).get(f"{CONVERSATIONS}/{MISSING}"), 404)
    assert_problem(api(bob).get(f"{CONVERSATIONS}/nonsense"), 404)
    assert_problem(api(bob).get(f"{CONVERSATIONS}/{MISSING}/messages"), 404)
    assert_problem(api(bob).post(MESSAGES, {"conversation_id": MISSING, "content": "x"}, format="json"), 404)


def test_conversations_come_newest_first_over_pages(api, bob):
    made = [create_conversation(user=bob, title=str(number)) for number in range(120)]
    rows = walk(api(bob), CONVERSATIONS)
    assert [row["id"] for row in rows] == [str(one.id) for one in reversed(made)]


def test_messages_come_in_order_over_pages(api, bob, conversation):
    for number in range(120):
        send_message(user=bob, conversation_id=conversation.id, content=str(number))
    rows = walk(api(bob), f"{CONVERSATIONS}/{conversation.id}/messages")
    assert [row["content"] for row in rows] == [str(number) for number in range(120)]


def test_a_list_costs_as_many_queries_for_many_rows_as_for_one(api, bob, django_assert_num_queries):
    client = api(bob)
    for number in range(20):
        conversation = create_conversation(user=bob, title=str(number))
        send_message(user=bob, conversation_id=conversation.id, content="Hi")
    with django_assert_num_queries(2):  # the token with its user, the page
        assert len(client.get(CONVERSATIONS).json()["results"]) == 20
    with django_assert_num_queries(3):  # and the conversation
        client.get(f"{CONVERSATIONS}/{conversation.id}/messages")


@pytest.mark.parametrize("position", ["nonsense", "\x00", "1e9", "9" * 5_000])
@pytest.mark.parametrize("path", ["", "/{id}/messages"])
def test_a_made_up_cursor(api, bob, conversation, path, position):
    cursor = base64.b64encode(f"p={position}".encode()).decode()
    url = CONVERSATIONS + path.format(id=conversation.id)
    assert_problem(api(bob).get(url, {"cursor": cursor}), 404)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "title"),
        ({"title": ""}, "title"),
        ({"title": "  "}, "title"),
        ({"title": None}, "title"),
        ({"title": ["a"]}, "title"),
        ({"title": LONGEST_TITLE + "x"}, "title"),
        ({"title": "a\x00b"}, "title"),
        ({"title": "a\ud800b"}, "title"),
        ({"title": "a", "mode": "shout"}, "mode"),
        ({"title": "a", "mode": "\ud800"}, "mode"),
        ({"title": "a", "mode": {}}, "mode"),
        ([], "non_field_errors"),
        ("text", "non_field_errors"),
    ],
)
def test_a_conversation_that_is_not_valid(api, bob, body, field):
    answer = api(bob).post(CONVERSATIONS, json.dumps(body), content_type="application/json")
    problem = assert_problem(answer, 400)
    assert list(problem["errors"]) == [field]
    assert not Conversation.objects.exists()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"content": None}, "content"),
        ({"content": ""}, "content"),
        ({"content": LONGEST_CONTENT + "x"}, "content"),
        ({"content": "a\x00b"}, "content"),
        ({"content": "a\udc00b"}, "content"),
        ({"role": "owner"}, "role"),
        ({"role": "\ud800"}, "role"),
        ({"duration_ms": 100}, "duration_ms"),  # in a chat
        ({"duration_ms": "long"}, "duration_ms"),
        ({"conversation_id": "nonsense"}, "conversation_id"),
        ({"conversation_id": "\ud800"}, "conversation_id"),
        ({"conversation_id": 10**40}, "conversation_id"),
    ],
)
def test_a_message_that_is_not_valid(api, bob, conversation, change, field):
    body = {"conversation_id": str(conversation.id), "content": "Hi", **change}
    answer = api(bob).post(MESSAGES, json.dumps(body), content_type="application/json")
    problem = assert_problem(answer, 400)
    assert list(problem["errors"]) == [field]
    assert not Message.objects.exists()


def test_a_spoken_message(api, bob):
    conversation = create_conversation(user=bob, title="Roadmap", mode="voice")
    new = {"conversation_id": conversation.id, "content": "The transcript", "duration_ms": 1_250}
    sent = api(bob).post(MESSAGES, new, format="json")
    assert (sent.status_code, sent.json()["duration_ms"]) == (201, 1_250)
    assert api(bob).get(f"{CONVERSATIONS}/{conversation.id}/messages").json()["results"] == [sent.json()]
    for wrong in (0, -1, 3_600_001, 1.5, True, None, "", [], 10**30):
        problem = assert_problem(api(bob).post(MESSAGES, {**new, "duration_ms": wrong}, format="json"), 400)
        assert list(problem["errors"]) == ["duration_ms"]
    assert Message.objects.count() == 1


def test_the_longest_texts_are_kept_whole(api, bob, emitted):
    created = api(bob).post(CONVERSATIONS, {"title": LONGEST_TITLE}, format="json").json()
    sent = api(bob).post(MESSAGES, {"conversation_id": created["id"], "content": LONGEST_CONTENT}, format="json")

    assert sent.status_code == 201
    assert Conversation.objects.get().title == LONGEST_TITLE
    assert Message.objects.get().content == LONGEST_CONTENT
    assert emitted("conversation.message.sent")[0].payload.content == LONGEST_CONTENT


@pytest.mark.parametrize(
    "body",
    [b"{", b"", b"\xff\xfe", b'{"title": NaN}', b"[" * 100_000, b'{"title": ' + b"9" * 5_000 + b"}"],
    ids=["open", "empty", "not UTF-8", "NaN", "deep", "big number"],
)
def test_a_body_that_is_no_json(api, bob, body):
    answer = api(bob).post(CONVERSATIONS, body, content_type="application/json")
    assert_problem(answer, 400)
    assert not Conversation.objects.exists()


def test_a_body_that_is_too_large(api, bob, settings):
    body = json.dumps({"title": "x" * settings.DATA_UPLOAD_MAX_MEMORY_SIZE})
    assert_problem(api(bob).post(CONVERSATIONS, body, content_type="application/json"), 413)


def test_a_body_of_another_type(api, bob):
    assert_problem(api(bob).post(CONVERSATIONS, "title=a", content_type="text/plain"), 415)


@pytest.mark.parametrize(
    ("method", "path"),
    [("put", CONVERSATIONS), ("get", MESSAGES), ("delete", f"{CONVERSATIONS}/{MISSING}")],
)
def test_a_method_that_is_not_offered(api, bob, method, path):
    answer = getattr(api(bob), method)(path)
    assert_problem(answer, 405)
    assert answer["Allow"]


@pytest.mark.parametrize(("action", "status"), [("complete", "completed"), ("fail", "failed")])
def test_end_a_conversation(api, alice, bob, conversation, emitted, action, status):
    assert api(bob).get(f"{CONVERSATIONS}/{conversation.id}").json()["ended_at"] is None
    answer = api(alice).post(f"{CONVERSATIONS}/{conversation.id}/{action}")

    assert (answer.status_code, answer.json()["status"]) == (200, status)
    assert answer.json()["ended_at"] is not None
    assert api(bob).get(f"{CONVERSATIONS}/{conversation.id}").json() == answer.json()
    assert len(emitted(f"conversation.{status}")) == 1
    for again in ("complete", "fail"):
        assert_problem(api(bob).post(f"{CONVERSATIONS}/{conversation.id}/{again}"), 409)
    new = {"conversation_id": conversation.id, "content": "One more thing"}
    assert_problem(api(bob).post(MESSAGES, new, format="json"), 409)


@pytest.mark.parametrize("action", ["complete", "fail"])
def test_a_conversation_that_cannot_be_ended(api, bob, charlie, conversation, action):
    assert_problem(api(charlie).post(f"{CONVERSATIONS}/{conversation.id}/{action}"), 404)
    assert_problem(api(bob).post(f"{CONVERSATIONS}/{MISSING}/{action}"), 404)
    assert_problem(api(bob).get(f"{CONVERSATIONS}/{conversation.id}/{action}"), 405)
    assert_problem(APIClient(raise_request_exception=False).post(f"{CONVERSATIONS}/{conversation.id}/{action}"), 401)
    conversation.refresh_from_db()
    assert conversation.status == "active"


@pytest.mark.parametrize("path", [CONVERSATIONS, f"{CONVERSATIONS}/{MISSING}", MESSAGES])
def test_strangers_stay_outside(db, path):
    assert_problem(APIClient(raise_request_exception=False).get(path), 401)


def test_a_logged_in_browser_needs_the_csrf_token(bob):
    browser = APIClient(enforce_csrf_checks=True, raise_request_exception=False)
    browser.force_login(bob)
    assert browser.get(CONVERSATIONS).status_code == 200
    assert_problem(browser.post(CONVERSATIONS, {"title": "a"}, format="json"), 403)
