"""The built-in provider, for a first run: no network, no model, the same reply to the same question.

It quotes the sentences of the retrieved passages that have most words in common with the question, word by word.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Mapping

from .conf import AssistantSettings
from .providers import Excerpt, Prompt, Usage, approximate_tokens

_SENTENCE = re.compile(r"[^.!?\u3002\uff01\uff1f\n]+[.!?\u3002\uff01\uff1f]*")
_WORD = re.compile(r"[a-z0-9]{3,}|[^\x00-\x7f]", re.IGNORECASE)
_CHUNK = re.compile(r"\s*\S+|\s+$")
_QUOTED_MAX_CHARS = 400
_QUESTION_MAX_CHARS = 200


class Offline:
    """See the module. Its models: `offline-simple` quotes one sentence, `offline-complex` up to three."""

    name = "offline"
    server_address = ""
    server_port = None

    def __init__(self, settings: AssistantSettings) -> None:
        self._word_seconds = settings.offline_word_seconds
        self._simple_model = settings.simple_model

    async def stream(
        self, prompt: Prompt, *, headers: Mapping[str, str], timeout_seconds: float
    ) -> AsyncGenerator[str | Usage, None]:
        reply = _reply(prompt, quotes=1 if prompt.model == self._simple_model else 3)
        for chunk in _CHUNK.findall(reply):
            await asyncio.sleep(self._word_seconds)
            yield chunk
        asked = approximate_tokens(prompt.system) + sum(approximate_tokens(turn.content) for turn in prompt.turns)
        yield Usage(
            input_tokens=asked,
            output_tokens=approximate_tokens(reply),
            model=prompt.model,
            finish_reasons=["stop"],
        )


def _reply(prompt: Prompt, *, quotes: int) -> str:
    found = _quotes(prompt)[:quotes]
    if found:
        return " ".join(f"{sentence} (From {title!r}.)" for title, sentence in found)
    question = " ".join(prompt.question.split())
    if len(question) > _QUESTION_MAX_CHARS:
        question = f"{question[:_QUESTION_MAX_CHARS]}..."
    return (
        f'You said: "{question}" I am the built-in assistant, which only quotes from documents, and found none about '
        "this. An operator can connect a language model: see LLM_BASE_URL."
    )


def _quotes(prompt: Prompt) -> list[tuple[str, str]]:
    """(title, sentence), those with most of the question's words first; ties in the passages' order."""
    asked = _words(prompt.question)
    ranked = [
        (len(asked & _words(sentence)), excerpt.title, sentence)
        for excerpt in prompt.excerpts
        for sentence in _sentences(excerpt)
    ]
    ranked.sort(key=lambda one: -one[0])
    return [(title, sentence) for common, title, sentence in ranked if common]


def _sentences(excerpt: Excerpt) -> list[str]:
    sentences = (" ".join(found.split())[:_QUOTED_MAX_CHARS] for found in _SENTENCE.findall(excerpt.text))
    return [sentence for sentence in sentences if sentence]


def _words(text: str) -> set[str]:
    return {word.casefold() for word in _WORD.findall(text)}
