"""The router's rule, line by line."""

import time

import pytest

from voicehelper.assistant.conf import AssistantSettings
from voicehelper.assistant.router import choose_route

SETTINGS = AssistantSettings(simple_model="small", complex_model="large")


def route(question, earlier_messages=0, **settings):
    chosen = choose_route(question, earlier_messages=earlier_messages, settings=AssistantSettings(**settings))
    return chosen.complexity.value, chosen.reason


@pytest.mark.parametrize(
    "question",
    [
        "When is the release?",
        "Hello, how are you?",
        "How many users do we have?",
        "how much is it?",
        "Show me the list.",
        "Who is it?!",
        "Really??",
        "I shower in the morning",
        "Please select a colour from the list",
        "今天天气怎样\uff1f",
        "",
        "x" * 400,
    ],
)
def test_simple(question):
    assert route(question) == ("simple", "plain")


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("x" * 401, "length"),
        ("Is this right?\n```\nx = 1\n```", "code"),
        ("def add(a, b):\n    return a + b", "code"),
        ("int x = 1;\nint y = 2;", "code"),
        ("if (x) {\n  y()\n}", "code"),
        ("Traceback (most recent call last):\n  File", "code"),
        ("SELECT name FROM users WHERE id = 1", "code"),
        ("<b>bold</b>", "code"),
        ("#include <stdio.h>", "code"),
        ("export class Cart {", "code"),
        ("When is it? And where?", "questions"),
        ("几点\uff1f 在哪\uff1f", "questions"),
        ("Why is the sky blue?", "words"),
        ("How does it work?", "words"),
        ("EXPLAIN it", "words"),
        ("Go through it step by step", "words"),
        ("What are the pros and cons", "words"),
        ("请解释一下", "words"),
        ("为什么天空是蓝色的", "words"),
    ],
)
def test_complex(question, reason):
    assert route(question) == ("complex", reason)


def test_history():
    assert route("Hello", 12) == ("simple", "plain")
    assert route("Hello", 13) == ("complex", "history")


def test_the_models():
    assert choose_route("Hello", earlier_messages=0, settings=SETTINGS).model == "small"
    assert choose_route("Why?", earlier_messages=0, settings=SETTINGS).model == "large"


def test_settings_change_the_rule():
    assert route("Why?", route="simple") == ("simple", "settings")
    assert route("Hello", route="complex") == ("complex", "settings")
    assert route("Hello", complex_chars=4) == ("complex", "length")
    assert route("Hello", 1, complex_messages=0) == ("complex", "history")
    assert route("Why?", complex_words=()) == ("simple", "plain")
    assert route("a.b", complex_words=("a.b",)) == ("complex", "words")
    assert route("axb", complex_words=("a.b",)) == ("simple", "plain")


@pytest.mark.parametrize("piece", ["select from ", "\n ", "class a ", "def a", "{ ", "\uff1f", "how many "])
def test_text_made_to_be_slow_is_not(piece):
    text = piece * (32_000 // len(piece))
    started = time.perf_counter()
    route(text, complex_chars=1_000_000)
    assert time.perf_counter() - started < 1
