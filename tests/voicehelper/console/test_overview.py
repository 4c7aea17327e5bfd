"""The overview page: what it shows, to whom, and within what time when others hang."""

import json
import re
import socket
import subprocess
import threading
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import psycopg
import pytest
from django.contrib.auth.models import Permission
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext

from events_outbox import emit_event
from events_outbox.lag import Lag
from events_outbox.models import DeadLetter, OutboxEvent, UndeliverableEvent, Worker
from monitoring import prometheus
from monitoring.prometheus import Series, Unanswered
from voicehelper.console import database, lags, overview
from voicehelper.console.database import emitted_per_minute
from voicehelper.console.figures import Chart, Line, _chart, _increase
from voicehelper.console.own_metrics import quantile
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload

FRAGMENT = "/admin/overview/fragment/"
PANELS = ("relay", "consumers", "http", "llm", "stores", "alerts")


@pytest.fixture(autouse=True)
def _alone(settings, monkeypatch):
    """No answers of other tests; Kafka is not asked, whose lag is another test's."""
    prometheus.forget_answers()
    settings.MONITORING = {**settings.MONITORING, "PROMETHEUS_URL": ""}
    monkeypatch.setattr(overview.LAGS, "_known", {name: Lag(0, 0.0) for name in ("analytics", "audit", "notification")})
    monkeypatch.setattr(overview.LAGS, "_known_at", time.monotonic() + 3600)


@pytest.fixture
def site(client, alice):
    client.force_login(alice)
    return client


@pytest.fixture
def tenant_staff(client, bob):
    bob.is_staff = True
    bob.save()
    bob.user_permissions.set(
        Permission.objects.filter(content_type__app_label="events_outbox", codename__startswith="view")
    )
    client.force_login(bob)
    return client


def emit(tenant, count=1):
    with transaction.atomic():
        for number in range(count):
            emit_event(
                "conversation.created",
                ConversationCreatedPayload(conversation_id=str(number), title="x", mode="chat"),
                aggregate_id=str(number),
                tenant_id=tenant,
            )


def letter(tenant, **fields):
    event = OutboxEvent.objects.filter(tenant_id=tenant).first()
    made = {"event_id": event.event_id, "consumer": "audit", "reason": "failed", "error": "KeyError: x"}
    place = {"topic": "t", "partition": 0, "offset": 1}
    return DeadLetter.objects.create(tenant_id=tenant, **{**made, **place, **fields})


def figure(text, name):
    """What the page shows for a figure, without markup."""
    [found] = re.findall(rf'data-figure="{name}".*?<dd>(.*?)</dd>', text, re.DOTALL)
    return re.sub(r"<[^>]+>|\s+", " ", found).strip()


@pytest.mark.parametrize("url", ["/admin/", FRAGMENT])
def test_the_overview_needs_a_login_of_staff(client, bob, url):
    assert client.get(url).status_code == 302
    client.force_login(bob)
    assert client.get(url).status_code == 302


def test_staff_without_a_role_sees_no_figures(client, bob):
    bob.is_staff = True
    bob.save()
    client.force_login(bob)
    text = client.get("/admin/").content.decode()
    assert "You have no role yet." in text
    assert "data-panel" not in text


def test_the_page_and_its_fragment_show_every_panel(site):
    page, fragment = site.get("/admin/"), site.get(FRAGMENT)
    for answer in (page, fragment):
        text = answer.content.decode()
        assert answer.status_code == 200
        assert all(f'data-panel="{panel}"' in text for panel in PANELS)
        assert 'id="state-line"' in text and 'id="updated"' in text
    assert "no-store" in fragment["Cache-Control"]
    assert "<html" not in fragment.content.decode()
    assert site.post(FRAGMENT).status_code == 405


def test_without_prometheus_what_is_known_is_shown_and_what_is_missing_is_said(site, tenant):
    emit(str(tenant.id), 3)
    text = site.get(FRAGMENT).content.decode()
    assert figure(text, "pending") == str(OutboxEvent.objects.count())
    assert figure(text, "published") == "no data"
    assert "needs Prometheus: set PROMETHEUS_URL" in text
    assert "since the web processes started" in text
    assert "No relay leads" in text
    assert "Emitted per minute" in text


def test_stuck_rows_are_counted_and_lead_to_their_lists(site, tenant):
    emit(str(tenant.id), 2)
    event = OutboxEvent.objects.first()
    UndeliverableEvent.objects.create(event=event, topic="t", aggregate_id="a", reason="MSG_SIZE_TOO_LARGE", error="!")
    one = letter(str(tenant.id))
    text = site.get(FRAGMENT).content.decode()
    assert figure(text, "undeliverable") == "1"
    assert "/admin/events_outbox/undeliverableevent/?state=open" in text
    assert "/admin/events_outbox/deadletter/?state=open&amp;consumer=audit" in text
    assert f"/admin/events_outbox/deadletter/{one.pk}/change/" in text
    assert "audit has 1 open dead letter" in text


def test_the_members_of_a_consumer_are_those_alive(site):
    old = datetime.now(UTC) - timedelta(minutes=5)
    for number, fields in enumerate([{}, {}, {"seen_at": old}, {"stopped_at": old}]):
        Worker.objects.create(
            kind="consumer", name="audit", host="h", pid=number, state="works", assignment=["t/0"], **fields
        )
    found = overview.gather()
    audit, analytics = (next(c for c in found.consumers if c.name == name) for name in ("audit", "analytics"))
    assert (len(audit.members), audit.partitions, audit.state) == (2, 2, "works")
    assert analytics.state == "nobody runs it"


def test_staff_of_a_tenant_sees_its_own_and_is_told_so(tenant_staff, tenant, charlie):
    emit(str(tenant.id), 2)
    emit(str(charlie.tenant_id), 5)
    letter(str(charlie.tenant_id))
    text = tenant_staff.get(FRAGMENT).content.decode()
    assert figure(text, "pending") == str(OutboxEvent.objects.filter(tenant_id=str(tenant.id)).count())
    assert figure(text, "dead-letters") == "0"
    assert "your tenant alone" in text
    assert "Nothing of your tenant is stuck." in text
    for panel in ("consumers", "http", "stores", "alerts"):
        assert f'data-panel="{panel}"' not in text
    assert "KeyError" not in text and str(charlie.tenant_id) not in text


def test_the_page_costs_as_many_queries_for_many_rows_as_for_few(site, tenant):
    emit(str(tenant.id), 1)
    letter(str(tenant.id))
    with CaptureQueriesContext(connection) as few:
        site.get(FRAGMENT)
    emit(str(tenant.id), 50)
    for number in range(40):
        letter(str(tenant.id), offset=number, event_id=uuid4())
    with CaptureQueriesContext(connection) as many:
        site.get(FRAGMENT)
    assert len(many) == len(few) < 40
    assert all("COUNT(" not in q["sql"].upper() or "LIMIT" in q["sql"] or "pg_" in q["sql"] for q in many)


def test_a_prometheus_that_hangs_costs_two_seconds_and_is_named(site, settings):
    with closing(socket.socket()) as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)
        url = f"http://user:s3cret@127.0.0.1:{silent.getsockname()[1]}"
        settings.MONITORING = {**settings.MONITORING, "PROMETHEUS_URL": url}
        started = time.monotonic()
        text = site.get(FRAGMENT).content.decode()
        assert time.monotonic() - started < 6  # 2 s, and a slow machine
    assert "Cannot tell whether alerts fire. Prometheus does not answer: nothing within 2 s." in text
    assert "s3cret" not in text
    assert figure(text, "pending") == str(OutboxEvent.objects.count())


@pytest.mark.django_db(transaction=True)
def test_a_database_that_hangs_is_waited_for_in_bounds(monkeypatch):
    """Another session holds the table of undeliverable events: what comes after is not read, what is known is said."""
    monkeypatch.setattr(database, "DATABASE_SECONDS", 0.5)
    monkeypatch.setattr(overview, "PAGE_SECONDS", 0.5)
    with psycopg.connect(**connection.get_connection_params() | {"cursor_factory": None}) as other:
        other.execute("LOCK TABLE events_outbox_undeliverableevent IN ACCESS EXCLUSIVE MODE")
        started = time.monotonic()
        found = overview.gather()
        assert time.monotonic() - started < 5
        other.rollback()
    assert found.database.status is None
    assert "the state of the outbox" in found.database.missing
    assert overview.gather().database.missing == []


def test_emitted_per_minute_by_bisection(db, tenant):
    now = datetime.now(UTC).replace(second=0, microsecond=0)
    emit(str(tenant.id), 6)
    last = OutboxEvent.objects.order_by("-id").values_list("id", flat=True)
    ids = sorted(last[:6])
    OutboxEvent.objects.filter(id__lt=ids[0]).update(created_at=now - timedelta(hours=2))
    for index, minutes in enumerate((90, 10, 10, 10, 3, 0)):
        OutboxEvent.objects.filter(id=ids[index]).update(
            created_at=now - timedelta(minutes=minutes) + timedelta(seconds=5)
        )
    chart = emitted_per_minute()
    if chart.times[-1] != now.timestamp():
        pytest.skip("the minute has just turned")
    at = {
        round((now.timestamp() - end) / 60): value
        for end, value in zip(chart.times, chart.lines[0].values, strict=True)
    }
    assert (at[9], at[2]) == (3.0, 1.0)  # by the minute's end
    assert sum(at.values()) == 4.0


def test_emitted_per_minute_of_an_empty_outbox(db):
    assert set(emitted_per_minute().lines[0].values) == {0.0}


def test_a_failure_rate_alone_is_not_taken_for_what_was_published():
    away = Unanswered("Prometheus refuses the question")
    failures = [Series({}, [60.0], [0.25])]
    assert _chart([("Published", away), ("Failures", failures)]) == Chart(missing=str(away))
    assert [line.label for line in _chart([("Published", failures), ("Failures", away)]).lines] == ["Published"]


@pytest.mark.needs_tool("promtool")
def test_what_a_counter_comes_with_counts(tmp_path):
    """a: one request, its only one. b: 5 at its first scrape, 7 now. c: from 10 to 12 in the window."""
    test = {
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": 'c_total{t="a"}', "values": "_x4 3x6"},
                    {"series": 'c_total{t="b"}', "values": "_x4 5x2 7x3"},
                    {"series": 'c_total{t="c"}', "values": "10x6 12x3"},
                ],
                "promql_expr_test": [
                    {
                        "expr": f"round({_increase('c_total', 't', 480)}, 0.5)",
                        "eval_time": "10m",
                        "exp_samples": [
                            {"labels": f'{{t="{name}"}}', "value": value}
                            for name, value in [("a", 3), ("b", 7), ("c", 2)]
                        ],
                    }
                ],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(json.dumps(test))
    checked = subprocess.run(["promtool", "test", "rules", tmp_path / "test.yml"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_an_old_value_is_not_the_latest():
    assert Line("a", [1.0, 2.0, None]).latest == 2.0
    assert Line("a", [1.0, None, None]).latest is None
    assert Line("a", [1.0, 0.0]).latest == 0.0


def test_quantiles_are_reckoned_as_prometheus_does():
    inf = float("inf")
    assert quantile(0.5, {0.1: 5, 0.2: 10, inf: 10}) == pytest.approx(0.1)
    assert quantile(0.75, {0.1: 5, 0.2: 10, inf: 10}) == pytest.approx(0.15)
    assert quantile(0.99, {0.1: 5, inf: 10}) == 0.1  # no more is known
    assert quantile(0.5, {0.1: 0, inf: 0}) is None
    assert quantile(0.5, {}) is None


def test_lags_are_read_once_beside_the_page(monkeypatch):
    calls, over = [], threading.Event()

    def slow(timeout_seconds):
        calls.append(timeout_seconds)
        over.wait(10)
        return {"audit": Lag(7, 1.0)}

    monkeypatch.setattr(lags, "read_lags", slow)
    reader = lags.LagReader()
    assert reader.lags(0) == reader.lags(0.01) == {}
    over.set()
    assert reader.lags(10) == {"audit": Lag(7, 1.0)}
    assert reader.lags(0) == {"audit": Lag(7, 1.0)}
    assert len(calls) == 1
