"""Realistic traffic over HTTP: people of several tenants who open conversations, write messages and end them.

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

Sent = tuple[UUID, str]
"""Tenant and mode."""
Counted = tuple[Counter[Sent], Counter[Sent]]
"""Conversations and messages."""


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
    """What was accepted, by tenant and mode, and how long requests took. Used from many threads."""

    conversations: Counter[Sent] = field(default_factory=Counter)
    messages: Counter[Sent] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    refused: Counter[int] = field(default_factory=Counter)
    unknown: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Summary:
    """Figures of a span of time. `p50`, `p95`: seconds, None without a request."""

    requests: int
    per_second: float
    p50: float | None
    p95: float | None
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
        seed: int,
        threads: int = 32,
    ) -> None:
        """`error_rate`: the share of conversations that fail, and of requests that are wrong on purpose."""
        self.ledger = Ledger()
        self._url = url.rstrip("/")
        self._people = people
        self._rate = rate
        self._seconds = seconds
        self._error_rate = error_rate
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
            refused, unknown = self.ledger.refused.total(), self.ledger.unknown
        p50, p95 = (times[int(len(times) * share)] if times else None for share in (0.5, 0.95))
        return Summary(len(times), len(times) / max(seconds, 1e-9), p50, p95, refused, unknown)

    def _script(self) -> "Script":
        chance = self._chance
        return Script(
            mode=str(chance.choices([*MODES], [*MODES.values()])[0]),
            messages=[_text(chance) for _ in range(chance.randint(1, MOST_MESSAGES))],
            fails=chance.random() < self._error_rate,
            is_wrong=chance.random() < self._error_rate,
            ends=chance.random() < 0.9,
        )

    def _converse(self, person: Person, script: "Script") -> None:
        sent = person.tenant_id, str(script.mode)
        opened = self._post(person, "conversations", {"title": script.messages[0][:80], "mode": script.mode})
        if opened is None:
            return
        with self.ledger.lock:
            self.ledger.conversations[sent] += 1
        conversation = opened["id"]
        for content in script.messages:
            if self._post(person, "messages", {"conversation_id": conversation, "content": content}) is not None:
                with self.ledger.lock:
                    self.ledger.messages[sent] += 1
        if script.is_wrong:
            self._post(person, "messages", {"conversation_id": str(uuid4()), "content": "lost"})
        if script.ends:
            self._post(person, f"conversations/{conversation}/{'fail' if script.fails else 'complete'}", {})

    def _post(self, person: Person, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """Send until it is known what became of it; return the answer of one that was accepted.

        Each try has the same Idempotency-Key: one whose answer was lost is not done twice.
        """
        headers = {
            "Authorization": f"Token {person.token}",
            "Content-Type": "application/json",
            "Idempotency-Key": str(uuid4()),
        }
        for attempt in range(TRIES):
            started = time.perf_counter()
            with suppress(urllib3.exceptions.HTTPError):
                answer = self._http.request(
                    "POST", f"{self._url}/api/v1/{path}", body=json.dumps(body), headers=headers
                )
                with self.ledger.lock:
                    self.ledger.seconds.append(time.perf_counter() - started)
                if answer.status < HTTPStatus.BAD_REQUEST:
                    return dict(json.loads(answer.data))
                if answer.status < HTTPStatus.INTERNAL_SERVER_ERROR and answer.status != HTTPStatus.TOO_MANY_REQUESTS:
                    with self.ledger.lock:
                        self.ledger.refused[answer.status] += 1
                    return None
                if answer.status == HTTPStatus.TOO_MANY_REQUESTS:
                    time.sleep(min(float(answer.headers.get("Retry-After") or 0), LONGEST_WAIT_SECONDS))
            time.sleep(min(0.1 * 2**attempt, LONGEST_WAIT_SECONDS))
        with self.ledger.lock:
            self.ledger.unknown += 1
        return None


@dataclass(frozen=True)
class Script:
    """What one person does in one conversation."""

    mode: str
    messages: Sequence[str]
    fails: bool
    is_wrong: bool
    ends: bool

    @property
    def requests(self) -> int:
        return 1 + len(self.messages) + self.is_wrong + self.ends


def _text(chance: random.Random) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(min(int(chance.lognormvariate(2.7, 0.8)) + 1, 400)))


def counted(tenants: Sequence[UUID]) -> Counted:
    """What analytics has counted of these tenants, over all days: conversations and messages."""
    conversations: Counter[Sent] = Counter()
    messages: Counter[Sent] = Counter()
    for total in DailyTotal.objects.filter(tenant_id__in=tenants):
        conversations[total.tenant_id, total.mode] += total.conversations
        messages[total.tenant_id, total.mode] += total.messages
    return conversations, messages


def differences(
    ledger: Ledger, before: tuple[Counter[Sent], Counter[Sent]], after: tuple[Counter[Sent], Counter[Sent]]
) -> list[str]:
    """Where analytics differs from the ledger, a line each; empty when they are equal."""
    found = []
    for name, sent, old, new in zip(
        ("conversations", "messages"), (ledger.conversations, ledger.messages), before, after, strict=True
    ):
        for key in sorted({*sent, *old, *new}, key=str):
            grown = new[key] - old[key]
            if grown != sent[key]:
                found.append(f"tenant {key[0]}, {key[1]}: {sent[key]} {name} accepted, {grown} counted")
    return found
