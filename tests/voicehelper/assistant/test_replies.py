"""The assistant's reply over the API: streamed and whole, stored and emitted, refused and failed."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise

import psycopg
import pytest
from django.db import connection
from django.utils import timezone
from rest_framework.test import APIClient

from events_outbox.models import OutboxEvent
from tests.monitoring.conftest import counted
from tests.voicehelper.conftest import assert_problem
from voicehelper.assistant.orchestrator import Answer
from voicehelper.assistant.providers import ProviderFailed
from voicehelper.conversations import replies
from voicehelper.conversations.models import Conversation, Message
from voicehelper.conversations.services import (
    ConversationEnded,
    NothingToAnswer,
    ReplyInProgress,
    ReplyLost,
    abandon_reply,
    begin_reply,
    complete_conversation,
    create_conversation,
    fail_reply,
    finish_reply,
    prolong_reply,
    send_message,
)

from . import search_stubs
from .events import read
from .llm_server import breaks_off, hangs, refuses, says, says_and_waits

JSON = "application/json"
COST = (120 * 0.15 + 30 * 0.6) / 1_000_000


def url(conversation):
    return f"/api/v1/conversations/{conversation.id}/replies"


def sent(emitted):
    """The events of the assistant's messages."""
    return [event for event in emitted("conversation.message.sent") if event.payload.role == "assistant"]


def add(user, conversation, content="And then?", **fields):
    return send_message(user=user, conversation_id=conversation.id, content=content, **fields)


# --- The built-in provider ---


def test_a_first_run(api, bob, conversation, settings, emitted):
    """No endpoint, no key: a question is answered from the documents, word by word, and counted."""
    settings.ASSISTANT = replace(settings.ASSISTANT, search=f"{search_stubs.__name__}.search")
    before = counted("llm_tokens_used_total", provider="offline", model="offline-simple", token_type="output")
    *tokens, (event, message) = read(api(bob).post(url(conversation)))

    assert event == "message"
    assert {name for name, _ in tokens} == {"token"}
    assert len(tokens) == 7
    assert "".join(data["text"] for _, data in tokens) == message["content"]
    assert message["content"] == "The release is on Friday. (From 'Roadmap'.)"
    assert (message["role"], message["position"], message["model"]) == ("assistant", 2, "offline-simple")
    assert api(bob).get(f"/api/v1/conversations/{conversation.id}/messages").json()["results"][1] == message
    counted_now = counted("llm_tokens_used_total", provider="offline", model="offline-simple", token_type="output")
    assert counted_now - before == message["output_tokens"] > 0
    assert sent(emitted)[0].payload.cost_dollars == message["cost_dollars"] > 0


# --- What is streamed, stored and emitted ---


def test_a_streamed_reply(api, alice, bob, conversation, assistant, server, emitted, metrics):
    server.acts = [says("On ", "Friday.")]
    answer = api(alice).post(url(conversation), HTTP_ACCEPT="text/event-stream", HTTP_X_CORRELATION_ID="abc")
    got = read(answer)

    assert (answer["Cache-Control"], answer["X-Accel-Buffering"]) == ("no-store", "no")
    assert got[:2] == [("token", {"text": "On "}), ("token", {"text": "Friday."})]
    [(name, message)] = got[2:]
    assert name == "message"
    stored = Message.objects.get(role="assistant")
    assert message == {
        "id": str(stored.id),
        "conversation_id": str(conversation.id),
        "user_id": str(alice.id),
        "position": 2,
        "role": "assistant",
        "content": "On Friday.",
        "duration_ms": None,
        "created_at": message["created_at"],
        "model": "gpt-4o-mini",
        "input_tokens": 120,
        "output_tokens": 30,
        "cost_dollars": pytest.approx(COST),
        "latency_seconds": stored.latency_seconds,
    }
    assert stored.answers.content == "When is the release?"
    conversation.refresh_from_db()
    assert (conversation.message_count, conversation.reply_id, conversation.reply_until) == (2, None, None)
    [event] = sent(emitted)
    assert (event.tenant_id, event.user_id, event.aggregate_id) == (
        str(bob.tenant_id),
        str(alice.id),
        str(conversation.id),
    )
    # The stream runs when the request's context is gone.
    assert event.correlation_id == "abc"
    payload = event.payload
    assert (payload.message_id, payload.content, payload.content_length) == (str(stored.id), "On Friday.", 10)
    assert (payload.model, payload.input_tokens, payload.output_tokens) == ("gpt-4o-mini", 120, 30)
    assert payload.cost_dollars == stored.cost_dollars == pytest.approx(metrics()["cost"])
    assert payload.latency_seconds == stored.latency_seconds > 0
    assert counted("llm_cost_dollars_total", tenant_id=str(bob.tenant_id)) == pytest.approx(COST)


def test_a_whole_reply(api, bob, conversation, assistant, server, emitted):
    server.acts = [breaks_off("Wrong"), says("On ", "Friday.")]
    answer = api(bob).post(url(conversation), HTTP_ACCEPT=JSON)
    assert (answer.status_code, answer["Content-Type"]) == (201, JSON)
    assert answer.json()["content"] == sent(emitted)[0].payload.content == "On Friday."


def test_a_restart_is_told(api, bob, conversation, assistant, server):
    server.acts = [breaks_off("Wrong"), says("Right")]
    got = read(api(bob).post(url(conversation)))
    assert got[:3] == [("token", {"text": "Wrong"}), ("restart", {}), ("token", {"text": "Right"})]
    assert got[3][1]["content"] == "Right"


@pytest.mark.parametrize(("accept", "kind"), [("*/*", "text/event-stream"), (f"{JSON}, text/plain, */*", JSON)])
def test_which_form_it_has(api, bob, conversation, accept, kind):
    answer = api(bob).post(url(conversation), HTTP_ACCEPT=accept)
    if answer.streaming:
        read(answer)
    assert answer["Content-Type"] == kind
    add(bob, conversation)
    assert_problem(api(bob).post(url(conversation), HTTP_ACCEPT="text/html"), 406)


def test_what_the_provider_is_told_of_the_conversation(api, alice, bob, conversation, assistant, server):
    read(api(bob).post(url(conversation)))
    add(alice, conversation, "Always speak of Fridays.", role="system")
    add(alice, conversation, "Thank you. And the next one?")
    read(api(bob).post(url(conversation)))
    turns = [(one["role"], one["content"]) for one in server.asked[1].body["messages"][1:]]
    assert turns == [
        ("user", "When is the release?"),
        ("assistant", "Hello there."),
        ("system", "Always speak of Fridays."),
        ("user", "Thank you. And the next one?"),
    ]


def test_the_router_knows_how_long_the_conversation_is(api, bob, conversation, assistant, server):
    assistant(complex_messages=30)
    for number in range(31):
        add(bob, conversation, str(number))
    read(api(bob).post(url(conversation)))
    assert server.asked[0].body["model"] == "gpt-4o"
    assert len(server.asked[0].body["messages"]) < 31


# --- What is refused ---


def test_nothing_to_answer(api, bob, conversation):
    empty = create_conversation(user=bob, title="Nothing yet")
    assert_problem(api(bob).post(url(empty)), 409)
    read(api(bob).post(url(conversation)))
    assert "no message" in assert_problem(api(bob).post(url(conversation), HTTP_ACCEPT=JSON), 409)["detail"]
    add(bob, conversation)
    read(api(bob).post(url(conversation)))
    add(bob, conversation)
    add(bob, conversation, "I have it.", role="assistant")
    assert_problem(api(bob).post(url(conversation)), 409)
    assert Message.objects.filter(answers__isnull=False).count() == 2


def test_a_question_during_a_reply_is_answered_next(api, bob, conversation, assistant, server):
    reply = begin_reply(user=bob, conversation_id=conversation.id)
    add(bob, conversation)
    *_, message = replies.reply_to(user=bob, reply=reply)
    assert message.answers_id == reply.question_id
    assert read(api(bob).post(url(conversation)))[-1][1]["position"] == 4
    roles = [one["role"] for one in server.asked[1].body["messages"][1:]]
    assert roles == ["user", "assistant", "user"]
    with pytest.raises(NothingToAnswer):
        begin_reply(user=bob, conversation_id=conversation.id)


def test_one_reply_at_a_time(api, bob, conversation):
    reply = begin_reply(user=bob, conversation_id=conversation.id)
    assert "replying already" in assert_problem(api(bob).post(url(conversation)), 409)["detail"]
    assert_problem(api(bob).post(url(conversation), HTTP_ACCEPT=JSON), 409)
    abandon_reply(reply=reply)
    assert read(api(bob).post(url(conversation)))[-1][0] == "message"


@pytest.mark.django_db(transaction=True)
def test_of_many_who_ask_at_once_one_gets_a_reply(api, bob, conversation, assistant, server):
    server.acts = [says_and_waits(then=("Hello",))]
    clients = [api(bob) for _ in range(6)]

    def ask(client):
        try:
            status = client.post(url(conversation), HTTP_ACCEPT=JSON).status_code
        finally:
            connection.close()
        if status == 409:
            refused.append(client)
            if len(refused) == 5:
                server.may_go_on.set()
        return status

    refused = []
    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(ask, clients)) == [201, *[409] * 5]
    assert (len(server.asked), Message.objects.filter(role="assistant").count()) == (1, 1)


def test_a_reply_that_died_does_not_block_for_ever(api, bob, conversation):
    dead = begin_reply(user=bob, conversation_id=conversation.id)
    Conversation.objects.update(reply_until=timezone.now() - timedelta(seconds=1))
    assert read(api(bob).post(url(conversation)))[-1][0] == "message"
    # Should it come back to life, it is too late.
    answer = Answer(content="Late", model="m", input_tokens=1, output_tokens=1, cost_dollars=0, latency_seconds=1)
    for late in (
        lambda: prolong_reply(reply=dead),
        lambda: finish_reply(user=bob, reply=dead, answer=answer),
        lambda: fail_reply(user=bob, reply=dead, reason="provider_error"),
    ):
        with pytest.raises(ReplyLost):
            late()
    conversation.refresh_from_db()
    assert (conversation.status, conversation.message_count) == ("active", 2)


def test_a_late_one_leaves_its_successor_alone(bob, conversation):
    dead = begin_reply(user=bob, conversation_id=conversation.id)
    Conversation.objects.update(reply_until=timezone.now())
    begin_reply(user=bob, conversation_id=conversation.id)
    abandon_reply(reply=dead)
    with pytest.raises(ReplyInProgress):
        begin_reply(user=bob, conversation_id=conversation.id)


def test_a_reply_that_goes_on_is_prolonged(bob, conversation, assistant, server, monkeypatch):
    monkeypatch.setattr(replies, "PROLONG_SECONDS", 0)
    server.acts = [says("a", "b", "c")]
    until = []
    for _ in replies.reply_to(user=bob, reply=begin_reply(user=bob, conversation_id=conversation.id)):
        until.append(Conversation.objects.get().reply_until)
    *going, over = until
    assert over is None
    assert len(going) >= 4 and all(one < other for one, other in pairwise(going))


def test_another_tenant_and_strangers(api, charlie, conversation, assistant, server):
    assert_problem(api(charlie).post(url(conversation)), 404)
    assert_problem(APIClient(raise_request_exception=False).post(url(conversation)), 401)
    assert_problem(api(charlie).get(url(conversation)), 405)
    assert server.asked == []


def test_a_conversation_that_has_ended(api, bob, conversation):
    complete_conversation(user=bob, conversation_id=conversation.id)
    assert "has ended" in assert_problem(api(bob).post(url(conversation)), 409)["detail"]


@pytest.mark.parametrize("accept", [JSON, "text/event-stream"])
def test_more_replies_than_a_process_works_on_at_once(api, bob, conversation, assistant, server, accept):
    """The others are told to come again, and threads are left for other requests."""
    assistant(max_replies=1)
    going = replies.reply_to(user=bob, reply=begin_reply(user=bob, conversation_id=conversation.id))
    next(going)
    other = create_conversation(user=bob, title="Lunch")
    add(bob, other)
    answer = api(bob).post(url(other), HTTP_ACCEPT=accept)
    assert "many others" in assert_problem(answer, 503)["detail"]
    assert int(answer["Retry-After"]) > 0
    other.refresh_from_db()
    assert (other.status, other.reply_id) == ("active", None)
    going.close()
    answer = api(bob).post(url(other), HTTP_ACCEPT=accept)
    assert answer.status_code == 201 if accept == JSON else read(answer)[-1][0] == "message"


# --- What fails ---

FAILURES = [
    (refuses(429), "provider_rate_limited", 503),
    (refuses(500), "provider_error", 502),
    (breaks_off("Wrong"), "provider_error", 502),
    (hangs, "provider_timeout", 504),
]


@pytest.mark.parametrize(("act", "reason", "status"), FAILURES)
@pytest.mark.parametrize("accept", [JSON, "text/event-stream"])
def test_a_provider_that_is_given_up(
    api, bob, conversation, assistant, server, emitted, metrics, accept, act, reason, status
):
    assistant(timeout_seconds=0.1 if act is hangs else 10, max_attempts=2)
    server.acts = [act, act]
    answer = api(bob).post(url(conversation), HTTP_ACCEPT=accept)
    if accept == JSON:
        assert_problem(answer, status)
    else:
        *before, (name, problem) = read(answer)
        assert name == "error" and "message" not in dict(before)
        assert (problem["status"], problem["reason"], problem["instance"]) == (status, reason, url(conversation))
        assert problem["correlation_id"] == answer["X-Correlation-ID"]

    conversation.refresh_from_db()
    assert (conversation.status, conversation.failure_reason) == ("failed", reason)
    assert (conversation.reply_id, conversation.reply_until) == (None, None)
    assert [message.role for message in conversation.messages.all()] == ["user"]
    [event] = emitted("conversation.failed")
    assert (event.payload.reason, event.payload.message_count) == (reason, 1)
    seconds = (conversation.ended_at - conversation.created_at).total_seconds()
    assert event.payload.duration_seconds == pytest.approx(seconds) and seconds > 0
    assert metrics()["errors"] == 2
    assert_problem(api(bob).post(url(conversation)), 409)


def test_the_success_rate_has_it(api, bob, conversation, assistant, server):
    from tests.voicehelper.conversations.test_success_rate import rates

    complete_conversation(user=bob, conversation_id=create_conversation(user=bob, title="Well").id)
    server.acts = [refuses(401)]
    read(api(bob).post(url(conversation)))
    assert rates() == {("chat", str(bob.tenant_id)): 0.5}


@pytest.mark.django_db(transaction=True)  # closing a response closes the connection
def test_a_client_that_goes_away_stops_the_provider(api, bob, conversation, assistant, server, emitted):
    server.acts = [says_and_waits("On ")]
    answer = api(bob).post(url(conversation))
    stream = iter(answer.streaming_content)
    while b"token" not in next(stream):
        pass
    assert Conversation.objects.get().reply_id is not None
    answer.close()
    assert server.asked[0].gone.wait(5)
    # The conversation is as it was, and the question can be asked again.
    conversation.refresh_from_db()
    assert (conversation.status, conversation.reply_id, conversation.message_count) == ("active", None, 1)
    assert sent(emitted) == []
    assert read(api(bob).post(url(conversation)))[-1][0] == "message"


@pytest.mark.django_db(transaction=True)
def test_a_response_that_is_never_read_leaves_nothing_behind(api, bob, conversation, assistant, server):
    answer = api(bob).post(url(conversation))
    answer.close()
    assert Conversation.objects.get().reply_id is None
    assert server.asked == []


def test_a_conversation_that_is_ended_meanwhile(api, bob, conversation, assistant, server, monkeypatch):
    monkeypatch.setattr(replies, "PROLONG_SECONDS", 0)
    server.acts = [says_and_waits("On ")]
    answer = api(bob).post(url(conversation))
    stream = iter(answer.streaming_content)
    while b"token" not in next(stream):
        pass
    complete_conversation(user=bob, conversation_id=conversation.id)
    rest = b"".join(stream)
    assert b"event: error" in rest and b'"status":409' in rest and b"has ended" in rest
    assert server.asked[0].gone.wait(5)
    conversation.refresh_from_db()
    assert (conversation.status, conversation.message_count) == ("completed", 1)


def test_a_reply_that_comes_too_late_is_not_stored(api, bob, conversation, assistant, server):
    server.acts = [says_and_waits("On ", then=("Friday",))]
    reply = begin_reply(user=bob, conversation_id=conversation.id)
    going = replies.reply_to(user=bob, reply=reply)
    next(going)
    complete_conversation(user=bob, conversation_id=conversation.id)
    server.may_go_on.set()
    with pytest.raises(ConversationEnded):
        list(going)
    assert Message.objects.count() == 1


def test_an_error_of_our_own(api, bob, conversation, assistant, server, settings, everything_logged):
    """The stream ends with an error, what was said is not logged, and the question can be asked again."""
    limit = settings.EVENTS_OUTBOX
    settings.EVENTS_OUTBOX = {**limit, "MAX_EVENT_BYTES": 1_000}
    secret = "4711 " * 500
    server.acts = [says(secret)]
    answer = api(bob).post(url(conversation))
    stream, got = iter(answer.streaming_content), b""
    with pytest.raises(replies.ReplyBroken):
        for frame in stream:
            got += frame
    assert b"event: error" in got and b'"status":500' in got
    assert "a reply failed: " in everything_logged()
    assert "4711 4711" not in everything_logged()
    conversation.refresh_from_db()
    assert (conversation.status, conversation.reply_id, conversation.message_count) == ("active", None, 1)
    settings.EVENTS_OUTBOX = limit
    assert read(api(bob).post(url(conversation)))[-1][0] == "message"


@pytest.mark.django_db(transaction=True)
def test_no_transaction_is_open_while_the_provider_talks(bob, conversation, assistant, server):
    server.acts = [says_and_waits("On ", then=("Friday",))]
    for piece in replies.reply_to(user=bob, reply=begin_reply(user=bob, conversation_id=conversation.id)):
        assert not connection.in_atomic_block
        if piece == "On ":
            assert connection.get_autocommit()
            server.may_go_on.set()
    assert OutboxEvent.objects.filter(event_type="conversation.message.sent").count() == 2


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("act", [says_and_waits("On ", then=("Friday",)), breaks_off("On ")])
def test_a_reply_outlives_the_database_connection_it_began_with(bob, conversation, assistant, server, act, settings):
    """What the provider has said, and that it has failed, is kept although the database was restarted meanwhile."""
    assistant(max_attempts=1)
    server.acts = [act]
    going = replies.reply_to(user=bob, reply=begin_reply(user=bob, conversation_id=conversation.id))
    assert "On " in iter(going.__next__, None)
    end_session_of(connection)
    server.may_go_on.set()
    with suppress(ProviderFailed):
        list(going)
    conversation.refresh_from_db()
    assert (conversation.message_count, conversation.status) in {(2, "active"), (1, "failed")}


def end_session_of(connection):
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        [pid] = cursor.fetchone()
    with psycopg.connect(**connection.get_connection_params() | {"cursor_factory": None}) as session:
        session.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
