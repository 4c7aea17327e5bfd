"""The overview: everything that its page shows, gathered within a bounded time."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from events_outbox.handlers import consumers
from events_outbox.lag import Lag
from events_outbox.models import Worker
from monitoring.conf import monitoring_settings
from monitoring.prometheus import Round

from . import database
from .database import Database, LastError
from .figures import Figures, Llm, LlmQuestions, Questions
from .lags import LAGS

PAGE_SECONDS = 2.0


@dataclass(frozen=True)
class ConsumerFigures:
    """A registered consumer. `lag`, `lag_seconds`, `per_second`: None when not known, `lag_note` says why not.

    `members`: those alive; None when not read. `paused_at`: None when it is not paused. `last_error`: None when there
    is none, or it is not known, or not among the latest dead letters.
    """

    name: str
    members: Sequence[Worker] | None
    lag: int | None
    lag_seconds: float | None
    lag_note: str
    per_second: float | None
    dead_letters: int | None
    paused_at: datetime | None
    paused_by: str
    pause_reason: str
    last_error: LastError | None
    errors_are_known: bool = True

    @property
    def partitions(self) -> int:
        return sum(len(member.assignment) for member in self.members or ())

    @property
    def state(self) -> str:
        """In a word or two."""
        if self.paused_at is not None:
            return "paused"
        if self.members is None:
            return "not known"
        states = {member.state for member in self.members}
        return ", ".join(sorted(states)) if states else "nobody runs it"


@dataclass(frozen=True)
class Overview:
    """What all of VoiceHelper does, at one moment."""

    at: datetime
    database: Database
    figures: Figures
    consumers: Sequence[ConsumerFigures]

    @property
    def relays(self) -> list[Worker] | None:
        return alive(self.database.workers, Worker.Kind.RELAY)


@dataclass(frozen=True)
class TenantOverview:
    """What concerns one tenant."""

    at: datetime
    tenant: str
    database: Database
    llm: Llm


def gather() -> Overview:
    """Gather everything. Database, Prometheus and Kafka are asked at the same time, each for a bounded time."""
    now, ends_at = datetime.now(UTC), time.monotonic() + PAGE_SECONDS
    questions = Questions(now)
    if not monitoring_settings().prometheus_url:
        LAGS.lags(0)
    found = database.read_all()
    figures = questions.figures()
    names = sorted(consumer.name for consumer in consumers())
    known = set(names) <= figures.lag.keys()
    lags = {} if known else LAGS.lags(ends_at - time.monotonic())
    return Overview(now, found, figures, [_consumer(name, found, figures, lags) for name in names])


def gather_tenant(tenant: str) -> TenantOverview:
    """Gather what concerns one tenant."""
    now = datetime.now(UTC)
    llm = LlmQuestions(Round(), now, tenant)
    found = database.read_tenant(tenant)
    return TenantOverview(now, tenant, found, llm.answer())


def alive(workers: Sequence[Worker] | None, kind: str, name: str = "") -> list[Worker] | None:
    """Those of a kind, and of a name, that are heard of; None when not read."""
    if workers is None:
        return None
    return [w for w in workers if w.is_alive and w.kind == kind and name in ("", w.name)]  # type: ignore[attr-defined]


def _consumer(name: str, found: Database, figures: Figures, lags: dict[str, Lag]) -> ConsumerFigures:
    members = alive(found.workers, Worker.Kind.CONSUMER, name)
    status = found.status
    state = next((each for each in status.consumers if each.name == name), None) if status else None
    lag = lags.get(name, Lag(None, None, "is being measured"))
    events, seconds = lag.events, lag.seconds
    if name in figures.lag:
        events, seconds = round(figures.lag[name]), figures.lag_seconds.get(name)
    per_second = figures.handled.get(name)
    if per_second is None and members is not None:
        per_second = sum(member.events_per_second for member in members)
    return ConsumerFigures(
        name=name,
        members=members,
        lag=events,
        lag_seconds=seconds,
        lag_note="" if events is not None else lag.not_known,
        per_second=per_second,
        dead_letters=state.dead_letters if state else None,
        paused_at=state.paused_at if state else None,
        paused_by=state.paused_by if state else "",
        pause_reason=state.pause_reason if state else "",
        last_error=_last_error(name, found),
        errors_are_known=found.workers is not None and found.letter_errors is not None,
    )


def _last_error(name: str, found: Database) -> LastError | None:
    """The latest of what its workers say and its dead letters hold."""
    errors = [
        LastError(worker.last_error, worker.last_error_at)
        for worker in found.workers or ()
        if worker.name == name and worker.kind == Worker.Kind.CONSUMER and worker.last_error and worker.last_error_at
    ]
    if letter := (found.letter_errors or {}).get(name):
        errors.append(letter)
    return max(errors, key=lambda error: error.at, default=None)
