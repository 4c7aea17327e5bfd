"""Redaction: secrets stay out of log lines, by the name of a field and by what a text looks like."""

import re
from collections.abc import Mapping, Sequence, Set
from functools import cache, lru_cache
from typing import Any

from django.core.signals import setting_changed
from django.dispatch import receiver

from monitoring.conf import monitoring_settings

HIDDEN = "***"
SECRET_NAMES = (
    "password",
    "passwd",
    "pwd",
    "passphrase",
    "secret",
    "token",
    "jwt",
    "authorization",
    "cookie",
    "credential",
    "credentials",
    "api_key",
    "apikey",
    "access_key",
    "private_key",
    "secret_key",
    "session_id",
    "sessionid",
    "csrftoken",
    "csrfmiddlewaretoken",
)
"""Fields of these names are hidden, as the whole name or its end: `db_password`, `sasl.password`, `X-Api-Key`,
`accessToken`. `MONITORING["LOG_REDACT"]` adds to them."""

_DEEPEST = 6
_MOST_ITEMS = 100
_LONGEST_SEARCHED = 100_000
_WORD_STARTS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_SEPARATORS = re.compile(r"[^a-z0-9]+")
# Lengths are bounded: a text of many beginnings and no end would take its length squared.
_URL_LOGIN = re.compile(r"(://[^\s:/@]{0,100}):(?!\d{1,5}[/?#,\s])[^\s@]{1,300}(?:@[^\s@/]{0,300}(?=@)){0,20}@")
# Not "basic authentication": what is hidden has more in it than small letters.
_LOGIN_HEADER = re.compile(r"\b([Bb]earer|[Bb]asic)( +)(?=[a-z]*[A-Z0-9=+/_.~-])[A-Za-z0-9._~+/-]{6,}=*")


def _words(name: str) -> str:
    return _SEPARATORS.sub("_", _WORD_STARTS.sub("_", name).lower()).strip("_")


@cache
def _names() -> tuple[frozenset[str], tuple[str, ...]]:
    names = [_words(name) for name in (*SECRET_NAMES, *monitoring_settings().log_redact)]
    return frozenset(names), tuple(f"_{name}" for name in names)


@cache
def _stems() -> frozenset[str]:
    """First words of the names: a text without any of them need not be searched."""
    return frozenset(name.partition("_")[0] for name in _names()[0])


@cache
def _assignments() -> tuple[re.Pattern[str], ...]:
    """What stands in a text as `name=value`, `"name": "value"` or, of headers, `Name: value`."""

    def anywhere(names: Sequence[str]) -> str:
        return "|".join(_words(name).replace("_", "[-_. ]?") for name in names)

    own = anywhere(monitoring_settings().log_redact)
    name = f"(?:{anywhere(SECRET_NAMES)}" + (rf"|(?<![A-Za-z0-9])(?:{own}))" if own else ")")
    return (
        re.compile(r"((?:authorization|cookie)\s?:\s)(?!\s|\*\*\*)[^\r\n'\"\\]+", re.IGNORECASE),
        re.compile(rf"({name}\\*['\"]?\s?[=:]\s?b?(\\*['\"]))(?:.{{0,2000}}?)(?=\2)", re.IGNORECASE),
        re.compile(rf"({name}\s?=\s?)(?!\\*['\"]|b['\"])[^\s&;,'\"()<>\\]+", re.IGNORECASE),
    )


@receiver(setting_changed)
def _forget_settings(*, setting: str, **_: object) -> None:
    if setting == "MONITORING":
        for cached in (_names, _stems, _assignments, is_secret):
            cached.cache_clear()


@lru_cache(1000)
def is_secret(name: str) -> bool:
    """Whether a field of that name is hidden."""
    names, ends = _names()
    words = _words(name)
    return words in names or words.endswith(ends)


def redacted_text(text: str) -> str:
    """Return the text without logins in URLs and headers, and without values that stand behind a secret's name."""
    if len(text) > _LONGEST_SEARCHED:
        text = cut(text, _LONGEST_SEARCHED)
    if "@" in text:
        text = _URL_LOGIN.sub(rf"\1:{HIDDEN}@", text)
    if "=" in text or "'" in text or '"' in text or ": " in text:
        lower = text.lower()
        if any(stem in lower for stem in _stems()):
            for pattern in _assignments():
                text = pattern.sub(rf"\1{HIDDEN}", text)
    if "earer " in text or "asic " in text:
        text = _LOGIN_HEADER.sub(rf"\1\2{HIDDEN}", text)
    return text


def redacted(value: Any, depth: int = 0) -> Any:
    """Return the value as JSON can hold it, without secrets. Raises nothing, whatever the value is.

    Mappings lose the values behind secret names; bytes become text, whatever else JSON does not know its `str()`.
    """
    try:
        return _redacted(value, depth)
    except Exception as error:
        return f"<{type(value).__name__} without a text: {type(error).__name__}>"


def _redacted(value: Any, depth: int) -> Any:
    if type(value) is str:
        return redacted_text(value)
    if value is None or value is True or value is False:
        return value
    # Members of enumerations are what they stand for.
    if isinstance(value, str):
        return redacted_text(str.__str__(value))
    if isinstance(value, int):
        return int(str(int(value)))  # raises for one that is too long to be written
    if isinstance(value, float):
        return float(value) if value - value == 0 else float.__repr__(value)  # no NaN and no infinity in JSON
    if isinstance(value, bytes | bytearray | memoryview):
        return redacted_text(bytes(value[:_LONGEST_SEARCHED]).decode(errors="backslashreplace"))
    if isinstance(value, Mapping | Sequence | Set):
        if depth == _DEEPEST:
            return "..."
        if isinstance(value, Mapping):
            pairs = [
                (_name(name), item) for name, item, _ in zip(value, value.values(), range(_MOST_ITEMS), strict=False)
            ]
            return {
                name: HIDDEN if is_secret(name) and item is not None else redacted(item, depth + 1)
                for name, item in pairs
            }
        return [redacted(item, depth + 1) for item, _ in zip(value, range(_MOST_ITEMS), strict=False)]
    return redacted_text(str(value))


def _name(name: object) -> str:
    return name[:200] if isinstance(name, str) else str(redacted(name, _DEEPEST))


def cut(text: str, most: int) -> str:
    """Return the text, of one that is longer than `most` characters the beginning and the end."""
    if len(text) <= most:
        return text
    return f"{text[: most // 3]} ...{len(text) - most} characters cut... {text[len(text) - (most - most // 3) :]}"
