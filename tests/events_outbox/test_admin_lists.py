"""Lists of the admin on large tables: what a page reads, where its links lead, what a file of it holds."""

import csv
import gc
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

from events_outbox import partitions
from events_outbox.admin import export, keyset
from events_outbox.admin.periods import Period, keys_of
from events_outbox.fields import PgSnapshot
from events_outbox.models import DeadLetter, OperatorAction, OutboxEvent, RelayCursor
from voicehelper.identity.models import User

pytestmark = pytest.mark.django_db

EVENTS, OTHERS = 300_000, 20_000
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
    SELECT 'audit', lpad(to_hex(n), 32, '0')::uuid, 'conversation.created', 't' || mod(n, 20), 'conversation.events',
           0, n, 'k', '[]', 'failed', CASE WHEN mod(n, 2) = 0 THEN '=1+1' ELSE 'it broke' END, '', 1, 0, '[]',
           %(first)s + n * %(step)s, %(first)s + n * %(step)s, 'consumer',
           CASE WHEN n <= 20 THEN '' ELSE 'replayed' END, NULL, '', ''
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
           occurred_at, correlation_id, causation_id, payload, metadata, recorded_at, position, previous_hash, hash)
    SELECT uuidv7(at - clock_timestamp()), gen_random_uuid(), 'conversation.created', 'v1', 't', '', 'a-' || n, at,
           'r', '', '{{}}', '{{}}', at, n, '', ''
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
    client.force_login(User.objects.create_superuser("alice"))
    return client


@pytest.fixture
def onlooker():
    """A client logged in as bob, staff who may look at the lists."""
    bob = User.objects.create_user("bob", is_staff=True)
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
        kind, of_list = plan["Node Type"], plan.get("Relation Name", "").startswith(TABLES)
        if of_list and kind == "Seq Scan" and read_by(plan):
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


def test_no_page_reads_more_than_a_bound_of_partitions(operator):
    count, rows = 30_000, 5_000
    numbers = {"first": FIRST, "step": STEP, "low": 1, "high": count}
    with connection.cursor() as cursor:
        cursor.execute(f"TRUNCATE {TABLES[0]} CASCADE")  # for this test: it is rolled back
        partitions.partition_new_table(cursor.execute, rows)
        for start in range(2 * rows + 1, count + 1, rows):
            for statement in partitions._make(start, rows):
                cursor.execute(statement)
        cursor.execute(EVENTS_SQL.format(transaction="'3'::xid8"), numbers)
        cursor.execute("ANALYZE events_outbox_outboxevent")
    for conditions in ({}, {"tenant_id": "rare"}, {"q": "c-77"}, {"date": "2026-08-04"}):
        for place in ({}, {"before": str(count // 2)}, {"oldest": "1"}):
            with CaptureQueriesContext(connection) as queries:
                opened(operator, "outboxevent", **conditions, **place)
            for query in queries:
                if TABLES[0] in query["sql"]:
                    judge(query["sql"])
    assert keys(listed(operator, "outboxevent", q="c-77")) == [20_077, 77]
    assert len(keys(listed(operator, "outboxevent", date="2026-08-04"))) == 50


# Where its links lead


def test_older_and_newer_lead_back_and_forth(big_tables, operator):
    newest = listed(operator, "outboxevent")
    assert keys(newest) == list(range(EVENTS, EVENTS - 50, -1))
    assert set(newest.links) == {"older", "oldest"}
    second = listed(operator, "outboxevent", newest.links["older"])
    assert keys(second) == list(range(EVENTS - 50, EVENTS - 100, -1))
    assert set(second.links) == {"newest", "newer", "older", "oldest"}
    assert keys(listed(operator, "outboxevent", second.links["newer"])) == keys(newest)
    assert keys(listed(operator, "outboxevent", second.links["newest"])) == keys(newest)
    oldest = listed(operator, "outboxevent", second.links["oldest"])
    assert keys(oldest) == list(range(50, 0, -1)) and set(oldest.links) == {"newest", "newer"}
    above = listed(operator, "outboxevent", oldest.links["newer"])
    assert keys(above) == list(range(100, 50, -1))
    assert keys(listed(operator, "outboxevent", above.links["older"])) == keys(oldest)
    assert set(listed(operator, "outboxevent", before="51").links) == {"newest", "newer"}


def test_a_page_of_less_than_its_rows_at_the_new_end_is_filled(big_tables, operator):
    assert keys(listed(operator, "outboxevent", after=str(EVENTS - 7))) == keys(listed(operator, "outboxevent"))


def test_what_no_index_serves_is_looked_through_in_stretches(big_tables, operator, monkeypatch):
    stretch = 25_000
    monkeypatch.setattr(keyset, "SCANNED_ROWS", stretch)
    changelist = listed(operator, "outboxevent", tenant_id="rare")
    assert keys(changelist) == [] and set(changelist.links) == {"further", "oldest"}
    reached = FIRST + (EVENTS - stretch + 1) * STEP
    assert changelist.looked_through == f"Looked through events back to {reached:%Y-%m-%d %H:%M}: none found."
    text = opened(operator, "outboxevent", tenant_id="rare").content.decode()
    assert changelist.looked_through in text and "Look further" in text
    links = []
    while changelist.links.get("further") and "rare" not in [e.tenant_id for e in changelist.result_list]:
        links.append(changelist.links["further"])
        changelist = listed(operator, "outboxevent", links[-1])
        assert len(links) < EVENTS / stretch
    assert keys(changelist) == list(range(20, 0, -1)) and not changelist.looked_through
    assert "20 events on this page" in opened(operator, "outboxevent", links[-1]).content.decode()
    # Nothing is passed over on the way back.
    back = listed(operator, "outboxevent", links[-2])
    assert int(dict(parse_qsl(back.links["newer"][1:]))["after"]) == EVENTS - stretch * (len(links) - 1)


def test_looking_from_the_oldest_on_finds_the_old_ones_at_once(big_tables, operator):
    link = listed(operator, "outboxevent", tenant_id="rare").links["oldest"]
    oldest = listed(operator, "outboxevent", link)
    assert keys(oldest) == list(range(20, 0, -1))
    assert oldest.looked_through.startswith("Looked through events up to 2026-08-01 16:40: 20 found")
    assert keys(listed(operator, "outboxevent", oldest.links["further"])) == []


def test_ids_may_have_gaps_of_any_size(big_tables, operator):
    OperatorAction.objects.filter(id__lte=20).update(action="offsets.reset")
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM events_outbox_operatoraction WHERE id > 1500 AND id <= %s", [OTHERS - 1_000])
    first = listed(operator, "operatoraction", action="offsets.reset")
    assert keys(first) == [] and first.looked_through
    assert keys(listed(operator, "operatoraction", first.links["further"])) == list(range(20, 0, -1))


def test_an_index_finds_however_deep_it_lies(big_tables, operator):
    for query in ({"q": "r-77"}, {"q": EVENT_ID}, {"correlation_id": "r-77"}):
        changelist = listed(operator, "outboxevent", **query)
        assert min(keys(changelist)) + 50 >= 77 and not changelist.looked_through
        assert changelist.how_many() == f"{len(changelist.result_list)} event" + "s" * (
            len(changelist.result_list) != 1
        )
    assert len(listed(operator, "undeliverableevent", state="open").result_list) == 20
    assert len(listed(operator, "deadletter", state="open").result_list) == 20
    assert len(listed(operator, "outboxevent", status="undeliverable").result_list) == 20
    assert len(listed(operator, "outboxevent", status="pending").result_list) == PENDING
    assert listed(operator, "outboxevent", status="discarded").looked_through


def test_a_list_tells_how_many_as_far_as_it_counts(big_tables, operator):
    for query, told in [
        ({}, f"{COUNTED:,} or more events"),
        ({"status": "pending"}, f"{PENDING} events"),
        ({"date": "2026-08-01T05"}, "120 events"),
        ({"tenant_id": "t1"}, "50 events on this page"),
    ]:
        assert told in opened(operator, "outboxevent", **query).content.decode()


def test_wrong_places_lead_to_the_list(big_tables, operator):
    wrong = (
        {"before": "x"},
        {"date": "2026-13"},
        {"date": "x"},
        {"date": "9999"},
        {"nothing": "1"},
        {"tenant_id": "\0"},
    )
    for query in wrong:
        assert operator.get(url("outboxevent"), query).url == f"{url('outboxevent')}?e=1"
    for query in ({"before": str(10**30)}, {"after": str(10**30)}, {"date": "1999"}, {"o": "-1"}):
        opened(operator, "outboxevent", **query)


# Dates


def test_dates_are_chosen_step_by_step(big_tables, operator):
    def labels(**query):
        dates = listed(operator, "outboxevent", **query).drill_down()
        return [label for label, _ in dates["around"]], [label for label, _ in dates["inner"]]

    last = FIRST + EVENTS * STEP
    assert labels()[1] == ["August 2026", "September 2026", "October 2026", "November 2026"]
    assert labels(date="2026") == (["2026"], ["August", "September", "October", "November"])
    assert labels(date="2026-08")[1] == [str(day) for day in range(1, 32)]
    assert labels(date="2026-11") == (["2026", "November"], [str(day) for day in range(1, last.day + 1)])
    assert labels(date="2026-08-02") == (["2026", "August", "2"], [f"{hour:02}:00" for hour in range(24)])
    assert labels(date="2026-08-02T07") == (["2026", "August", "2", "07:00"], [])


@pytest.mark.parametrize("date", ["2026", "2026-09", "2026-09-03", "2026-09-03T11", "2026-08", "2026-12", "2025"])
@pytest.mark.parametrize("model, field", [("outboxevent", "created_at"), ("auditentry", "recorded_at")])
def test_a_period_has_exactly_its_rows(big_tables, operator, model, field, date):
    period = Period.parse(date)
    changelist = listed(operator, model, date=date)
    within = {f"{field}__gte": period.start, f"{field}__lt": period.end}
    assert changelist.queryset.count() == changelist.model.objects.filter(**within).count()
    assert keys(changelist) == list(
        changelist.model.objects.filter(**within).order_by("-pk").values_list("pk", flat=True)[:50]
    )


def test_rows_whose_clock_was_a_little_off_are_in_their_period(big_tables, operator):
    at = FIRST + timedelta(days=3)
    # Its key comes after that of the first row of the next day.
    OutboxEvent.objects.filter(created_at=at + STEP).update(created_at=at - timedelta(seconds=1))
    early = OutboxEvent.objects.get(created_at=at - timedelta(seconds=1))
    day_before = f"{at - timedelta(days=1):%Y-%m-%d}"
    assert keys(listed(operator, "outboxevent", date=day_before))[0] == early.pk


def test_a_period_is_looked_for_a_minute_further_on_both_sides(big_tables):
    period = Period.parse("2026-09-03T11")
    first, end = keys_of(OutboxEvent, "created_at", period)
    begins, ends = (OutboxEvent.objects.get(id=key).created_at for key in (first, end))
    minute = timedelta(minutes=1)
    assert 1 * minute <= period.start - begins <= 3 * minute
    assert 1 * minute <= ends - period.end <= 3 * minute


def test_a_period_is_kept_by_links_and_filters(big_tables, operator):
    changelist = listed(operator, "outboxevent", date="2026-09", event_type="conversation.created")
    assert all("date=2026-09" in link for link in changelist.links.values())
    assert ("date", "2026-09") in changelist.kept_in_filter_form()
    older = listed(operator, "outboxevent", changelist.links["older"])
    assert {row.event_type for row in older.result_list} == {"conversation.created"}
    assert {row.created_at.month for row in older.result_list} == {9}


# Filters


def test_what_is_chosen_is_said_and_can_be_taken_back(big_tables, operator):
    query = {"status": "", "tenant_id": "t1", "topic": "conversation.events", "date": "2026-09", "q": "c-1"}
    answer = opened(operator, "outboxevent", **query, before="200000")
    chosen = {condition.name: condition for condition in answer.context["cl"].chosen()}
    assert {name: condition.value for name, condition in chosen.items()} == {
        "tenant": "t1",
        "topic": "conversation.events",
        "date": "September 2026",
        "search": "c-1",
    }
    assert dict(parse_qsl(chosen["tenant"].link[1:])) == {
        "topic": "conversation.events",
        "date": "2026-09",
        "q": "c-1",
    }
    text = answer.content.decode()
    assert 'aria-label="Remove tenant: t1"' in text and '<label for="filter-tenant_id">Tenant</label>' in text


def test_an_id_is_shortened_and_there_in_full(big_tables, operator):
    text = opened(operator, "outboxevent", q=EVENT_ID).content.decode()
    assert f'title="{EVENT_ID}">…{EVENT_ID[-12:]}</span>' in text


# Actions


def test_all_of_a_list_can_be_selected_only_where_it_is_counted(big_tables, operator):
    form = {"action": "discard", "select_across": "1", "index": "0", "_selected_action": ["1"]}
    answer = operator.post(f"{url('deadletter')}?tenant_id=t1", form, follow=True).content.decode()
    assert "this list is not counted" in answer
    answer = operator.post(f"{url('deadletter')}?state=open", form, follow=True).content.decode()
    assert "this list is not counted" not in answer and DeadLetter.objects.open().count() == 20


# Files


def exported(client, model, **query):
    answer = client.get(f"{url(model)}export/", query)
    assert answer.status_code == 200
    return answer


def rows_of(answer):
    return list(csv.DictReader(io.StringIO(b"".join(answer.streaming_content).decode())))


def test_a_file_has_the_rows_of_the_list(big_tables, operator, monkeypatch):
    monkeypatch.setattr(export, "CHUNK_ROWS", 100)
    answer = exported(operator, "outboxevent", date="2026-09-03", event_type="conversation.created")
    rows = rows_of(answer)
    expected = OutboxEvent.objects.filter(
        created_at__gte=Period.parse("2026-09-03").start,
        created_at__lt=Period.parse("2026-09-03").end,
        event_type="conversation.created",
    ).order_by("-id")
    assert [int(row["id"]) for row in rows] == list(expected.values_list("id", flat=True)) and len(rows) == 960
    assert rows[0]["created_at"].endswith("Z") and datetime.fromisoformat(rows[0]["created_at"]).day == 3
    assert rows[0]["status"] == "published" and "value" not in rows[0] and "payload" not in rows[0]
    assert re.fullmatch(r'attachment; filename="events-\d{4}-\d\d-\d\d\.csv"', answer["Content-Disposition"])
    action = OperatorAction.objects.latest("id")
    assert (action.action, action.by, action.subject) == ("events.exported", "alice", "events")
    assert action.detail == {
        "conditions": {"event type": "conversation.created", "date": "3 September 2026"},
        "rows": 960,
        "complete": True,
    }


def test_a_search_that_finds_little_is_exported_to_its_end(big_tables, operator):
    assert [int(row["id"]) for row in rows_of(exported(operator, "outboxevent", tenant_id="rare"))] == list(
        range(20, 0, -1)
    )


def test_no_cell_is_a_formula(big_tables, operator):
    errors = {row["error"] for row in rows_of(exported(operator, "deadletter", date="2026-08-02"))}
    assert errors == {"'=1+1", "it broke"}


def test_an_export_that_is_given_up_is_noted_too(big_tables, operator, monkeypatch):
    monkeypatch.setattr(export, "CHUNK_ROWS", 100)
    answer = exported(operator, "processedevent")
    stream = answer.streaming_content
    assert next(stream) == b"id,processed_at,consumer,event_id\r\n"
    next(stream), next(stream)
    answer._iterator.close()  # what the server comes to when the connection is gone
    action = OperatorAction.objects.latest("id")
    assert (action.detail["rows"], action.detail["complete"]) == (200, False)


def test_an_export_takes_its_permission(big_tables, onlooker):
    assert "Export CSV" not in opened(onlooker, "outboxevent").content.decode()
    assert onlooker.get(f"{url('outboxevent')}export/").status_code == 403
    may_export, _ = Permission.objects.get_or_create(
        codename="export_events",
        content_type=ContentType.objects.get_for_model(OutboxEvent),
        defaults={"name": "Can export lists as CSV"},
    )
    User.objects.get(username="bob").user_permissions.add(may_export)
    assert "Export CSV" in opened(onlooker, "outboxevent").content.decode()
    assert len(rows_of(exported(onlooker, "outboxevent", status="pending"))) == PENDING
    assert onlooker.get(f"{url('auditentry')}export/").status_code == 403


# Not the first days' events: those are undeliverable, and point to their event and back until Python collects them.
@pytest.mark.parametrize(("model", "day"), [("processedevent", "2026-08-02"), ("outboxevent", "2026-09-02")])
def test_a_file_costs_the_same_memory_however_long_it_is(big_tables, operator, monkeypatch, model, day):
    def peak_bytes(period):
        answer = exported(operator, model, date=period)
        gc.collect()
        tracemalloc.start()
        try:
            rows = sum(chunk.count(b"\n") for chunk in answer.streaming_content) - 1
            return rows, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    monkeypatch.setattr(export, "CHUNK_ROWS", 100)
    peak_bytes(f"{day}T10")  # what is made once
    few, little = peak_bytes(f"{day}T10")
    many, much = peak_bytes(day)
    assert (few, many) == (120, 2880)
    assert much < little * 1.5
