"""The state line: from what was gathered to what is wrong, worst first, in words, and what to look at first.

"Healthy" is said only of what is known to be. What is needed and not known is a problem of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum

from events_outbox.heartbeats import State as Doing
from events_outbox.models import Worker
from events_outbox.status import COUNT_LIMIT, OutboxStatus, readable_seconds
from monitoring.prometheus import Unanswered
from voicehelper.notifications.backlog import Backlog
from voicehelper.notifications.deliveries import worker_name
from voicehelper.notifications.models import Channel

from .overview import ConsumerFigures, Overview, TenantOverview, alive

# Those of monitoring/ops/rules/alerts.yml: a test compares them.
OLDEST_PENDING_SECONDS = 60
LAG_EVENTS = 10_000
LAG_SECONDS = 600
OPEN_TRANSACTION_SECONDS = 600
OVERDUE_SECONDS = 300
FAILING_EMAILS = 20

STUCK_SECONDS = 30.0
"""A consumer may wait so long, as it does while its group is shared out anew."""

WAITING = (Doing.STARTS, Doing.WAITS_FOR_PARTITIONS, Doing.WAITS_FOR_KAFKA, Doing.WAITS_FOR_DATABASE)

GUARD = "failure guard"
"""Who pauses a consumer that fails too often."""


class Severity(IntEnum):
    """How bad it is, the worst first. As in the alerts: a PAGE is to be acted on now, a TICKET in working hours."""

    PAGE = 0
    UNKNOWN = 1
    TICKET = 2

    @property
    def words(self) -> str:
        return {self.PAGE: "act now", self.UNKNOWN: "cannot tell", self.TICKET: "act soon"}[self]


@dataclass(frozen=True)
class Problem:
    """`text`: what is wrong, since when. `page`, `query`: the admin's page to look at first, and its filter.

    `alert`: the alert about the same, whose section of the runbook goes on. `link`: what the page is called.
    """

    severity: Severity
    text: str
    link: str = ""
    page: str = ""
    query: str = ""
    alert: str = ""
    consumer: str = ""


@dataclass(frozen=True)
class State:
    """`line`: the sentence at the top. `problems`: what it comes from, empty when healthy."""

    line: str
    problems: Sequence[Problem]

    @property
    def level(self) -> str:
        """healthy, page, unknown or ticket."""
        return self.problems[0].severity.name.lower() if self.problems else "healthy"


RELAY, WORKERS = "admin:events_outbox_relaycursor_changelist", "admin:events_outbox_worker_changelist"
EVENTS, LETTERS = "admin:events_outbox_outboxevent_changelist", "admin:events_outbox_deadletter_changelist"
UNDELIVERABLE = "admin:events_outbox_undeliverableevent_changelist"
DELIVERIES = "admin:notifications_delivery_changelist"
PAUSES = "admin:events_outbox_consumerpause_changelist"
OVERVIEW = "admin:index"


def state_of(overview: Overview) -> State:
    """All that is wrong."""
    problems = sorted(_problems(overview), key=lambda problem: problem.severity)
    if not problems:
        more = "" if overview.figures.prometheus is None else " Without Prometheus no alerts are looked at."
        return State(f"Healthy: events flow.{more}", ())
    return State(problems[0].text, problems)


def state_of_tenant(overview: TenantOverview) -> State:
    """What is wrong with one tenant's events."""
    problems = list(_tenant_problems(overview))
    return State(problems[0].text, problems) if problems else State("Nothing of your tenant is stuck.", ())


def _problems(overview: Overview) -> Iterator[Problem]:
    status, now = overview.database.status, overview.at
    said: list[Problem] = []
    if overview.database.missing:
        what = ", ".join(overview.database.missing)
        text = f"Cannot tell: the database is slow or away, and did not give in time: {what}."
        said.append(Problem(Severity.UNKNOWN, text, alert="DatabaseSlow"))
    if status is not None:
        said += [*_relay(status, overview.relays, now), *_outbox(status)]
    for consumer in overview.consumers:
        said += _consumer(consumer, now)
    for backlog in overview.database.deliveries or ():
        said += _deliveries(backlog, overview.database.workers)
    yield from said
    yield from _alerts(overview, said, now)


def _relay(status: OutboxStatus, relays: Sequence[Worker] | None, now: datetime) -> Iterator[Problem]:
    waiting = _waiting(status)
    is_late = _is_late(status)
    if not status.cursor_is_of_this_cluster:
        text = "The database was restored: the relay's cursor is that of another cluster, and no relay has led since."
        yield Problem(Severity.PAGE, text, "Workers", WORKERS, "kind=relay", "RelayWithoutLeader")
    elif status.relay_paused_at is not None:
        since = _since(status.relay_paused_at, now)
        text = f"The relay is paused{since} by {status.relay_paused_by}: {_end(status.relay_pause_reason)}{waiting}"
        yield Problem(Severity.PAGE if is_late else Severity.TICKET, text, "Relay", RELAY, "", "RelayPaused")
        yield from _leading(status, relays, "")  # resuming would not help then
    elif trouble := list(_leading(status, relays, waiting)):
        yield from trouble
    elif status.last_error:
        text = f"The relay cannot publish: {_end(status.last_error)}{waiting}"
        yield Problem(Severity.PAGE, text, "Relay", RELAY, "", "OutboxEventsWait")
    elif is_late:
        age = readable_seconds(status.oldest_pending_age_seconds or 0.0)
        text = f"Events are published late: {_count(status.pending)} pending, the oldest for {age}."
        yield Problem(Severity.PAGE, text, "Pending events", EVENTS, "status=pending", "OutboxEventsWait")


def _leading(status: OutboxStatus, relays: Sequence[Worker] | None, waiting: str) -> Iterator[Problem]:
    """That no relay leads, or the one that does is not heard of."""
    if status.lock_held_by:
        text = f"No relay leads: {status.lock_held_by} holds its lock, and nothing is published meanwhile.{waiting}"
        yield Problem(Severity.PAGE, text, "Relay", RELAY, "", "RelayWithoutLeader")
    elif status.leader is None:
        alive = "" if relays is None else " No relay is running." if not relays else f" {len(relays)} stand by."
        heard = status.heartbeat_age_seconds
        last = "" if heard is None else f" The last sign of one is {readable_seconds(heard)} old."
        text = f"No relay leads: nothing is published.{alive}{last}{waiting}"
        yield Problem(Severity.PAGE, text, "Workers", WORKERS, "kind=relay", "RelayWithoutLeader")
    elif (status.heartbeat_age_seconds or 0.0) > Worker.ALIVE_SECONDS:
        age = readable_seconds(status.heartbeat_age_seconds or 0.0)
        text = f"The relay {status.leader} leads and has given no sign of life for {age}: is it frozen?{waiting}"
        yield Problem(Severity.PAGE, text, "Workers", WORKERS, "kind=relay", "OutboxEventsWait")


def _outbox(status: OutboxStatus) -> Iterator[Problem]:
    if status.undeliverable:
        text = f"{_count(status.undeliverable)} undeliverable: Kafka refused them, or one before of their key."
        yield Problem(
            Severity.TICKET, text, "Undeliverable events", UNDELIVERABLE, "state=open", "OutboxEventsUndeliverable"
        )
    oldest = status.oldest_open_transaction
    if oldest is not None and (oldest.age_seconds or 0.0) > OPEN_TRANSACTION_SECONDS:
        who = oldest.prepared or oldest.application_name or f"process {oldest.pid}"
        age = readable_seconds(oldest.age_seconds or 0.0)
        text = f"A transaction of {who} has been open for {age}: its events wait for its end."
        yield Problem(Severity.TICKET, text, "Relay", RELAY, "", "OutboxTransactionOpen")


def _consumer(consumer: ConsumerFigures, now: datetime) -> Iterator[Problem]:
    name, of_it = consumer.name, f"kind=consumer&name={consumer.name}"
    if consumer.paused_at is not None:
        who = "by its failure guard" if consumer.paused_by == GUARD else f"by {consumer.paused_by}"
        text = f"{name} is paused{_since(consumer.paused_at, now)} {who}: {_end(consumer.pause_reason)}"
        yield Problem(Severity.TICKET, text, "Paused consumers", PAUSES, "", "ConsumerPaused", name)
    if consumer.members is not None and not consumer.members:
        text = f"Nobody runs the consumer {name}: its events wait in Kafka{_behind(consumer)}."
        yield Problem(Severity.PAGE, text, "Workers", WORKERS, of_it, "ConsumerDown", name)
    elif stuck := _stuck(consumer):
        text = f"{name} handles nothing: it {stuck.state}{_since(stuck.state_since, now)}{_behind(consumer)}."
        error = f" Its last error: {_end(_short(stuck.last_error))}" if stuck.last_error else ""
        yield Problem(Severity.PAGE, text + error, "Workers", WORKERS, of_it, "ConsumerLate", name)
    elif consumer.lag is not None and consumer.lag > LAG_EVENTS:
        text = f"{name} is {_count(consumer.lag)} behind{_oldest(consumer)}."
        yield Problem(Severity.PAGE, text, "Workers", WORKERS, of_it, "ConsumerLag", name)
    elif consumer.lag_seconds is not None and consumer.lag_seconds > LAG_SECONDS:
        text = f"{name} is late: the oldest event it has not handled is {readable_seconds(consumer.lag_seconds)} old."
        yield Problem(Severity.TICKET, text, "Workers", WORKERS, of_it, "ConsumerLate", name)
    if consumer.lag is None:
        text = f"Cannot tell how far {name} is behind: its lag {_end(consumer.lag_note)}"
        yield Problem(Severity.UNKNOWN, text, "Workers", WORKERS, of_it, "ConsumerLagUnknown", name)
    elif consumer.lag and consumer.lag_seconds is None:
        text = f"Cannot tell how long the {_count(consumer.lag)} have waited that {name} has not handled."
        yield Problem(Severity.UNKNOWN, text, "Workers", WORKERS, of_it, "ConsumerLagUnknown", name)
    if consumer.dead_letters:
        error = f" The last: {_end(_short(consumer.last_error.text))}" if consumer.last_error else ""
        many = "" if consumer.dead_letters == 1 else "s"
        text = f"{name} has {consumer.dead_letters:,} open dead letter{many}.{error}"
        query = f"state=open&consumer={name}"
        yield Problem(Severity.TICKET, text, "Dead letters", LETTERS, query, "ConsumerDeadLetters", name)


def _deliveries(backlog: Backlog, workers: Sequence[Worker] | None) -> Iterator[Problem]:
    query = f"state=pending&channel={backlog.channel}"
    if backlog.overdue_seconds > OVERDUE_SECONDS:
        senders = alive(workers, Worker.Kind.OTHER, worker_name(backlog.channel))
        nobody = "Nobody runs deliver_notifications: " if senders == [] else ""
        age = readable_seconds(backlog.overdue_seconds)
        what = f"{backlog.pending:,} {backlog.channel.label}{'' if backlog.pending == 1 else 's'} to be sent"
        text = f"{nobody}{what}, the first has been due for {age}."
        yield Problem(Severity.PAGE, text, "Deliveries", DELIVERIES, query, "DeliveriesWait")
    if backlog.channel == Channel.EMAIL and backlog.failing > FAILING_EMAILS:
        text = f"{backlog.failing:,} e-mails could not be sent and are tried again: is the mail server away?"
        yield Problem(Severity.TICKET, text, "Deliveries", DELIVERIES, query, "EmailsFail")


def _stuck(consumer: ConsumerFigures) -> Worker | None:
    """A member that hangs, or any when all have been waiting for something for too long."""
    if consumer.paused_at is not None:
        return None
    members = consumer.members or ()
    if hanging := [member for member in members if member.state == Doing.HANGS]:
        return hanging[0]
    waiting = [member for member in members if member.state in WAITING and _state_seconds(member) > STUCK_SECONDS]
    return waiting[0] if waiting and len(waiting) == len(members) else None


def _state_seconds(worker: Worker) -> float:
    return float((worker.read_at - worker.state_since).total_seconds())  # type: ignore[attr-defined]


def _alerts(overview: Overview, said: Sequence[Problem], now: datetime) -> Iterator[Problem]:
    """The alerts about what was not said already, and is not known to be done with."""
    alerts = overview.figures.alerts
    if isinstance(alerts, Unanswered):
        if not alerts.is_not_set:
            yield Problem(Severity.UNKNOWN, f"Cannot tell whether alerts fire. {_end(str(alerts))}", alert="TargetDown")
        return
    known = {(problem.alert, problem.consumer) for problem in said}
    # It is about what came within 15 minutes, and fires on when somebody has dealt with every one.
    known |= {("ConsumerDeadLetters", each.name) for each in overview.consumers if each.dead_letters == 0}
    for alert in alerts:
        if (alert.name, alert.labels.get("consumer", "")) not in known:
            severity = Severity.PAGE if alert.severity == "page" else Severity.TICKET
            since = _since(alert.since, now)
            yield Problem(severity, f"Alert {alert.name} fires{since}: {_end(alert.summary)}", alert=alert.name)


def _tenant_problems(overview: TenantOverview) -> Iterator[Problem]:
    rows = overview.database.tenant
    if rows is None:
        yield Problem(Severity.UNKNOWN, "Cannot tell: the database is slow or away.")
        return
    waited = (overview.at - rows.oldest_pending_at).total_seconds() if rows.oldest_pending_at else 0.0
    if waited > OLDEST_PENDING_SECONDS:
        text = f"{_count(rows.pending)} of your tenant wait to be published, the oldest for {readable_seconds(waited)}."
        yield Problem(Severity.PAGE, text, "Pending events", EVENTS, "status=pending")
    if rows.undeliverable:
        text = f"{_count(rows.undeliverable)} of your tenant undeliverable."
        yield Problem(Severity.TICKET, text, "Undeliverable events", UNDELIVERABLE, "state=open")
    if rows.dead_letters:
        many = "" if rows.dead_letters == 1 else "s"
        text = f"{rows.dead_letters:,} open dead letter{many} of your tenant."
        yield Problem(Severity.TICKET, text, "Dead letters", LETTERS, "state=open")


def _is_late(status: OutboxStatus) -> bool:
    return (status.oldest_pending_age_seconds or 0.0) > OLDEST_PENDING_SECONDS


def _waiting(status: OutboxStatus) -> str:
    if not status.pending or not status.cursor_is_of_this_cluster:
        return ""
    age = status.oldest_pending_age_seconds
    oldest = "" if age is None else f", the oldest for {readable_seconds(age)}"
    return f" {_count(status.pending)} waiting{oldest}."


def _count(count: int) -> str:
    """A number of events, counted as far as COUNT_LIMIT."""
    if count == COUNT_LIMIT:
        return f"{count:,} events or more"
    return f"{count:,} event{'' if count == 1 else 's'}"


def _behind(consumer: ConsumerFigures) -> str:
    return f", {consumer.lag:,} by now" if consumer.lag else ""


def _oldest(consumer: ConsumerFigures) -> str:
    return "" if consumer.lag_seconds is None else f", the oldest is {readable_seconds(consumer.lag_seconds)} old"


def _since(moment: datetime | None, now: datetime) -> str:
    if moment is None:
        return ""
    age = max((now - moment.astimezone(UTC)).total_seconds(), 0.0)
    return f" since {moment.astimezone(UTC):%H:%M} UTC ({readable_seconds(age)})"


def _short(text: str) -> str:
    line = text.strip().splitlines()[0] if text.strip() else ""
    return line if len(line) <= 160 else f"{line[:157]}..."


def _end(text: str) -> str:
    """The text as the end of a sentence."""
    short = _short(text)
    return short if short.endswith((".", "!", "?")) else f"{short}."
