"""The state line: from facts to what is wrong, worst first, in words."""

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from events_outbox.models import Worker
from events_outbox.status import ConsumerState, OpenTransaction, OutboxStatus, ProcessedMarks
from monitoring.prometheus import NOT_SET, Alert, Unanswered
from voicehelper.console import state
from voicehelper.console.database import Database, LastError, TenantRows
from voicehelper.console.figures import Chart, Figures, Http, Llm, Stores
from voicehelper.console.overview import ConsumerFigures, Overview, TenantOverview
from voicehelper.console.state import Severity, state_of, state_of_tenant
from voicehelper.notifications.backlog import Backlog
from voicehelper.notifications.models import Channel

NOW = datetime(2026, 3, 4, 3, 0, tzinfo=UTC)
ALERTS = Path(__file__).resolve().parents[3] / "monitoring/ops/rules/alerts.yml"

STATUS = OutboxStatus(
    leader="host:1",
    leader_host="host",
    leader_pid=1,
    leader_since=NOW,
    lock_held_by="",
    heartbeat_age_seconds=1.0,
    standbys=1,
    pending=0,
    oldest_pending_age_seconds=None,
    events_per_second=3.0,
    last_error="",
    relay_paused_at=None,
    relay_paused_by="",
    relay_pause_reason="",
    open_transactions=0,
    oldest_open_transaction=None,
    undeliverable=0,
    undeliverable_to_redrive=0,
    undeliverable_discarded=0,
    dead_letters={},
    consumers=[ConsumerState("audit", "audit", 0, None, "", "")],
    processed_marks=ProcessedMarks(0, 0),
    published="1:1:",
    window=None,
    cursor_is_of_this_cluster=True,
)
FIGURES = Figures(
    http=Http(),
    llm=Llm(),
    stores=Stores(),
    publishing=Chart(),
    http_rate=Chart(),
    http_p95=Chart(),
    alerts=[],
    published_per_minute=None,
    failure_share=None,
    handled={},
    lag={},
    lag_seconds={},
    prometheus=None,
)
MEMBER = Worker(kind="consumer", name="audit", state="works")
MEMBER.is_alive = True
CONSUMER = ConsumerFigures(
    name="audit",
    members=[MEMBER],
    lag=0,
    lag_seconds=0.0,
    lag_note="",
    per_second=1.0,
    dead_letters=0,
    paused_at=None,
    paused_by="",
    pause_reason="",
    last_error=None,
)
LONG_TRANSACTION = OpenTransaction(7, None, "import", "app", None, "idle in transaction", 700.0, None)


def overview(*, missing=(), relays=(), alerts=(), prometheus=None, consumer=None, deliveries=(), others=(), **status):
    workers = [Worker(kind="relay", name="relay", state=each) for each in relays]
    workers += [Worker(kind="other", name=each, state="works") for each in others]
    for worker in workers:
        worker.is_alive = True
    database = Database(
        status=replace(STATUS, **status), workers=workers, missing=list(missing), deliveries=list(deliveries)
    )
    figures = replace(FIGURES, alerts=alerts, prometheus=prometheus)
    return Overview(NOW, database, figures, [replace(CONSUMER, **(consumer or {}))])


def alert(name, severity="page", **labels):
    return Alert(name, severity, f"{name} is bad", "", "", labels, NOW - timedelta(minutes=5))


def test_healthy_when_all_is_known_to_be():
    assert state_of(overview()).line == "Healthy: events flow."
    assert state_of(overview()).level == "healthy"


def test_healthy_without_prometheus_says_what_is_not_looked_at():
    found = state_of(overview(alerts=NOT_SET, prometheus=NOT_SET))
    assert found.level == "healthy"
    assert "no alerts are looked at" in found.line


PAUSED = {"relay_paused_at": NOW - timedelta(minutes=2), "relay_paused_by": "alice", "relay_pause_reason": "Kafka move"}
LEADERLESS = {"leader": None, "heartbeat_age_seconds": 90.0}
GUARDED = {"paused_at": NOW - timedelta(hours=1), "paused_by": "failure guard", "pause_reason": "60 of 100 failed"}


def member(state, since_seconds, error=""):
    worker = Worker(kind="consumer", name="audit", state=state, last_error=error)
    worker.is_alive, worker.read_at, worker.state_since = True, NOW, NOW - timedelta(seconds=since_seconds)
    return worker


CASES = {
    "no relay, nothing pending": (LEADERLESS, Severity.PAGE, "No relay leads: nothing is published. No relay is runn"),
    "no relay, pending": (
        {**LEADERLESS, "pending": 3, "oldest_pending_age_seconds": 42.0},
        Severity.PAGE,
        "The last sign of one is 1 min 30 s old. 3 events waiting, the oldest for 42 s.",
    ),
    "only standbys": ({**LEADERLESS, "relays": ["stands by"]}, Severity.PAGE, "1 stand by"),
    "lock held by another": (
        {**LEADERLESS, "lock_held_by": "replay_outbox"},
        Severity.PAGE,
        "replay_outbox holds its lock",
    ),
    "relay paused": (PAUSED, Severity.TICKET, "paused since 02:58 UTC (2 min) by alice: Kafka move."),
    "relay paused, late": (
        {**PAUSED, "pending": 1, "oldest_pending_age_seconds": 61.0},
        Severity.PAGE,
        "by alice: Kafka move. 1 event waiting, the oldest for 1 min 1 s.",
    ),
    "relay frozen": ({"heartbeat_age_seconds": 45.0}, Severity.PAGE, "no sign of life for 45 s: is it frozen?"),
    "relay waits": ({"last_error": "broker away"}, Severity.PAGE, "The relay cannot publish: broker away."),
    "oldest too old": (
        {"pending": 5, "oldest_pending_age_seconds": 61.0},
        Severity.PAGE,
        "published late: 5 events pending, the oldest for 1 min 1 s.",
    ),
    "counting stopped": (
        {"pending": 100_000, "oldest_pending_age_seconds": 61.0},
        Severity.PAGE,
        "100,000 events or more",
    ),
    "restored": ({"cursor_is_of_this_cluster": False}, Severity.PAGE, "The database was restored"),
    "undeliverable": ({"undeliverable": 2}, Severity.TICKET, "2 events undeliverable"),
    "long transaction": (
        {"oldest_open_transaction": LONG_TRANSACTION},
        Severity.TICKET,
        "A transaction of import has been open for 11 min 40 s",
    ),
    "consumer paused by its guard": (
        {"consumer": GUARDED},
        Severity.TICKET,
        "audit is paused since 02:00 UTC (1 h) by its failure guard: 60 of 100 failed.",
    ),
    "consumer without members": (
        {"consumer": {"members": [], "lag": 12}},
        Severity.PAGE,
        "Nobody runs the consumer audit: its events wait in Kafka, 12 by now.",
    ),
    "consumer hangs": (
        {"consumer": {"members": [MEMBER, member("hangs", 5, "KeyError: 'a'")], "lag": 7, "lag_seconds": 40.0}},
        Severity.PAGE,
        "audit handles nothing: it hangs since 02:59 UTC (5.0 s), 7 by now. Its last error: KeyError: 'a'.",
    ),
    "consumer waits": (
        {"consumer": {"members": [member("waits for Kafka", 31), member("waits for the database", 40)]}},
        Severity.PAGE,
        "audit handles nothing: it waits for Kafka since 02:59 UTC (31 s).",
    ),
    "large lag": (
        {"consumer": {"lag": 10_001, "lag_seconds": 5.0}},
        Severity.PAGE,
        "audit is 10,001 events behind, the oldest is 5.0 s old.",
    ),
    "late": ({"consumer": {"lag": 1, "lag_seconds": 601.0}}, Severity.TICKET, "audit is late"),
    "lag not known": (
        {"consumer": {"lag": None, "lag_note": "is being measured"}},
        Severity.UNKNOWN,
        "Cannot tell how far audit is behind: its lag is being measured.",
    ),
    "age of the lag not known": (
        {"consumer": {"lag": 5, "lag_seconds": None}},
        Severity.UNKNOWN,
        "Cannot tell how long the 5 events have waited that audit has not handled.",
    ),
    "dead letters": (
        {"consumer": {"dead_letters": 2, "last_error": LastError("KeyError: 'a'\nmore", NOW, 1)}},
        Severity.TICKET,
        "audit has 2 open dead letters. The last: KeyError: 'a'.",
    ),
    "deliveries, and nobody to send them": (
        {"deliveries": [Backlog(Channel.EMAIL, 1, 0, 301.0)], "others": ["delivery webhook"]},
        Severity.PAGE,
        "Nobody runs deliver_notifications: 1 e-mail to be sent, the first has been due for 5 min 1 s.",
    ),
    "deliveries, more than are sent": (
        {"deliveries": [Backlog(Channel.WEBHOOK, 9000, 30, 400.0)], "others": ["delivery webhook"]},
        Severity.PAGE,
        "9,000 webhooks to be sent, the first has been due for 6 min 40 s.",
    ),
    "mail server away": (
        {"deliveries": [Backlog(Channel.EMAIL, 40, 21, 0.0)]},
        Severity.TICKET,
        "21 e-mails could not be sent and are tried again: is the mail server away?",
    ),
    "alert": (
        {"alerts": [alert("HttpErrors")]},
        Severity.PAGE,
        "fires since 02:55 UTC (5 min): HttpErrors is bad.",
    ),
    "ticket": ({"alerts": [alert("HttpSlow", "ticket")]}, Severity.TICKET, "HttpSlow"),
    "prometheus away": (
        {"alerts": Unanswered("Prometheus does not answer: connection refused")},
        Severity.UNKNOWN,
        "Cannot tell whether alerts fire. Prometheus does not answer: connection refused.",
    ),
    "database slow": ({"missing": ["the state"]}, Severity.UNKNOWN, "Cannot tell: the database is slow or away"),
}


@pytest.mark.parametrize(("facts", "severity", "words"), CASES.values(), ids=CASES)
def test_what_is_wrong_is_said(facts, severity, words):
    found = state_of(overview(**facts))
    assert len(found.problems) == 1
    [problem] = found.problems
    assert problem.severity == severity
    assert words in problem.text
    assert found.line == problem.text
    assert "Healthy" not in found.line
    assert problem.alert  # the runbook has a section


AT_THE_LIMIT = [
    {"pending": 5, "oldest_pending_age_seconds": 60.0},
    {"consumer": {"lag": 10_000}},
    {"consumer": {"lag": 1, "lag_seconds": 600.0}},
    {"oldest_open_transaction": replace(LONG_TRANSACTION, age_seconds=600.0)},
    {"consumer": {"members": [member("waits for partitions", 30)]}},
    {"deliveries": [Backlog(Channel.EMAIL, 900, 20, 300.0), Backlog(Channel.WEBHOOK, 900, 900, 0.0)]},
    {"consumer": {"members": [member("waits for partitions", 3000), MEMBER]}},
]


@pytest.mark.parametrize("facts", AT_THE_LIMIT)
def test_at_the_threshold_all_is_well(facts):
    assert state_of(overview(**facts)).level == "healthy"


def test_the_worst_comes_first_and_the_rest_follows():
    found = state_of(overview(undeliverable=1, **LEADERLESS, alerts=Unanswered("Prometheus is away")))
    assert [problem.severity for problem in found.problems] == [Severity.PAGE, Severity.UNKNOWN, Severity.TICKET]
    assert found.level == "page"


def test_a_paused_relay_does_not_hide_that_none_leads():
    found = state_of(overview(**PAUSED, **LEADERLESS))
    assert [problem.alert for problem in found.problems] == ["RelayWithoutLeader", "RelayPaused"]


def test_an_alert_about_what_is_said_is_not_said_twice():
    firing = [alert("RelayWithoutLeader"), alert("ConsumerDeadLetters", consumer="audit"), alert("WebDown")]
    found = state_of(overview(**LEADERLESS, alerts=firing, consumer={"dead_letters": 1}))
    assert [problem.alert for problem in found.problems] == ["RelayWithoutLeader", "WebDown", "ConsumerDeadLetters"]
    other = state_of(overview(alerts=[alert("ConsumerLag", consumer="other")], consumer={"lag": 20_000}))
    assert len(other.problems) == 2


@pytest.mark.parametrize(("open_letters", "level"), [(0, "healthy"), (None, "page"), (1, "ticket")])
def test_an_alert_about_dead_letters_that_are_dealt_with_is_left_out(open_letters, level):
    firing = [alert("ConsumerDeadLetters", consumer="audit")]
    assert state_of(overview(alerts=firing, consumer={"dead_letters": open_letters})).level == level


def test_a_tenant_hears_of_its_own():
    def of(rows):
        return state_of_tenant(TenantOverview(NOW, "t1", Database(tenant=rows), Llm()))

    assert of(TenantRows(3, 0, 0, NOW - timedelta(seconds=60))).line == "Nothing of your tenant is stuck."
    late = of(TenantRows(3, 0, 0, NOW - timedelta(seconds=61)))
    assert late.line == "3 events of your tenant wait to be published, the oldest for 1 min 1 s."
    assert late.level == "page"
    assert of(TenantRows(0, 2, 1)).line == "2 events of your tenant undeliverable."
    assert of(TenantRows(0, 0, 1)).line == "1 open dead letter of your tenant."
    assert of(None).level == "unknown"


THRESHOLDS = {
    "OutboxEventsWait": state.OLDEST_PENDING_SECONDS,
    "ConsumerLag": state.LAG_EVENTS,
    "ConsumerLate": state.LAG_SECONDS,
    "OutboxTransactionOpen": state.OPEN_TRANSACTION_SECONDS,
    "DeliveriesWait": state.OVERDUE_SECONDS,
    "EmailsFail": state.FAILING_EMAILS,
}


@pytest.mark.parametrize(("name", "threshold"), THRESHOLDS.items())
def test_thresholds_are_those_of_the_alerts(name, threshold):
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    [expression] = [rule["expr"] for rule in rules if rule["alert"] == name]
    assert re.search(r"> (\d+)", expression)[1] == str(threshold)
