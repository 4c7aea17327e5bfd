"""The orchestrator: passages, then a route, then a provider; one span over all of it, and no text in any span."""

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from uuid import UUID

from django.conf import settings
from opentelemetry import trace
from opentelemetry.trace import Span

from monitoring.failures import mark_failed

from .attempts import Completion, Signal, complete
from .conf import AssistantSettings
from .providers import Excerpt, Prompt, ProviderFailed, Turn, provider_of
from .retrieval import passages
from .router import choose_route
from .stepping import steps

tracer = trace.get_tracer(__name__)

TICK_SECONDS = 1.0
"""How often whoever waits for the reply has the floor while the provider says nothing."""
HISTORY_MAX_MESSAGES = 20
HISTORY_MAX_CHARS = 24_000
"""The provider is given the last messages, up to these; the question always, and whole."""
EXCERPT_MAX_CHARS = 2_000
INSTRUCTIONS = (
    "You are VoiceHelper, an assistant. Answer in the language of the question, correctly and briefly. "
    "Say so when you do not know."
)
SPOKEN = " The answer is read aloud: use short sentences, and no lists, tables, links or markup."


@dataclass(frozen=True, kw_only=True)
class Answer(Completion):
    """A reply and what it took. `latency_seconds`: from the question to the reply's end."""

    latency_seconds: float


def generate(
    *, tenant_id: UUID, conversation_id: UUID, mode: str, turns: Sequence[Turn], earlier_messages: int
) -> Generator[str | Signal | Answer, None, None]:
    """Reply to the last of the turns: yield the text as it comes, among signals, and the Answer at last.

    `earlier_messages`: how many the conversation has before the question, also those that are not among the turns.
    The first is a TICK, before anything is done. No transaction may be open: it would be held as long as the provider
    takes. Raises ProviderFailed. Closing it stops the provider.
    """
    config: AssistantSettings = settings.ASSISTANT
    started = time.perf_counter()
    with tracer.start_as_current_span(
        "invoke_agent voicehelper",
        attributes={
            "gen_ai.operation.name": "invoke_agent",
            "gen_ai.agent.name": "voicehelper",
            "gen_ai.conversation.id": str(conversation_id),
            "conversation.id": str(conversation_id),  # the specification's name
            "conversation.mode": mode,
            "message.length": len(turns[-1].content),
        },
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield Signal.TICK
            provider = provider_of(config)
            span.set_attribute("gen_ai.provider.name", provider.name)
            prompt = _prompt(span, config, tenant_id, mode, turns, earlier_messages)
            work = partial(complete, provider, prompt, config, conversation_id=str(conversation_id))
            with closing(steps(work, tick_seconds=TICK_SECONDS)) as pieces:
                for piece in pieces:
                    if isinstance(piece, Completion):
                        span.set_attribute("gen_ai.usage.input_tokens", piece.input_tokens)
                        span.set_attribute("gen_ai.usage.output_tokens", piece.output_tokens)
                        yield Answer(**vars(piece), latency_seconds=time.perf_counter() - started)
                        return
                    yield piece
        except ProviderFailed as failure:
            mark_failed(span, failure.reason.value)
            raise
        except Exception as error:
            mark_failed(span, error)
            raise
        except GeneratorExit:
            span.set_attribute("voicehelper.reply.stopped", True)
            raise


def _prompt(
    span: Span,
    config: AssistantSettings,
    tenant_id: UUID,
    mode: str,
    turns: Sequence[Turn],
    earlier_messages: int,
) -> Prompt:
    """Retrieve passages, choose the model, and say on the span what was chosen."""
    question = turns[-1].content
    found = passages(tenant_id, question, config.passages)
    with tracer.start_as_current_span("route_model") as routing:
        route = choose_route(question, earlier_messages=earlier_messages, settings=config)
        chosen = {
            "gen_ai.request.model": route.model,
            "voicehelper.route.complexity": route.complexity.value,
            "voicehelper.route.reason": route.reason,
        }
        routing.set_attributes(chosen)
    span.set_attributes(chosen)
    return Prompt(
        model=route.model,
        instructions=INSTRUCTIONS + (SPOKEN if mode == "voice" else ""),
        turns=_last(turns),
        excerpts=[Excerpt(str(one.title), str(one.text)[:EXCERPT_MAX_CHARS]) for one in found],
    )


def _last(turns: Sequence[Turn]) -> list[Turn]:
    kept = [turns[-1]]
    chars = 0
    for turn in reversed(turns[:-1]):
        chars += len(turn.content)
        if chars > HISTORY_MAX_CHARS or len(kept) > HISTORY_MAX_MESSAGES:
            break
        kept.append(turn)
    return kept[::-1]
