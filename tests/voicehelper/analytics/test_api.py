import base64
from datetime import UTC, date, datetime, timedelta

import pytest

from tests.voicehelper.analytics.conftest import DAY, completed, reply
from tests.voicehelper.conftest import assert_problem
from voicehelper.analytics.event_handlers import count
from voicehelper.analytics.figures import figures
from voicehelper.analytics.models import MEASURES, DailyTotal
from voicehelper.identity.models import User

SUMMARY, DAILY = "/api/v1/analytics/summary", "/api/v1/analytics/daily"
NOTHING = figures(dict.fromkeys(MEASURES, 0))


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
        "model": None,
        "totals": {**NOTHING, "conversations": 9, "messages": 90},
        "rows": [
            {**NOTHING, "day": "2026-03-01", "mode": "chat", "conversations": 2, "messages": 20},
            {**NOTHING, "day": "2026-03-01", "mode": "voice", "conversations": 3, "messages": 30},
            {**NOTHING, "day": "2026-03-02", "mode": "chat", "conversations": 4, "messages": 40},
        ],
    }


def test_one_mode(api, bob, counted):
    body = api(bob).get(SUMMARY, {"from": "2026-02-28", "to": "2026-03-02", "mode": "chat"}).json()
    assert body["mode"] == "chat"
    assert body["totals"] == {**NOTHING, "conversations": 7, "messages": 70}
    assert {row["mode"] for row in body["rows"]} == {"chat"}


def test_a_tenant_sees_its_own_only(api, charlie, counted):
    body = api(charlie).get(SUMMARY, {"from": "2026-02-28", "to": "2026-03-02"}).json()
    assert body["totals"] == {**NOTHING, "conversations": 500, "messages": 5_000}
    rows = api(charlie).get(DAILY, {"from": "2026-02-28", "to": "2026-03-02"}).json()["results"]
    assert [row["conversations"] for row in rows] == [500]


def test_nothing_counted(api, bob):
    body = api(bob).get(SUMMARY, {"from": "2026-03-01", "to": "2026-03-01"}).json()
    assert (body["totals"], body["rows"]) == (NOTHING, [])
    assert api(bob).get(DAILY, {"from": "2026-03-01", "to": "2026-03-01"}).json()["results"] == []


@pytest.fixture
def replies(bob, charlie):
    for user, model, mode, cost, latency in (
        (bob, "small", "chat", 0.1, 0.5),
        (bob, "small", "chat", 0.2, 0.5),
        (bob, "small", "voice", 0.4, 0.3),
        (bob, "large", "chat", 1.5, 4.0),
        (charlie, "secret", "chat", 99.0, 4.0),
    ):
        count([reply(user.tenant_id, DAY, model=model, mode=mode, cost=cost, latency=latency, tokens=(10, 2))])
    count([completed(bob.tenant_id), completed(bob.tenant_id, mode="voice")])


ON_DAY = {"from": DAY.isoformat(), "to": DAY.isoformat()}


def test_models_are_added_up_in_the_summary(api, bob, replies):
    body = api(bob).get(SUMMARY, ON_DAY).json()
    totals = body["totals"]
    assert (totals["cost_dollars"], totals["replies"], totals["input_tokens"], totals["output_tokens"]) == (
        "2.2", 4, 40, 8
    )  # fmt: skip
    assert (totals["success_rate"], totals["latency_average_seconds"]) == (1.0, 1.325)
    assert [(row["mode"], row["replies"], row["cost_dollars"]) for row in body["rows"]] == [
        ("chat", 3, "1.8"),
        ("voice", 1, "0.4"),
    ]
    one_model = api(bob).get(SUMMARY, {**ON_DAY, "model": "small", "mode": "chat"}).json()
    assert (one_model["model"], one_model["totals"]["cost_dollars"]) == ("small", "0.3")
    assert api(bob).get(SUMMARY, {**ON_DAY, "model": "secret"}).json()["rows"] == []


def test_daily_rows(api, bob, replies, django_assert_num_queries):
    client = api(bob)
    with django_assert_num_queries(2):  # the token with its user, the page
        answer = client.get(DAILY, ON_DAY)
    rows = answer.json()["results"]
    assert [(row["mode"], row["model"], row["replies"], row["completed"]) for row in rows] == [
        ("chat", "", 0, 1),
        ("chat", "large", 1, 0),
        ("chat", "small", 2, 0),
        ("voice", "", 0, 1),
        ("voice", "small", 1, 0),
    ]
    assert set(rows[1]) == {*NOTHING, "day", "mode", "model"}
    assert rows[1] == {
        **NOTHING,
        "day": DAY.isoformat(),
        "mode": "chat",
        "model": "large",
        "messages": 1,
        "replies": 1,
        "input_tokens": 10,
        "output_tokens": 2,
        "cost_dollars": "1.5",
        "latency_average_seconds": 4.0,
        "latency_p95_seconds": 4.85,
    }
    assert [row["model"] for row in client.get(DAILY, {**ON_DAY, "model": "small"}).json()["results"]] == ["small"] * 2
    assert [row["model"] for row in client.get(DAILY, {**ON_DAY, "mode": "voice"}).json()["results"]] == ["", "small"]


def test_daily_pages(api, bob):
    expected = []
    for number in range(30):
        day = DAY - timedelta(days=number)
        count([reply(bob.tenant_id, day, model=f"model-{model}") for model in range(5)])
        expected += [(day.isoformat(), f"model-{model}") for model in range(5)]
    client, url, found = api(bob), f"{DAILY}?from=2026-01-01&to={DAY}", []
    while url:
        page = client.get(url).json()
        found += [(row["day"], row["model"]) for row in page["results"]]
        url = page["next"]
    assert found == expected


@pytest.mark.parametrize("position", ["x", "2026-13-01", "1"])
def test_a_made_up_cursor(api, bob, position):
    cursor = base64.b64encode(f"p={position}".encode()).decode()
    assert_problem(api(bob).get(DAILY, {"cursor": cursor}), 404)


@pytest.mark.parametrize("path", [SUMMARY, DAILY])
def test_strangers_and_operators_read_nothing(api, client, db, path):
    assert_problem(client.get(path), 401)
    operator = User.objects.create_user("oscar", password="x", is_staff=True)
    assert_problem(api(operator).get(path), 403)


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
        ({"model": "\x00"}, "model"),
        ({"model": "x" * 201}, "model"),
    ],
)
def test_a_query_that_is_not_valid(api, bob, query, field):
    for path in (SUMMARY, DAILY):
        problem = assert_problem(api(bob).get(path, query), 400)
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
    assert api(bob).get(SUMMARY, query).status_code == api(bob).get(DAILY, query).status_code == 200
