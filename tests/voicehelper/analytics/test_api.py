from datetime import UTC, date, datetime, timedelta

import pytest

from tests.voicehelper.conftest import assert_problem
from voicehelper.analytics.models import DailyTotal

SUMMARY = "/api/v1/analytics/summary"


@pytest.fixture
def counted(bob, charlie):
    for tenant_id, day, mode, conversations, messages in (
        (bob.tenant_id, date(2026, 2, 28), "chat", 1, 10),
        (bob.tenant_id, date(2026, 3, 1), "chat", 2, 20),
        (bob.tenant_id, date(2026, 3, 1), "voice", 3, 30),
        (bob.tenant_id, date(2026, 3, 2), "chat", 4, 40),
        (bob.tenant_id, date(2026, 3, 3), "chat", 5, 50),
        (charlie.tenant_id, date(2026, 3, 1), "chat", 500, 5_000),
    ):
        DailyTotal.objects.create(
            tenant_id=tenant_id, day=day, mode=mode, conversations=conversations, messages=messages
        )


def test_totals_and_rows_of_a_range(api, bob, counted, django_assert_num_queries):
    client = api(bob)
    with django_assert_num_queries(2):  # the token with its user, the rows
        answer = client.get(SUMMARY, {"from": "2026-03-01", "to": "2026-03-02", "mode": ""})

    assert answer.status_code == 200
    assert answer.json() == {
        "from": "2026-03-01",
        "to": "2026-03-02",
        "mode": None,
        "totals": {"conversations": 9, "messages": 90},
        "rows": [
            {"day": "2026-03-01", "mode": "chat", "conversations": 2, "messages": 20},
            {"day": "2026-03-01", "mode": "voice", "conversations": 3, "messages": 30},
            {"day": "2026-03-02", "mode": "chat", "conversations": 4, "messages": 40},
        ],
    }


def test_one_mode(api, bob, counted):
    body = api(bob).get(SUMMARY, {"from": "2026-02-28", "to": "2026-03-02", "mode": "chat"}).json()
    assert body["mode"] == "chat"
    assert body["totals"] == {"conversations": 7, "messages": 70}
    assert {row["mode"] for row in body["rows"]} == {"chat"}


def test_a_tenant_sees_its_own_only(api, charlie, counted):
    body = api(charlie).get(SUMMARY, {"from": "2026-02-28", "to": "2026-03-02"}).json()
    assert body["totals"] == {"conversations": 500, "messages": 5_000}


def test_nothing_counted(api, bob):
    body = api(bob).get(SUMMARY, {"from": "2026-03-01", "to": "2026-03-01"}).json()
    assert (body["totals"], body["rows"]) == ({"conversations": 0, "messages": 0}, [])


def test_the_default_is_the_last_thirty_days(api, bob):
    before = datetime.now(UTC).date()
    body = api(bob).get(SUMMARY).json()
    after = datetime.now(UTC).date()
    assert before <= date.fromisoformat(body["to"]) <= after
    assert date.fromisoformat(body["to"]) - date.fromisoformat(body["from"]) == timedelta(days=29)


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"from": "yesterday"}, "from"),
        ({"from": "2026-02-30"}, "from"),
        ({"to": "01.03.2026"}, "to"),
        ({"to": "2026-03-01T00:00:00"}, "to"),
        ({"to": "2026-03-01\x00"}, "to"),
        ({"from": "2026-03-02", "to": "2026-03-01"}, "from"),
        ({"from": "2025-01-01", "to": "2026-03-01"}, "from"),
        ({"mode": "shout"}, "mode"),
        ({"mode": "\x00"}, "mode"),
    ],
)
def test_a_query_that_is_not_valid(api, bob, query, field):
    problem = assert_problem(api(bob).get(SUMMARY, query), 400)
    assert list(problem["errors"]) == [field]


@pytest.mark.parametrize(
    "query",
    [
        {"from": "2024-01-01", "to": "2024-12-31"},
        {"to": "0001-01-05"},
        {"from": "9999-12-31", "to": "9999-12-31"},
    ],
    ids=["leap year", "first days", "last day"],
)
def test_the_widest_ranges(api, bob, query):
    assert api(bob).get(SUMMARY, query).status_code == 200
