import base64
from datetime import UTC, datetime, timedelta

import pytest
from django.db import connection

from events_outbox.testing import make_event
from tests.voicehelper.conftest import PASSWORD, assert_problem, consume
from voicehelper.audit.chain import FIELDS, entry_hash
from voicehelper.audit.event_handlers import record
from voicehelper.identity.models import User

AUDIT = "/api/v1/audit"
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def test_an_admin_reads_the_tenant_s_log_the_last_entry_first(api, alice, bob, charlie, django_assert_num_queries):
    consume("audit")
    client = api(alice)
    with django_assert_num_queries(2):  # the token with its user, the page
        answer = client.get(AUDIT)

    assert answer.status_code == 200
    rows = answer.json()["results"]
    assert [row["position"] for row in rows] == [3, 2, 1]
    assert [row["event_type"] for row in rows] == ["identity.user.created"] * 2 + ["identity.tenant.created"]
    assert set(rows[0]) == {*FIELDS, "hash"} - {"tenant_id"}
    assert rows[0]["previous_hash"] == rows[1]["hash"]
    assert rows[0]["hash"] == entry_hash({**rows[0], "tenant_id": str(alice.tenant_id)})
    assert rows[0]["payload"]["username"] == "bob"


def test_what_is_shown_is_what_was_hashed_also_of_a_whole_second(api, alice):
    record([make_event("conversation.created", tenant_id=alice.tenant_id, timestamp=NOON)])
    [row] = api(alice).get(AUDIT).json()["results"]
    assert row["occurred_at"] == "2026-03-01T12:00:00.000000Z"
    assert row["hash"] == entry_hash({**row, "tenant_id": str(alice.tenant_id)})


def test_nobody_reads_another_tenant_s_log(api, alice, charlie):
    consume("audit")
    for user in (alice, charlie):
        payloads = [row["payload"] for row in api(user).get(AUDIT).json()["results"]]
        assert [payload["username"] for payload in payloads if "username" in payload] == [user.username]
    theirs = api(charlie).get(AUDIT, {"tenant_id": str(alice.tenant_id)}).json()["results"]
    assert "alice" not in str(theirs)


def test_members_operators_and_strangers_read_nothing(api, bob, client):
    consume("audit")
    assert_problem(api(bob).get(AUDIT), 403)
    operator = User.objects.create_user("oscar", password=PASSWORD, is_staff=True, role=User.Role.ADMIN)
    assert_problem(api(operator).get(AUDIT), 403)
    assert_problem(client.get(AUDIT), 401)


def test_a_token_needs_the_scope(api, alice):
    assert_problem(api(alice, "write", "admin").get(AUDIT), 403)
    assert api(alice, "read").get(AUDIT).status_code == 200


def test_filters(api, alice):
    record(
        [
            make_event(event_type, tenant_id=alice.tenant_id, timestamp=NOON + timedelta(hours=hour))
            for hour, event_type in enumerate(["conversation.created", "document.uploaded", "conversation.created"])
        ]
    )
    client = api(alice)

    def positions(**query: str) -> list[int]:
        return [row["position"] for row in client.get(AUDIT, query).json()["results"]]

    assert positions() == [3, 2, 1]
    assert positions(event_type="conversation.created") == [3, 1]
    assert positions(event_type="conversation.nothing") == []
    assert positions(since="2026-03-01T13:00:00Z") == [3, 2]
    assert positions(until="2026-03-01T13:00:00Z") == [1]
    assert positions(since="2026-03-01T14:30:00+01:00", until="2026-03-01T15:00") == [3]
    assert positions(since="", event_type="") == [3, 2, 1]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"since": "yesterday"}, "since"),
        ({"until": "2026-02-30"}, "until"),
        ({"since": "2026-03-02T00:00Z", "until": "2026-03-01T00:00Z"}, "since"),
        ({"event_type": "x\x00"}, "event_type"),
        ({"event_type": "x" * 129}, "event_type"),
    ],
)
def test_a_query_that_is_not_valid(api, alice, query, field):
    assert list(assert_problem(api(alice).get(AUDIT, query), 400)["errors"]) == [field]


@pytest.mark.parametrize(
    "cursor", ["nonsense", base64.b64encode(b"p=x").decode(), base64.b64encode(b"p=1%00").decode()]
)
def test_a_made_up_cursor(api, alice, cursor):
    assert_problem(api(alice).get(AUDIT, {"cursor": cursor}), 404)


def test_pages(api, alice):
    record([make_event("conversation.created", tenant_id=alice.tenant_id) for _ in range(120)])
    client, url, positions = api(alice), AUDIT, []
    while url:
        page = client.get(url).json()
        positions += [row["position"] for row in page["results"]]
        url = page["next"]
    assert positions == list(range(120, 0, -1))


def test_an_admin_of_another_tenant_is_none_here(api, alice, charlie):
    """Whoever moves to another tenant reads that one's log."""
    consume("audit")
    alice.tenant = charlie.tenant
    alice.save()
    assert {row["payload"].get("username") for row in api(alice).get(AUDIT).json()["results"]} == {"charlie", None}


def test_a_member_who_becomes_an_admin(api, bob):
    consume("audit")
    assert api(bob).get(AUDIT).status_code == 403
    User.objects.filter(id=bob.id).update(role=User.Role.ADMIN)
    assert api(bob).get(AUDIT).status_code == 200


def test_a_type_that_is_rare_is_found_by_index(api, alice, django_assert_num_queries):
    record([make_event("conversation.created", tenant_id=alice.tenant_id) for _ in range(60)])
    client = api(alice)
    with django_assert_num_queries(2) as queries:
        assert client.get(AUDIT, {"event_type": "document.failed"}).json()["results"] == []
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE audit_auditentry")
        cursor.execute("SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off")
        cursor.execute(f"EXPLAIN {queries.captured_queries[-1]['sql']}")
        plan = "\n".join(line for (line,) in cursor.fetchall())
    assert "audit_tenant_type" in plan and "Filter" not in plan and "Sort" not in plan, plan
