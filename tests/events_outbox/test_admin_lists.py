"""Lists of the admin on large tables: what a page reads, where its links lead, what a file of it holds."""

import csv
import io
import json
import re
import tracemalloc
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qsl
from uuid import UUID

import pytest
from django.apps import apps
from django.contrib.auth.models import Permission
from django.contrib.contenttypes.models import ContentType
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from events_outbox import handlers
from events_outbox.admin import export, keyset, periods
from events_outbox.admin.periods import Period
from events_outbox.fields import PgSnapshot
from events_outbox.models import DeadLetter, OperatorAction, OutboxEvent, ProcessedEvent, RelayCursor
from voicehelper.identity.models import User

pytestmark = pytest.mark.django_db

EVENTS, OTHERS = 300_000, 50_000
SCANNED, COUNTED = 2_000, 1_000
FIRST = datetime(2026, 8, 1, tzinfo=UTC)
STEP = timedelta(seconds=30)
PENDING = 40
TABLES = (
    "events_outbox_outboxevent",
    "events_outbox_processedevent",
    "events_outbox_deadletter",
    "events_outbox_undeliverableevent",
    "events_outbox_operatoraction",
    "audit_auditentry",
)
# Old rows are of a type, tenant and consumer that the others are not: what a search from the newest on finds last.
EVENTS_SQL = """
    INSERT INTO events_outbox_outboxevent (transaction_id, event_id, event_type, event_version, aggregate_id, tenant_id,
                                           topic, correlation_id, traceparent, tracestate, baggage, created_at, value)
    SELECT {transaction}, lpad(to_hex(n), 32, '0')::uuid,
           CASE WHEN n <= 20 THEN 'document.uploaded' WHEN mod(n, 3) = 0 THEN 'conversation.created'
                ELSE 'conversation.message.sent' END,
           'v1', 'c-' || mod(n, 20000), CASE WHEN n <= 20 THEN 'rare' ELSE 't' || mod(n, 20) END, 'conversation.events',
           'r-' || n / 3, '', '', '', %(first)s + n * %(step)s, '\\x00'
      FROM generate_series(%(low)s, %(high)s) n"""
OTHERS_SQL = """
    INSERT INTO events_outbox_processedevent (consumer, event_id, processed_at)
    SELECT CASE WHEN n <= 20 THEN 'notifications' ELSE 'audit' END, lpad(to_hex(n), 32, '0')::uuid,
           %(first)s + n * %(step)s
      FROM generate_series(1, %(others)s) n;
    INSERT INTO events_outbox_deadletter (consumer, event_id, event_type, tenant_id, topic, partition, "offset", key,
           headers, reason, error, traceback, attempts, replays, history, created_at, failed_at, failed_by, resolution,
           resolved_at, resolved_by, resolution_reason)
    SELECT 'audit', lpad(to_hex(n), 32, '0')::uuid, 'conversation.created', 't' || mod(n, 20), 'conversation.events', 0, n,
           'k', '[]', 'failed', CASE WHEN mod(n, 2) = 0 THEN '=1+1' ELSE 'it broke' END, '', 1, 0, '[]',
           %(first)s + n * %(step)s, %(first)s + n * %(step)s, 'consumer', CASE WHEN n <= 20 THEN '' ELSE 'replayed' END,
           NULL, '', ''
      FROM generate_series(1, %(others)s) n;
    INSERT INTO events_outbox_undeliverableevent (event_id, topic, aggregate_id, reason, error, parked_at,
           discarded_at, discarded_by, discard_reason)
    SELECT id, topic, aggregate_id, 'MSG_SIZE_TOO_LARGE', 'too large', created_at, now(), 'alice', 'no'
      FROM events_outbox_outboxevent WHERE id <= %(others)s ORDER BY id;
    UPDATE events_outbox_undeliverableevent SET discarded_at = NULL WHERE id IN (
           SELECT id FROM events_outbox_undeliverableevent ORDER BY id LIMIT 20);
    INSERT INTO events_outbox_operatoraction (at, by, action, consumer, subject, reason, detail)
    SELECT %(first)s + n * %(step)s, 'alice', 'dead_letter.replayed', 'audit', n, '', '{{}}'
      FROM generate_series(1, %(others)s) n;
    INSERT INTO audit_auditentry (id, event_id, event_type, event_version, tenant_id, user_id, aggregate_id,
           occurred_at, correlation_id, causation_id, payload, metadata, recorded_at)
    SELECT uuidv7(at - clock_timestamp()), gen_random_uuid(), 'conversation.created', 'v1', 't', '', 'a-' || n, at,
           'r', '', '{{}}', '{{}}', at
      FROM (SELECT n, %(first)s + n * %(step)s AS at FROM generate_series(1, %(others)s) n) rows"""


@pytest.fixture(scope="module")
def big_tables(django_db_setup, django_db_blocker):
    """The tables, filled; one event in 30 seconds since FIRST, the last PENDING ones not published."""
    numbers = {"first": FIRST, "step": STEP, "others": OTHERS}
    with django_db_blocker.unblock(), connection.cursor() as cursor:
        cursor.execute(f"TRUNCATE {', '.join(TABLES)} RESTART IDENTITY CASCADE")
        published = EVENTS_SQL.format(transaction="'3'::xid8")
        cursor.execute(published, {**numbers, "low": 1, "high": EVENTS - PENDING})
        cursor.execute("SELECT pg_current_snapshot()::text")
        (snapshot,) = cursor.fetchone()
        pending = EVENTS_SQL.format(transaction="pg_current_xact_id()")
        cursor.execute(pending, {**numbers, "low": EVENTS - PENDING + 1, "high": EVENTS})
        cursor.execute(OTHERS_SQL.replace("{{}}", "{}"), numbers)
        cursor.execute(f"ANALYZE {', '.join(TABLES)}")
        before = RelayCursor.objects.filter(id=1).values("published", "window").first()
        RelayCursor.objects.update_or_create(id=1, defaults={"published": PgSnapshot.parse(snapshot), "window": None})
    yield
    with django_db_blocker.unblock(), connection.cursor() as cursor:
        cursor.execute(f"TRUNCATE {', '.join(TABLES)} RESTART IDENTITY CASCADE")
        if before is None:
            RelayCursor.objects.all().delete()
        else:
            RelayCursor.objects.update(**before)


@pytest.fixture(autouse=True)
def small_bounds(monkeypatch):
    monkeypatch.setattr(keyset, "SCANNED_ROWS", SCANNED)
    monkeypatch.setattr(keyset, "PAGED_ROWS", COUNTED)
    monkeypatch.setattr(keyset, "KNOWN_KEYS", COUNTED)


@pytest.fixture
def operator():
    """A client logged in as alice, who may do everything."""
    client = Client()
    client.force_login(User.objects.create_superuser("alice", password="x"))
    return client


@pytest.fixture
def onlooker():
    """A client logged in as bob, staff who may look at the lists."""
    bob = User.objects.create_user("bob", password="x", is_staff=True)
    may_look = Permission.objects.filter(codename__startswith="view_", content_type__app_label="events_outbox")
    bob.user_permissions.set(may_look)
    client = Client()
    client.force_login(bob)
    return client


def url(model):
    return f"/admin/{'audit' if model == 'auditentry' else 'events_outbox'}/{model}/"


def opened(client, model, link="", **query):
    """The list, at a link of an earlier one or with these conditions."""
    answer = client.get(url(model), dict(parse_qsl(link.lstrip("?"))) or query)
    assert answer.status_code == 200
    return answer


def listed(client, model, link="", **query):
    return opened(client, model, link, **query).context["cl"]


def keys(changelist):
    return [row.pk for row in changelist.result_list]


# What a page reads

EVENT_ID = str(UUID(int=77))
SEPTEMBER = {"date": "2026-09"}
LISTS = {
    "outboxevent": [
        {},
        {"status": "pending"},
        {"status": "published"},
        {"status": "undeliverable"},
        {"status": "discarded"},
        {"event_type": "conversation.created"},
        {"event_type": "document.uploaded"},
        {"event_type": "nothing.like.it"},
        {"topic": "default.events"},
        {"tenant_id": "rare"},
        {"status": "pending", "tenant_id": "rare"},
        {"status": "published", "event_type": "document.uploaded"},
        {"q": "c-77"},
        {"q": "r-77"},
        {"q": EVENT_ID},
        {"q": "nothing like it"},
        {"q": "c-77", "event_type": "conversation.created"},
        {"aggregate_id": "c-77"},
    ],
    "processedevent": [{}, {"consumer": "audit"}, {"consumer": "notifications"}, {"q": EVENT_ID}],
    "deadletter": [
        {},
        {"state": "open"},
        {"state": "replayed"},
        {"state": "discarded"},
        {"consumer": "notifications"},
        {"reason": "unparsable"},
        {"event_type": "document.uploaded"},
        {"tenant_id": "rare"},
        {"state": "open", "tenant_id": "rare"},
        {"q": EVENT_ID},
    ],
    "undeliverableevent": [
        {},
        {"state": "open"},
        {"state": "discarded"},
        {"topic": "default.events"},
        {"reason": "behind"},
        {"q": "c-77"},
        {"q": EVENT_ID},
    ],
    "operatoraction": [{}, {"consumer": "notifications"}, {"action": "offsets.reset"}, {"q": "77"}],
    "auditentry": [{}, {"event_type": "document.uploaded"}, {"tenant_id": "rare"}, {"q": "a-77"}, {"q": "nothing"}],
}


def nodes(plan):
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


def read_by(plan):
    """How many rows a scan looked at."""
    removed = plan.get("Rows Removed by Filter", 0) + plan.get("Rows Removed by Index Recheck", 0)
    return (plan["Actual Rows"] + removed) * plan["Actual Loops"]


def judge(statement):
    """Fails when a statement reads a table, or more of one than the bounds allow."""
    with connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement.replace('%', '%%')}", [])
        ((explained,),) = cursor.fetchall()
    (top,) = json.loads(explained) if isinstance(explained, str) else explained
    for plan in nodes(top["Plan"]):
        kind, of_list = plan["Node Type"], plan.get("Relation Name") in TABLES
        if of_list and kind == "Seq Scan":
            pytest.fail(f"reads the table {plan['Relation Name']}: {statement}")
        bounded = of_list or kind in ("Sort", "Bitmap Index Scan", "Index Only Scan")
        if bounded and read_by(plan) > SCANNED + 200:
            pytest.fail(f"{kind} of {plan.get('Relation Name')} reads {read_by(plan):.0f} rows: {statement}")
    blocks = top["Plan"]["Shared Hit Blocks"] + top["Plan"]["Shared Read Blocks"]
    if blocks > 4 * SCANNED:
        pytest.fail(f"reads {blocks} blocks: {statement}")


def deep_key(model):
    """A key from the middle of the table."""
    rows = (
        apps.get_model("audit" if model == "auditentry" else "events_outbox", model)
        .objects.order_by("pk")
        .values_list("pk", flat=True)
    )
    return rows[len(rows) // 2]


@pytest.mark.parametrize("model", LISTS)
def test_no_page_reads_more_than_a_bound(big_tables, operator, model):
    middle = str(deep_key(model))
    places = ({}, {"before": middle}, {"after": middle}, {"oldest": "1"}, SEPTEMBER, {**SEPTEMBER, "before": middle})
    judged = set()
    for conditions in LISTS[model]:
        for place in places:
            with CaptureQueriesContext(connection) as queries:
                opened(operator, model, **conditions, **place)
            statements = {query["sql"] for query in queries if any(table in query["sql"] for table in TABLES)} - judged
            assert all("COUNT(" not in sql or f"LIMIT {COUNTED}" in sql for sql in statements)
            for statement in statements:
                judge(statement)
            judged |= statements
    assert len(judged) > len(LISTS[model])
