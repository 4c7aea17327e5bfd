"""Realistic traffic over HTTP: people of several tenants who open conversations, write, are replied to, and end them.

`Simulation` sends it and keeps a ledger of what was accepted; `differences()` compares the ledger with what analytics
has counted since.
"""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from http import HTTPStatus
from secrets import token_urlsafe
from typing import Any
from uuid import UUID, uuid4

import urllib3
from django.db import transaction
from django.utils import timezone

from voicehelper.analytics.models import DailyTotal
from voicehelper.conversations.models import Conversation
from voicehelper.identity.models import ApiToken, Tenant, User
from voicehelper.identity.services import create_tenant, register_user

MODES: dict[str, int] = {
    Conversation.Mode.CHAT: 6,
    Conversation.Mode.VOICE: 2,
    Conversation.Mode.AGENT: 1,
    Conversation.Mode.WORKFLOW: 1,
}
"""How often each mode is chosen, in relation."""
TEXT = """the delivery of my order is late can you tell me when it comes and whether I may change the address before it
please summarise this contract and say which of its clauses differ from the one we signed last year thank you"""
WORDS = TEXT.split()
PEOPLE_EACH = 2
TOKEN_LIFE = timedelta(days=1)
MOST_MESSAGES = 6
TRIES = 8
"""How often a request is sent whose fate is not known, or that the server refused for the moment."""
TIMEOUT_SECONDS = 30.0
LONGEST_WAIT_SECONDS = 5.0
REPLY_TIMEOUT_SECONDS = 120.0
SPOKEN_MS_A_CHARACTER = 60

Sent = tuple[UUID, str]
"""Tenant and mode."""
Counted = tuple[Counter[Sent], Counter[Sent], Counter[Sent]]
"""Conversations, messages and tokens."""


@dataclass(frozen=True)
class Person:
    """Somebody who logs in with a token."""

    tenant_id: UUID
    token: str


@transaction.atomic
def people_of(tenants: int) -> list[Person]:
    """Return the people of so many simulated tenants, who are made where they are missing, with tokens for a day."""
    people = []
    for number in range(1, tenants + 1):
        name = f"Simulated {number}"
        tenant = Tenant.objects.filter(name=name).first() or create_tenant(name=name)
        for which in range(1, PEOPLE_EACH + 1):
            username = f"simulated-{number}-{which}"
            user = User.objects.filter(username=username).first() or register_user(
                tenant=tenant, username=username, password=token_urlsafe(24), role=User.Role.ADMIN
            )
            expires_at = timezone.now() + TOKEN_LIFE
            token = ApiToken.objects.issue(user=user, name="simulate_traffic", expires_at=expires_at)
            people.append(Person(tenant.id, token.text))
    return people


@dataclass
class Ledger:
    """What was accepted, by tenant and mode, and how long requests took but for replies. Used from many threads."""

    conversations: Counter[Sent] = field(default_factory=Counter)
    messages: Counter[Sent] = field(default_factory=Counter)
    tokens: Counter[Sent] = field(default_factory=Counter)
    replies: int = 0
    seconds: list[float] = field(default_factory=list)
    refused: Counter[int] = field(default_factory=Counter)
    unknown: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Summary:
    """Figures of a span of time, and since the beginning `replies`, `refused` and `unknown`.

    `p50`, `p95`: seconds, None without a request.
    """

    requests: int
    per_second: float
    p50: float | None
    p95: float | None
    replies: int
    refused: int
    unknown: int


class Simulation:
    """Sends `rate` requests a second in all for `seconds`, from `people` in turn, by chance as seeded."""

    def __init__(
        self,
        url: str,
        people: Sequence[Person],
        *,
        rate: float,
        seconds: float,
        error_rate: float,
        reply_share: float,
        seed: int,
        threads: int = 32,
    ) -> None:
        """`error_rate`: the share of conversations that fail, and of requests that are wrong on purpose.

        `reply_share`: of messages that the assistant is asked to reply to.
        """
        self.ledger = Ledger()
        self._url = url.rstrip("/")
        self._people = people
        self._rate = rate
        self._seconds = seconds
        self._error_rate = error_rate
        self._reply_share = reply_share
        self._chance = random.Random(seed)  # noqa: S311  (traffic, not a secret)
        self._threads = threads
        self._http = urllib3.PoolManager(maxsize=threads, retries=False, timeout=TIMEOUT_SECONDS)
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Begin no further conversation; those under way are finished."""
        self._stopped.set()

    def run(self) -> Iterator[Summary]:
        """Send; yield a summary of each second, and one of the whole at last."""
        begun = shown = time.monotonic()
        seen = 0
        next_at = begun
        with ThreadPoolExecutor(self._threads, "person") as pool:
            pending = set()
            while not self._stopped.is_set() and (now := time.monotonic()) - begun < self._seconds:
                if now >= next_at:
                    steps = self._script()
                    pending.add(pool.submit(self._converse, self._chance.choice(self._people), steps))
                    # The next one when as many requests as this one has are due, at random as people come.
                    next_at += self._chance.expovariate(self._rate / steps.requests)
                pending = {each for each in pending if not each.done() or each.result()}
                if now - shown >= 1:
                    yield self._summary(seen, now - shown)
                    seen, shown = len(self.ledger.seconds), now
                self._stopped.wait(min(max(next_at - time.monotonic(), 0.0), 0.05))
            wait(pending)
            for each in pending:
                each.result()
        yield self._summary(0, time.monotonic() - begun)

    def _summary(self, since: int, seconds: float) -> Summary:
        with self.ledger.lock:
            times = sorted(self.ledger.seconds[since:])
            replies, refused, unknown = self.ledger.replies, self.ledger.refused.total(), self.ledger.unknown
        p50, p95 = (times[int(len(times) * share)] if times else None for share in (0.5, 0.95))
        return Summary(len(times), len(times) / max(seconds, 1e-9), p50, p95, replies, refused, unknown)

    def _script(self) -> "Script":
        chance = self._chance
        return Script(
            mode=str(chance.choices([*MODES], [*MODES.values()])[0]),
            messages=[
                (_text(chance), chance.random() < self._reply_share) for _ in range(chance.randint(1, MOST_MESSAGES))
            ],
            fails=chance.random() < self._error_rate,
            is_wrong=chance.random() < self._error_rate,
            ends=chance.random() < 0.9,
        )

    def _converse(self, person: Person, script: "Script") -> None:
        if self._stopped.is_set():
            return
        sent = person.tenant_id, str(script.mode)
        first, _ = script.messages[0]
        opened = self._post(person, "conversations", {"title": first[:80], "mode": script.mode})
        if opened is None:
            return
        with self.ledger.lock:
            self.ledger.conversations[sent] += 1
        conversation = opened["id"]
        for content, wants_reply in script.messages:
            message: dict[str, Any] = {"conversation_id": conversation, "content": content}
            if script.mode == Conversation.Mode.VOICE:
                message["duration_ms"] = len(content) * SPOKEN_MS_A_CHARACTER
            if self._post(person, "messages", message) is not None:
                with self.ledger.lock:
                    self.ledger.messages[sent] += 1
                if wants_reply:
                    self._ask_for_reply(person, conversation)
        if script.is_wrong:
            self._post(person, "messages", {"conversation_id": str(uuid4()), "content": "lost"})
        if script.ends:
            self._post(person, f"conversations/{conversation}/{'fail' if script.fails else 'complete'}", {})
        if any(wants_reply for _, wants_reply in script.messages):
            self._count_replies(person, conversation, sent)

    def _ask_for_reply(self, person: Person, conversation: str) -> None:
        """Ask once, whatever becomes of it: it is looked up in the end what was replied."""
        headers = self._headers(person) | {"Accept": "application/json"}
        url = f"{self._url}/api/v1/conversations/{conversation}/replies"
        with suppress(urllib3.exceptions.HTTPError):
            # It takes no Idempotency-Key.
            self._http.request("POST", url, headers=headers, timeout=REPLY_TIMEOUT_SECONDS)

    def _count_replies(self, person: Person, conversation: str, sent: Sent) -> None:
        page = self._request(person, "GET", f"conversations/{conversation}/messages")
        if page is None:
            return
        replies = [one for one in page["results"] if one["role"] == "assistant"]
        with self.ledger.lock:
            self.ledger.replies += len(replies)
            self.ledger.messages[sent] += len(replies)
            self.ledger.tokens[sent] += sum(one["input_tokens"] + one["output_tokens"] for one in replies)

    def _post(self, person: Person, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        return self._request(person, "POST", path, body=json.dumps(body))

    def _request(self, person: Person, method: str, path: str, body: str | None = None) -> dict[str, Any] | None:
        """Send until it is known what became of it; return the answer of one that was accepted.

        Each try has the same Idempotency-Key: one whose answer was lost is not done twice.
        """
        headers = self._headers(person) | {"Idempotency-Key": str(uuid4())}
        for attempt in range(TRIES):
            started = time.perf_counter()
            with suppress(urllib3.exceptions.HTTPError):
                answer = self._http.request(method, f"{self._url}/api/v1/{path}", body=body, headers=headers)
                with self.ledger.lock:
                    self.ledger.seconds.append(time.perf_counter() - started)
                if answer.status < HTTPStatus.MULTIPLE_CHOICES:
                    return dict(json.loads(answer.data))
                # The try before this one may be under way still.
                is_under_way = answer.status == HTTPStatus.CONFLICT and attempt > 0
                is_for_now = is_under_way or answer.status == HTTPStatus.TOO_MANY_REQUESTS
                if answer.status < HTTPStatus.INTERNAL_SERVER_ERROR and not is_for_now:
                    with self.ledger.lock:
                        self.ledger.refused[answer.status] += 1
                    return None
                if answer.status == HTTPStatus.TOO_MANY_REQUESTS:
                    time.sleep(min(float(answer.headers.get("Retry-After") or 0), LONGEST_WAIT_SECONDS))
            time.sleep(min(0.1 * 2**attempt, LONGEST_WAIT_SECONDS))
        with self.ledger.lock:
            self.ledger.unknown += 1
        return None

    def _headers(self, person: Person) -> dict[str, str]:
        return {"Authorization": f"Token {person.token}", "Content-Type": "application/json"}


@dataclass(frozen=True)
class Script:
    """What one person does in one conversation. `messages`: each with whether the assistant is to reply to it."""

    mode: str
    messages: Sequence[tuple[str, bool]]
    fails: bool
    is_wrong: bool
    ends: bool

    @property
    def requests(self) -> int:
        replies = sum(wants_reply for _, wants_reply in self.messages)
        return 1 + len(self.messages) + replies + (replies > 0) + self.is_wrong + self.ends


def _text(chance: random.Random) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(min(int(chance.lognormvariate(2.7, 0.8)) + 1, 400)))


def counted(tenants: Sequence[UUID]) -> Counted:
    """What analytics has counted of these tenants, over all days."""
    conversations: Counter[Sent] = Counter()
    messages: Counter[Sent] = Counter()
    tokens: Counter[Sent] = Counter()
    for total in DailyTotal.objects.filter(tenant_id__in=tenants):
        conversations[total.tenant_id, total.mode] += total.conversations
        messages[total.tenant_id, total.mode] += total.messages
        tokens[total.tenant_id, total.mode] += total.input_tokens + total.output_tokens
    return conversations, messages, tokens


def differences(ledger: Ledger, before: Counted, after: Counted) -> list[str]:
    """Where analytics differs from the ledger, a line each; empty when they are equal."""
    found = []
    accepted = ledger.conversations, ledger.messages, ledger.tokens
    for name, sent, old, new in zip(("conversations", "messages", "tokens"), accepted, before, after, strict=True):
        for key in sorted({*sent, *old, *new}, key=str):
            grown = new[key] - old[key]
            if grown != sent[key]:
                found.append(f"tenant {key[0]}, {key[1]}: {sent[key]} {name} accepted, {grown} counted")
    return found
