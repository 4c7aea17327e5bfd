"""Settings of the assistant, from the environment: who answers, with which models, at what price, how patiently.

docs/assistant.md lists the variables. Errors name a variable and never a secret's value.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from django.core.exceptions import ImproperlyConfigured

ROUTES = ("auto", "simple", "complex")
COMPLEX_WORDS = (
    *("why", "how", "explain", "compare", "contrast", "analyse", "analyze", "evaluate", "summarise", "summarize"),
    *("design", "prove", "derive", "calculate", "difference", "step by step", "pros and cons", "trade-off"),
    *("为什么", "如何", "怎么", "解释", "比较", "分析", "总结", "设计", "证明", "区别", "步骤"),
)
PRICES: dict[str, dict[str, float]] = {
    "gpt-4o": {"input": 2.5, "output": 10, "cached_input": 1.25},
    "gpt-4o-mini": {"input": 0.15, "output": 0.6, "cached_input": 0.075},
    # The built-in models cost nothing. Priced as those they stand for, so that a first run shows cost and budgets.
    "offline-simple": {"input": 0.15, "output": 0.6},
    "offline-complex": {"input": 2.5, "output": 10},
}
_SECONDS_MAX = 600


@dataclass(frozen=True, kw_only=True)
class AssistantSettings:
    """`base_url`: of an endpoint that speaks OpenAI's protocol; empty: the built-in provider answers.

    `provider`: who is at that address: the metrics' label, and gen_ai.provider.name.
    `route`: `"auto"` for the rule of `router`, or the complexity that all questions are taken for.
    `complex_chars`, `complex_messages`: a longer question, or one after more messages, is complex.
    `timeout_seconds`: how long the provider may be silent. `reply_seconds`: how long a reply may take, with retries.
    `max_attempts`: how often a provider is asked for one reply. `retry_delay_seconds`: before the second attempt;
    it doubles with each.
    `max_replies`: how many a process works on at once.
    `search`: dotted path of `search(*, tenant_id, query, limit)`. `passages`: how many of them a reply is given.
    `offline_word_seconds`: how long the built-in provider takes for a word.
    """

    base_url: str = ""
    api_key: str = field(default="", repr=False)
    provider: str = "openai"
    simple_model: str = "offline-simple"
    complex_model: str = "offline-complex"
    route: str = "auto"
    complex_chars: int = 400
    complex_messages: int = 12
    complex_words: tuple[str, ...] = COMPLEX_WORDS
    timeout_seconds: float = 20
    reply_seconds: float = 60
    max_attempts: int = 4
    retry_delay_seconds: float = 0.5
    max_replies: int = 6
    search: str = "voicehelper.knowledge.search.search"
    passages: int = 4
    offline_word_seconds: float = 0.01

    def __post_init__(self) -> None:
        if self.base_url:
            try:
                url = urlsplit(self.base_url)
                is_good = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
            except ValueError:
                is_good = False
            if not is_good or "@" in url.netloc:
                raise ImproperlyConfigured(
                    "LLM_BASE_URL must begin with http:// or https:// and name a host, and no login"
                )
        elif self.api_key:
            raise ImproperlyConfigured("LLM_API_KEY needs LLM_BASE_URL, such as https://api.openai.com/v1")
        for name, text in (("LLM_SIMPLE_MODEL", self.simple_model), ("LLM_COMPLEX_MODEL", self.complex_model)):
            if not 0 < len(text) <= 100:
                raise ImproperlyConfigured(f"{name} must be the name of a model, up to 100 characters")
        if not self.provider:
            raise ImproperlyConfigured("LLM_PROVIDER must be a name")
        if not self.api_key.isascii() or not self.api_key.isprintable():
            raise ImproperlyConfigured("LLM_API_KEY holds characters that cannot be sent in a header")
        if self.route not in ROUTES:
            raise ImproperlyConfigured(f"LLM_ROUTE must be one of {', '.join(ROUTES)}, not {self.route!r}")
        if self.timeout_seconds > self.reply_seconds:
            raise ImproperlyConfigured("LLM_TIMEOUT_SECONDS must not be more than LLM_REPLY_SECONDS")


def assistant_settings(environment: Mapping[str, str]) -> AssistantSettings:
    """Read the settings. Raises ImproperlyConfigured for what makes no sense."""
    given: dict[str, Any] = {"api_key": _api_key(environment)}
    for name in ("base_url", "provider", "simple_model", "complex_model", "route"):
        if text := environment.get(f"LLM_{name.upper()}", "").strip():
            given[name] = text
    if "base_url" in given:
        if "simple_model" not in given:
            raise ImproperlyConfigured("LLM_BASE_URL needs LLM_SIMPLE_MODEL, the name of one of its models")
        given.setdefault("complex_model", given["simple_model"])
    elif named := {"provider", "simple_model", "complex_model"} & given.keys():
        raise ImproperlyConfigured(f"LLM_{min(named).upper()} needs LLM_BASE_URL: the built-in provider has its own")
    if words := environment.get("LLM_COMPLEX_WORDS"):
        given["complex_words"] = tuple(word.strip().casefold() for word in words.split(",") if word.strip())
    for name, least, most, kind in (
        ("complex_chars", 0, 1_000_000, int),
        ("complex_messages", 0, 1_000_000, int),
        ("timeout_seconds", 0.1, _SECONDS_MAX, float),
        ("reply_seconds", 0.1, _SECONDS_MAX, float),
        ("max_attempts", 1, 20, int),
        ("max_replies", 1, 10_000, int),
        ("offline_word_seconds", 0, 10, float),
    ):
        if text := environment.get(f"LLM_{name.upper()}", "").strip():
            given[name] = _number(f"LLM_{name.upper()}", text, least, most, kind)
    return AssistantSettings(**given)


def llm_prices(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return MONITORING["LLM_PRICES"]: PRICES, and over them the JSON of the variable LLM_PRICES.

    Raises ImproperlyConfigured for what is no JSON object; monitoring checks the prices.
    """
    text = environment.get("LLM_PRICES", "").strip()
    try:
        prices = json.loads(text or "{}")
    except ValueError as error:
        raise ImproperlyConfigured(f"LLM_PRICES is not JSON: {error}") from None
    if not isinstance(prices, dict):
        raise ImproperlyConfigured('LLM_PRICES must be like {"gpt-4o": {"input": 2.5, "output": 10}}')
    return PRICES | prices


def _number(name: str, text: str, least: float, most: float, kind: type[int] | type[float]) -> float:
    try:
        number = kind(text)
    except ValueError:
        number = -1
    if not least <= number <= most:  # NaN, too
        whole = "a whole number" if kind is int else "a number"
        raise ImproperlyConfigured(f"{name} must be {whole} from {least} to {most}, not {text!r}")
    return number


def _api_key(environment: Mapping[str, str]) -> str:
    key, path = environment.get("LLM_API_KEY", "").strip(), environment.get("LLM_API_KEY_FILE", "")
    if not path:
        return key
    if key:
        raise ImproperlyConfigured("LLM_API_KEY and LLM_API_KEY_FILE are both set: which one is meant?")
    try:
        key = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ImproperlyConfigured(f"LLM_API_KEY_FILE cannot be read: {type(error).__name__}") from None
    if not key:
        raise ImproperlyConfigured("LLM_API_KEY_FILE names an empty file")
    return key
