"""The orchestrator before a real server of OpenAI's protocol: what it streams, retries, counts and traces."""

import json
import threading
import time
from email.utils import formatdate
from uuid import UUID, uuid4

import pytest
from opentelemetry.trace import StatusCode

from monitoring import context
from tests.monitoring.conftest import counted
from voicehelper.assistant import attempts, openai_compatible, orchestrator
from voicehelper.assistant.attempts import Signal
from voicehelper.assistant.orchestrator import Answer, generate
from voicehelper.assistant.providers import ProviderFailed, Turn, approximate_tokens

from . import search_stubs
from .llm_server import (
    Handler,
    answers_in_part,
    breaks_off,
    ends_early,
    goes_on,
    hangs,
    refuses,
    says,
    says_all_and,
    says_and_waits,
    streams,
    trickles,
)

SECRET = "my account number is 4711"
TENANT, CONVERSATION = uuid4(), UUID("0191d1f0-0000-7000-8000-000000000000")
COST = (120 * 0.15 + 30 * 0.6) / 1_000_000
# What the router's default rule makes of it: simple.
QUESTION = f"Please note: {SECRET}"
WORDS = ("Noted", ", ", "bob.")


def begin(question=QUESTION, *, mode="chat", history=()):
    turns = [*history, Turn("user", question)]
    return generate(
        tenant_id=TENANT, conversation_id=CONVERSATION, mode=mode, turns=turns, earlier_messages=len(turns) - 1
    )


def ask(question=QUESTION, **options):
    """(what was said, the answer)"""
    *said, answer = begin(question, **options)
    assert isinstance(answer, Answer)
    return [piece for piece in said if piece is not Signal.TICK], answer


def fails(question=QUESTION):
    """The reason for which it is given up."""
    with pytest.raises(ProviderFailed) as raised:
        ask(question)
    return raised.value.reason.value


# --- What is asked and answered ---


def test_the_text_comes_as_it_is_said(assistant, server, metrics):
    server.acts = [says_and_waits("Noted", then=(", ", "bob."))]
    going = begin()
    pieces = [next(going), next(going)]
    assert pieces == [Signal.TICK, "Noted"]
    server.may_go_on.set()
    *rest, answer = going
    assert [piece for piece in rest if piece is not Signal.TICK] == [", ", "bob."]
    assert (answer.content, answer.model) == ("Noted, bob.", "gpt-4o-mini")
    assert (answer.input_tokens, answer.output_tokens) == (120, 30)
    assert answer.cost_dollars == pytest.approx(COST)
    assert 0 < answer.latency_seconds < 10
    assert metrics() == {"requests": 1, "errors": 0, "input": 120, "output": 30, "cost": pytest.approx(COST)}


def test_what_the_provider_is_asked(assistant, server, settings):
    assistant(search=f"{search_stubs.__name__}.search")
    ask("When is the release?", history=[Turn("user", "Hi"), Turn("assistant", "Hello")])
    [asked] = server.asked
    assert asked.headers["authorization"] == "Bearer secret-key"
    assert (asked.body["model"], asked.body["stream"]) == ("gpt-4o-mini", True)
    system, *turns = asked.body["messages"]
    assert turns == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "When is the release?"},
    ]
    assert system["role"] == "system"
    assert "title='Roadmap'>\nThe roadmap is public. The release is on Friday.\n</document>" in system["content"]
    assert system["content"].count("<document ") == settings.ASSISTANT.passages


def test_without_passages_the_instructions_speak_of_none(assistant, server):
    ask()
    assert "document" not in server.asked[0].body["messages"][0]["content"]


def test_what_is_said_aloud_has_no_markup(assistant, server):
    ask(mode="voice")
    ask(mode="chat")
    spoken, written = (asked.body["messages"][0]["content"] for asked in server.asked)
    assert "read aloud" in spoken and "read aloud" not in written


def test_a_complex_question_goes_to_the_strong_model(assistant, server):
    assert ask("Why?")[1].model == "gpt-4o"
    assistant(route="simple")
    assert ask("Why?")[1].model == "gpt-4o-mini"
    assert [asked.body["model"] for asked in server.asked] == ["gpt-4o", "gpt-4o-mini"]


def test_a_long_history_is_cut_at_its_old_end(assistant, server, monkeypatch):
    monkeypatch.setattr(orchestrator, "HISTORY_MAX_CHARS", 10)
    ask("x" * 100, history=[Turn("user", text) for text in ("a" * 8, "b" * 6, "c" * 4)])
    _, *turns = server.asked[0].body["messages"]
    assert [turn["content"][0] for turn in turns] == ["b", "c", "x"]


def test_a_reply_that_is_too_long_is_cut_and_stopped(assistant, server, metrics, monkeypatch):
    monkeypatch.setattr(attempts, "REPLY_MAX_CHARS", 10)
    server.acts = [says_and_waits("1234567", "89012345")]
    said, answer = ask()
    assert (answer.content, said) == ("1234567890", ["1234567", "890"])
    assert server.asked[0].gone.wait(5)
    assert metrics()["output"] == answer.output_tokens == approximate_tokens("1234567890")


def test_what_cannot_be_stored_is_taken_out(assistant, server):
    server.acts = [says("a\x00b", "\ud800")]
    assert ask()[1].content == "ab?"


def test_usage_that_is_not_told_is_estimated(assistant, server, metrics):
    server.acts = [says(*WORDS, usage=None)]
    _, answer = ask()
    system, question = (message["content"] for message in server.asked[0].body["messages"])
    assert answer.input_tokens == approximate_tokens(system) + approximate_tokens(question)
    assert answer.output_tokens == approximate_tokens("Noted, bob.") == 3
    assert (metrics()["input"], metrics()["output"]) == (answer.input_tokens, 3)
    assert metrics()["cost"] == pytest.approx(answer.cost_dollars)


def test_a_model_without_a_price_costs_nobody_knows_what(assistant, server, metrics, settings):
    assistant(simple_model="unheard-of")
    server.acts = [streams({"choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": "stop"}]}, "[DONE]")]
    _, answer = ask()
    assert (answer.content, answer.cost_dollars, metrics()["cost"]) == ("Hi", None, 0)
    assert counted("llm_requests_without_price_total", provider=settings.ASSISTANT.provider) == 1


def test_the_cost_is_the_tenants(assistant, server, settings):
    token = context.tenant_id.set("bobs")
    try:
        ask()
    finally:
        context.tenant_id.reset(token)
    labels = {"provider": settings.ASSISTANT.provider, "tenant_id": "bobs"}
    assert counted("llm_cost_dollars_total", **labels) == pytest.approx(COST)


# --- Failures ---


@pytest.mark.parametrize(
    ("act", "restarts"),
    [
        (refuses(429), 0),
        (refuses(500), 0),
        (refuses(503), 0),
        (refuses(408), 0),
        (breaks_off(), 0),
        (breaks_off("Wrong", " way"), 1),
        (ends_early("Wrong"), 1),
        (says(), 0),
        (says(" "), 1),
        (streams("{"), 0),
        (streams({"error": {"message": "overloaded"}}), 0),
        (streams({"choices": [{"index": 0, "finish_reason": None}]}), 0),
        (streams({"choices": 7}), 0),
        (streams([1]), 0),
        (streams("[" * 200_000), 0),
        (answers_in_part(500, Handler.cut), 0),
        (answers_in_part(500, Handler.cut, Content_Encoding="gzip"), 0),
        (lambda handler: handler.answer(200, b"not what was asked for"), 0),
    ],
)
def test_a_failure_that_passes_is_tried_again(assistant, server, metrics, act, restarts):
    server.acts = [act, act, says(*WORDS)]
    said, answer = ask()
    assert answer.content == "Noted, bob."
    assert said.count(Signal.RESTART) == 2 * restarts
    assert said[-3:] == list(WORDS)
    assert (metrics()["requests"], metrics()["errors"]) == (3, 2)


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (refuses(429), "provider_rate_limited"),
        (streams({"error": {"message": "slow down", "code": "rate_limit_exceeded"}}), "provider_rate_limited"),
        (refuses(500), "provider_error"),
        (breaks_off("Wrong"), "provider_error"),
    ],
)
def test_a_failure_that_does_not_pass_is_given_up(assistant, server, metrics, act, reason):
    assistant(max_attempts=3)
    server.acts = [act] * 3
    assert fails() == reason
    assert len(server.asked) == 3
    assert (metrics()["requests"], metrics()["errors"]) == (3, 3)


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (refuses(400), "provider_error"),
        (refuses(401), "provider_error"),
        (refuses(404), "provider_error"),
        (refuses(429, code="insufficient_quota"), "provider_rate_limited"),
    ],
)
def test_a_refusal_is_not_asked_again(assistant, server, metrics, act, reason):
    server.acts = [act]
    assert fails() == reason
    assert (metrics()["requests"], metrics()["errors"]) == (1, 1)


def test_a_provider_that_is_not_there(assistant, server, metrics):
    assistant(base_url="http://127.0.0.1:1/v1", max_attempts=2)
    assert fails() == "provider_error"
    assert metrics()["errors"] == 2


@pytest.mark.parametrize("act", [hangs, says_and_waits("Well"), answers_in_part(429, hangs)])
def test_a_provider_that_falls_silent(assistant, server, metrics, act):
    assistant(timeout_seconds=0.1, max_attempts=2)
    server.acts = [act, act]
    assert fails() == "provider_timeout"
    assert metrics()["errors"] == 2
    assert all(asked.gone.wait(5) for asked in server.asked)


@pytest.mark.parametrize("ends", [Handler.cut, Handler.wait_for_go, lambda handler: handler.event("{")])
def test_what_goes_wrong_after_the_last_word_does_not_matter(assistant, server, metrics, ends):
    assistant(timeout_seconds=0.2)
    server.acts = [says_all_and(ends)]
    said, answer = ask()
    assert (said, answer.content, answer.output_tokens) == (["Hello ", "there."], "Hello there.", 3)
    assert (metrics()["requests"], metrics()["errors"]) == (1, 0)


@pytest.mark.parametrize("status", [200, 500])
def test_an_answer_that_is_far_too_large_is_not_kept(assistant, server, metrics, monkeypatch, status):
    monkeypatch.setattr(openai_compatible, "ANSWER_MAX_BYTES", 1_000_000)
    assistant(max_attempts=2)
    act = answers_in_part(status, goes_on)
    server.acts = [act, act]
    assert fails() == "provider_error"
    assert metrics()["errors"] == 2


def test_a_reply_has_an_end(assistant, server, metrics):
    """Also one of a provider that is never silent."""
    assistant(timeout_seconds=0.4, reply_seconds=0.4)
    server.acts = [trickles]
    started = time.monotonic()
    assert fails() == "provider_timeout"
    assert time.monotonic() - started < 2
    assert (len(server.asked), metrics()["errors"]) == (1, 1)


@pytest.mark.parametrize("header", [{"Retry_After": "0.2"}, {"retry_after_ms": "200"}])
def test_retry_after_is_waited_for(assistant, server, header):
    server.acts = [refuses(429, **header)]
    started = time.monotonic()
    ask()
    assert 0.2 <= time.monotonic() - started < 2


def test_a_retry_after_that_is_too_late_is_not_waited_for(assistant, server):
    for late in ("3600", formatdate(time.time() + 3600, usegmt=True)):
        server.acts = [refuses(429, Retry_After=late)]
        started = time.monotonic()
        assert fails() == "provider_rate_limited"
        assert time.monotonic() - started < 2
    assert len(server.asked) == 2


@pytest.mark.parametrize("nonsense", ["soon", "-1", "nan", "inf", formatdate(0, usegmt=True)])
def test_a_retry_after_that_is_nonsense_is_left_alone(assistant, server, nonsense):
    server.acts = [refuses(429, Retry_After=nonsense)]
    assert ask()[1].content == "Hello there."


def test_the_delay_doubles_and_is_jittered(settings, monkeypatch):
    failure = ProviderFailed(attempts.FailureReason.ERROR, can_retry=True)
    for number, most in ((1, 0.5), (2, 1), (3, 2), (9, attempts.RETRY_DELAY_MAX_SECONDS)):
        delays = {attempts._delay_seconds(number, failure, settings.ASSISTANT) for _ in range(50)}
        assert most / 2 <= min(delays) < max(delays) <= most
    late = ProviderFailed(attempts.FailureReason.RATE_LIMITED, can_retry=True, retry_after_seconds=30)
    assert attempts._delay_seconds(1, late, settings.ASSISTANT) > 30


# --- Nobody waits any more ---


@pytest.mark.parametrize("words", [(), ("Noted",)])
def test_closing_it_stops_the_provider(assistant, server, metrics, monkeypatch, words):
    monkeypatch.setattr(orchestrator, "TICK_SECONDS", 0.02)
    server.acts = [says_and_waits(*words) if words else hangs]
    going = begin()
    if words:
        assert "Noted" in iter(going.__next__, None)
    while not server.asked:
        next(going)
    started = time.monotonic()
    going.close()
    assert server.asked[0].gone.wait(5)
    assert time.monotonic() - started < 5
    # No error; and what it has said so far is counted, by the estimate.
    assert metrics()["requests"] == 1 and metrics()["errors"] == 0
    assert metrics()["output"] == sum(map(approximate_tokens, words))


def test_it_ticks_while_the_provider_thinks(assistant, server, monkeypatch):
    monkeypatch.setattr(orchestrator, "TICK_SECONDS", 0.02)
    server.acts = [says_and_waits(then=("Noted",))]
    going = begin()
    assert [next(going) for _ in range(5)] == [Signal.TICK] * 5
    server.may_go_on.set()
    assert isinstance(list(going)[-1], Answer)


# --- Traces ---


def test_the_spans_of_a_reply(assistant, server, spans, settings, everything_logged):
    assistant(search=f"{search_stubs.__name__}.search")
    server.acts = [refuses(500), says(SECRET)]
    ask()
    retrieval, routing, failed, chat, reply = spans()
    assert [span.name for span in spans()] == [
        "retrieval documents",
        "route_model",
        *["chat gpt-4o-mini"] * 2,
        "invoke_agent voicehelper",
    ]
    assert {span.parent.span_id for span in (retrieval, routing, failed, chat)} == {reply.context.span_id}
    assert dict(routing.attributes) == {
        "gen_ai.request.model": "gpt-4o-mini",
        "voicehelper.route.complexity": "simple",
        "voicehelper.route.reason": "plain",
    }
    assert dict(reply.attributes) == {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.agent.name": "voicehelper",
        "gen_ai.conversation.id": str(CONVERSATION),
        "gen_ai.provider.name": settings.ASSISTANT.provider,
        "gen_ai.request.model": "gpt-4o-mini",
        "gen_ai.usage.input_tokens": 120,
        "gen_ai.usage.output_tokens": 30,
        "conversation.id": str(CONVERSATION),
        "conversation.mode": "chat",
        "message.length": len(QUESTION),
        "voicehelper.route.complexity": "simple",
        "voicehelper.route.reason": "plain",
    }
    assert failed.status.status_code is StatusCode.ERROR
    assert failed.attributes["error.type"] == "openai.InternalServerError"
    assert (reply.status.is_unset, chat.status.is_unset) == (True, True)
    assert chat.attributes["gen_ai.conversation.id"] == str(CONVERSATION)
    assert chat.attributes["gen_ai.response.model"] == "gpt-4o-mini-2024-07-18"
    assert chat.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert chat.attributes["gen_ai.usage.output_tokens"] == 30
    assert chat.attributes["server.port"] == server.server_port
    # The provider's own trace goes on from the call.
    assert f"{chat.context.span_id:016x}" in server.asked[1].headers["traceparent"]
    text = everything_logged() + json.dumps([span.to_json() for span in spans()])
    assert SECRET not in text and "secret-key" not in text


def test_the_span_of_a_reply_that_fails(assistant, server, spans):
    server.acts = [refuses(401)]
    fails()
    *_, reply = spans()
    assert (reply.status.status_code, reply.attributes["error.type"]) == (StatusCode.ERROR, "provider_error")


def test_the_span_of_a_reply_that_is_stopped(assistant, server, spans):
    server.acts = [says_and_waits("Noted")]
    going = begin()
    next(going), next(going)
    going.close()
    *_, chat, reply = spans()
    assert reply.attributes["voicehelper.reply.stopped"] is True
    assert reply.status.is_unset and chat.status.is_unset


def test_replies_in_many_threads_do_not_mix(assistant, server):
    def echo(handler):
        says(handler.asked.body["messages"][-1]["content"])(handler)

    server.acts = [echo] * 16
    replies = {}

    def reply(number):
        replies[number] = ask(f"Number {number}")[1].content

    threads = [threading.Thread(target=reply, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert replies == {number: f"Number {number}" for number in range(16)}
