"""The assistant, built-in or before a provider of its own, and what it tells."""

import itertools
import logging
from dataclasses import replace

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from monitoring import labels, llm
from tests.monitoring.conftest import counted
from voicehelper.assistant import orchestrator, retrieval
from voicehelper.assistant.conf import AssistantSettings
from voicehelper.conversations.models import Conversation
from voicehelper.conversations.services import create_conversation, send_message

from .llm_server import LlmServer

NO_SEARCH = "tests.voicehelper.assistant.no_such_module.search"
_number = itertools.count()


@pytest.fixture(autouse=True)
def offline(settings) -> AssistantSettings:
    """The built-in provider, at once, without documents."""
    settings.ASSISTANT = AssistantSettings(offline_word_seconds=0, search=NO_SEARCH)
    return settings.ASSISTANT


@pytest.fixture
def server():
    with LlmServer() as server:
        yield server


@pytest.fixture
def assistant(settings, server, monkeypatch):
    """Ask that server; a function that changes the settings. The provider's name, and so its series, are new."""
    monkeypatch.setattr(labels, "_seen", {})
    settings.ASSISTANT = AssistantSettings(
        base_url=server.url,
        api_key="secret-key",
        provider=f"assistant-{next(_number)}",
        simple_model="gpt-4o-mini",
        complex_model="gpt-4o",
        retry_delay_seconds=0.01,
        timeout_seconds=10,
        reply_seconds=10,
        search=NO_SEARCH,
    )

    def change(**changes):
        settings.ASSISTANT = replace(settings.ASSISTANT, **changes)

    return change


@pytest.fixture
def metrics(assistant, settings):
    """A function of what is counted of the provider."""

    def read() -> dict[str, float]:
        labels = {"provider": settings.ASSISTANT.provider}
        return {
            "requests": counted("llm_request_duration_seconds_count", **labels),
            "errors": counted("llm_request_errors_total", **labels),
            "input": counted("llm_tokens_used_total", token_type="input", **labels),
            "output": counted("llm_tokens_used_total", token_type="output", **labels),
            "cost": counted("llm_cost_dollars_total", **labels),
        }

    return read


@pytest.fixture
def spans(monkeypatch):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    for module in (llm, orchestrator, retrieval):
        monkeypatch.setattr(module, "tracer", provider.get_tracer("test"))
    yield exporter.get_finished_spans
    provider.shutdown()


@pytest.fixture
def conversation(bob) -> Conversation:
    """One in which bob has asked something."""
    conversation = create_conversation(user=bob, title="Roadmap")
    send_message(user=bob, conversation_id=conversation.id, content="When is the release?")
    return conversation


@pytest.fixture
def everything_logged(caplog):
    """All that is logged, from DEBUG on, as text."""
    caplog.set_level(logging.DEBUG)
    return lambda: "\n".join([caplog.text, *(str(vars(record)) for record in caplog.records)])
