"""The model router: simple questions go to the cheap model, complex ones to the strong one.

A question is complex when one of these holds, looked at in this order; the settings of `AssistantSettings` are in
brackets:

| reason | a question that |
|---|---|
| `history` | comes after more than 12 messages of its conversation [complex_messages] |
| `length` | has more than 400 characters [complex_chars] |
| `code` | holds code: a fenced block, a traceback, SQL, a definition, lines that end in a brace or semicolon |
| `questions` | asks two things or more: two question marks |
| `words` | asks for reasoning: why, how (not how many, how much, ...), explain, compare, ... [complex_words] |

Any other is simple (`plain`). With [route] set to `simple` or `complex`, all are (`settings`).
"""

import re
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

from .conf import AssistantSettings

_CODE = re.compile(
    r"```|~~~|Traceback \(most recent call last\)|</\w+>"
    r"|^[ \t]*(async )?def \w+\(|^[ \t]*(export |public |private )?(class|function|func|fn|interface) \w+.*[({:]"
    r"|^[ \t]*#include\b|[;{}][ \t]*$|\bselect\b.{1,100}\bfrom\b.{1,100}(\bwhere\b|;)",
    re.MULTILINE | re.IGNORECASE,
)
_CODE_MAX_CHARS = 2_000
"""Code is looked for in the beginning: the patterns above take their time with text made for it."""
_QUESTION_MARKS = re.compile(r"[?\uff1f]+")
_SIMPLE_AFTER_HOW = r"(?! (?:many|much|old|long|far|tall|big|often|late|soon|are you)\b)"


class Complexity(StrEnum):
    SIMPLE = "simple"
    COMPLEX = "complex"


class Route(NamedTuple):
    """`reason`: which line of the rule decided."""

    complexity: Complexity
    model: str
    reason: str


def choose_route(question: str, *, earlier_messages: int, settings: AssistantSettings) -> Route:
    """Choose the model for a question that comes after so many messages of its conversation."""
    if settings.route != "auto":
        complexity, reason = Complexity(settings.route), "settings"
    else:
        reason = _why_complex(question, earlier_messages, settings)
        complexity = Complexity.COMPLEX if reason else Complexity.SIMPLE
    is_simple = complexity is Complexity.SIMPLE
    return Route(complexity, settings.simple_model if is_simple else settings.complex_model, reason or "plain")


def _why_complex(question: str, earlier_messages: int, settings: AssistantSettings) -> str:
    if earlier_messages > settings.complex_messages:
        return "history"
    if len(question) > settings.complex_chars:
        return "length"
    if _CODE.search(question, 0, _CODE_MAX_CHARS):
        return "code"
    if len(_QUESTION_MARKS.findall(question)) > 1:
        return "questions"
    if settings.complex_words and _any_of(settings.complex_words).search(question):
        return "words"
    return ""


@lru_cache(8)
def _any_of(words: tuple[str, ...]) -> re.Pattern[str]:
    # Chinese has no spaces between words, and so no boundaries to look for.
    patterns = [rf"\b{re.escape(word)}\b" if word.isascii() else re.escape(word) for word in words]
    if "how" in words:
        patterns[words.index("how")] += _SIMPLE_AFTER_HOW
    return re.compile("|".join(patterns), re.IGNORECASE)
