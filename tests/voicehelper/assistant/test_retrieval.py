"""Retrieval, by way of the search that the settings name."""

from dataclasses import replace
from uuid import uuid4

import pytest
from opentelemetry.trace import StatusCode

from voicehelper.assistant.retrieval import passages

from . import search_stubs

HERE = "tests.voicehelper.assistant"


@pytest.fixture
def search(settings):
    def use(path):
        settings.ASSISTANT = replace(settings.ASSISTANT, search=f"{HERE}.{path}")

    search_stubs.calls.clear()
    return use


def test_what_the_search_finds(search, spans):
    search("search_stubs.search")
    tenant_id = uuid4()
    found = passages(tenant_id, "When?", 2)
    assert [one.title for one in found] == ["Roadmap", "Kitchen"]
    assert search_stubs.calls == [(tenant_id, "When?", 2)]
    [span] = spans()
    assert span.name == "retrieval documents"
    assert dict(span.attributes) == {
        "gen_ai.operation.name": "retrieval",
        "gen_ai.data_source.id": "documents",
        "voicehelper.passages": 2,
    }


def test_without_a_search_there_are_none(search, spans):
    for path in ("no_such_module.search", "no.such.package.search"):
        search(path)
        assert passages(uuid4(), "When?", 2) == []
    search("search_stubs.search")
    assert passages(uuid4(), "When?", 0) == []
    assert spans() == ()


def test_a_search_that_fails_finds_nothing(search, spans, everything_logged):
    search("search_stubs.failing_search")
    assert passages(uuid4(), search_stubs.SECRET, 2) == []
    [span] = spans()
    assert (span.status.status_code, span.attributes["error.type"]) == (StatusCode.ERROR, "RuntimeError")
    assert "the search failed" in everything_logged()
    assert search_stubs.SECRET not in everything_logged() + span.to_json()


@pytest.mark.parametrize(
    ("path", "error"),
    [("search_without_library.search", ModuleNotFoundError), ("search_stubs.no_such_function", AttributeError)],
)
def test_a_search_that_is_broken_is_said(search, path, error):
    search(path)
    with pytest.raises(error):
        passages(uuid4(), "When?", 2)
