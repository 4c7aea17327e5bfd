"""Asking Prometheus for figures over time, for pages that have to answer in time.

    questions = Round()
    rate = questions.ask(Instant("sum(service:http_requests:rate5m)"))
    hour = questions.ask(Range("sum(service:http_requests:rate5m)"))
    ...  # other work: the questions are under way, side by side
    rate()  # samples, or Unanswered

Nothing is raised: what goes wrong is an `Unanswered` that says in words why. It never holds the URL, which may have
a password in it. An answer is kept for some seconds, so that ten open pages cost no more than one.
"""

import base64
import http.client
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotDone
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, Protocol, TypeVar
from urllib.parse import SplitResult, unquote, urlencode, urlsplit

from monitoring.conf import monitoring_settings

logger = logging.getLogger(__name__)

ROUND_SECONDS = 2.0
"""How long a page waits, for all its questions together."""
KEPT_SECONDS = 5.0
"""How old an answer may be, also one that says what went wrong."""
AT_ONCE = 8
MOST_BYTES = 8_000_000
READ_BYTES = 65_536

Answer = TypeVar("Answer")
AnswerOf = TypeVar("AnswerOf", covariant=True)


@dataclass(frozen=True)
class Unanswered:
    """There is no answer, and why, in words. `is_not_set`: because nobody has said where Prometheus is."""

    why: str
    is_not_set: bool = False

    def __str__(self) -> str:
        return self.why


NOT_SET = Unanswered("needs Prometheus: set PROMETHEUS_URL", is_not_set=True)


@dataclass(frozen=True)
class Sample:
    """A value of now. None: no number, such as a ratio without traffic."""

    labels: Mapping[str, str]
    value: float | None


@dataclass(frozen=True)
class Series:
    """Values over time at even steps. `times`: seconds since 1970. None: nothing was known then."""

    labels: Mapping[str, str]
    times: Sequence[float]
    values: Sequence[float | None]


@dataclass(frozen=True)
class Alert:
    """An alert that fires. `since`: when its condition became true, before its waiting time."""

    name: str
    severity: str
    summary: str
    description: str
    runbook_url: str
    labels: Mapping[str, str]
    since: datetime | None


class Question(Protocol[AnswerOf]):
    """What can be asked: equal questions share an answer."""

    def path(self) -> str:
        """The API's path and parameters, as of now."""

    def read(self, data: Any) -> AnswerOf:
        """Make sense of the answer's "data". Raises KeyError, TypeError, ValueError for another shape."""


@dataclass(frozen=True)
class Instant:
    """The value of each series of an expression, now."""

    expression: str

    def path(self) -> str:
        return f"query?{urlencode({'query': self.expression})}"

    def read(self, data: Any) -> list[Sample]:
        if data["resultType"] == "scalar":
            return [Sample({}, _number(data["result"][1]))]
        return [Sample(each["metric"], _number(each["value"][1])) for each in data["result"]]


@dataclass(frozen=True)
class Range:
    """The values of each series of an expression over the last `seconds`, at whole multiples of the step."""

    expression: str
    seconds: int = 3600
    step_seconds: int = 60

    def path(self) -> str:
        end = self._end()
        span = {"start": end - self.seconds, "end": end, "step": self.step_seconds}
        return f"query_range?{urlencode({'query': self.expression, **span})}"

    def read(self, data: Any) -> list[Series]:
        end = self._end()
        times = [float(at) for at in range(end - self.seconds, end + 1, self.step_seconds)]
        found = [(each["metric"], {float(at): _number(text) for at, text in each["values"]}) for each in data["result"]]
        return [Series(labels, times, [values.get(at) for at in times]) for labels, values in found]

    def _end(self) -> int:
        return int(time.time()) // self.step_seconds * self.step_seconds


@dataclass(frozen=True)
class FiringAlerts:
    """The alerts that fire now. Unanswered by a Prometheus that has no rules of any: none would ever fire."""

    def path(self) -> str:
        return "rules?type=alert"

    def read(self, data: Any) -> "list[Alert] | Unanswered":
        rules = [rule for group in data["groups"] for rule in group["rules"]]
        if not rules:
            return Unanswered("Prometheus has no alert rules")
        return [_alert(each) for rule in rules for each in rule["alerts"] if each["state"] == "firing"]


def _alert(found: Any) -> Alert:
    labels, annotations = found["labels"], found.get("annotations") or {}
    try:
        # Nanoseconds, which Python cannot read.
        since = datetime.fromisoformat(f"{found['activeAt'][:19]}+00:00")
    except (KeyError, TypeError, ValueError):
        since = None
    return Alert(
        name=labels["alertname"],
        severity=labels.get("severity", ""),
        summary=annotations.get("summary", ""),
        description=annotations.get("description", ""),
        runbook_url=annotations.get("runbook_url", ""),
        labels=labels,
        since=since,
    )


def _number(text: str) -> float | None:
    """Infinities too are no number that anybody could be shown."""
    value = float(text)
    return value if math.isfinite(value) else None


@dataclass
class Round:
    """The questions of one page. Their answers are waited for until `seconds` after it was made."""

    url: str = field(default_factory=lambda: monitoring_settings().prometheus_url, repr=False)
    seconds: float = ROUND_SECONDS

    def __post_init__(self) -> None:
        self._ends_at = time.monotonic() + self.seconds

    def ask(self, question: Question[Answer]) -> Callable[[], Answer | Unanswered]:
        """Begin to ask; return what waits for the answer. It may be called again."""
        if not self.url:
            return lambda: NOT_SET
        asked = _ask(self.url, question)

        def wait() -> Answer | Unanswered:
            try:
                answer: Answer | Unanswered = asked.result(max(self._ends_at - time.monotonic(), 0))
            except NotDone:
                return _silent(self.seconds)
            return answer

        return wait


def forget_answers() -> None:
    """Ask anew from here on."""
    with _lock:
        _kept.clear()


_lock = threading.Lock()
_kept: dict[tuple[str, Question[Any]], tuple[float, Future[Any]]] = {}


@lru_cache(maxsize=1)
def _pool(pid: int) -> ThreadPoolExecutor:
    """The threads of this process: they do not survive a fork."""
    return ThreadPoolExecutor(AT_ONCE, "prometheus")


def _ask(url: str, question: Question[Any]) -> Future[Any]:
    """The answer that is kept, or under way, or else a new one."""
    now = time.monotonic()
    with _lock:
        for key in [key for key, (since, _) in _kept.items() if now - since > KEPT_SECONDS]:
            del _kept[key]
        if (url, question) not in _kept:
            _kept[url, question] = now, _pool(os.getpid()).submit(_answer, url, question, now)
        return _kept[url, question][1]


def _answer(url: str, question: Question[Any], asked_at: float) -> Any:
    if time.monotonic() - asked_at > ROUND_SECONDS:  # it has waited behind others, and nobody waits for it any more
        return _silent(ROUND_SECONDS)
    try:
        status, content_type, body = _get(urlsplit(url), question.path())
        return _understood(status, content_type, body, question)
    except TimeoutError:
        return _silent(ROUND_SECONDS)
    except OSError as error:
        return Unanswered(f"Prometheus does not answer: {(error.strerror or type(error).__name__).lower()}")
    except http.client.HTTPException:
        return Unanswered("Prometheus does not answer: what came back is not HTTP")
    except Exception as error:
        # Without its text, which may name the URL.
        logger.warning("question to Prometheus failed", extra={"error_type": type(error).__name__})
        return Unanswered(f"Prometheus was not understood: {type(error).__name__}")


def _silent(seconds: float) -> Unanswered:
    return Unanswered(f"Prometheus does not answer: nothing within {seconds:g} s")


def _get(url: SplitResult, path: str) -> tuple[int, str, bytes]:
    """One GET, without redirects and proxies. Raises OSError, TimeoutError, HTTPException."""
    deadline = time.monotonic() + ROUND_SECONDS
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(url.hostname or "", url.port, timeout=ROUND_SECONDS)
    headers = {"Accept": "application/json"}
    if url.username is not None:
        pair = f"{unquote(url.username)}:{unquote(url.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    try:
        connection.request("GET", f"{url.path.rstrip('/')}/api/v1/{path}", headers=headers)
        response = connection.getresponse()
        body = bytearray()
        while part := response.read1(READ_BYTES):
            body += part
            if time.monotonic() > deadline:  # the timeout is one of each part alone
                raise TimeoutError
            if len(body) > MOST_BYTES:
                raise ValueError("too long an answer")
        return response.status, response.getheader("Content-Type", ""), bytes(body)
    finally:
        connection.close()


def _understood(status: int, content_type: str, body: bytes, question: Question[Any]) -> Any:
    if not content_type.startswith("application/json"):
        kind = content_type.partition(";")[0] or "no content type"
        return Unanswered(f"What answers at PROMETHEUS_URL is not Prometheus's API: HTTP {status}, {kind}")
    answer = json.loads(body)
    if status != http.HTTPStatus.OK or answer.get("status") != "success":
        return Unanswered(f"Prometheus refuses the question: HTTP {status}, {str(answer.get('error', ''))[:200]}")
    return question.read(answer["data"])
