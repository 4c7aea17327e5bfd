import uuid

import pytest

from tests.voicehelper.conftest import assert_problem
from voicehelper.notifications.models import Notification
from voicehelper.notifications.services import notify

NOTIFICATIONS = "/api/v1/notifications"


@pytest.fixture
def notification(alice) -> Notification:
    return notify(recipient=alice, kind="conversation.created", aggregate_id="c-1", subject="New")


def test_own_notifications_newest_first(api, alice, notification, django_assert_num_queries):
    newer = notify(recipient=alice, kind="conversation.created", aggregate_id="c-2", subject="Newer")

    client = api(alice)
    with django_assert_num_queries(2):  # the token with its user, the page
        rows = client.get(NOTIFICATIONS).json()["results"]
    assert [row["id"] for row in rows] == [str(newer.id), str(notification.id)]
    assert set(rows[0]) == {"id", "kind", "aggregate_id", "subject", "body", "created_at", "read_at"}
    assert rows[0]["read_at"] is None


def test_read_once(api, alice, notification):
    first = api(alice).post(f"{NOTIFICATIONS}/{notification.id}/read")
    second = api(alice).post(f"{NOTIFICATIONS}/{notification.id}/read")

    assert first.status_code == second.status_code == 200
    assert first.json()["read_at"] is not None
    assert second.json() == first.json() == api(alice).get(NOTIFICATIONS).json()["results"][0]


def test_nobody_else_sees_or_reads_it(api, bob, charlie, notification):
    for user in (bob, charlie):
        assert api(user).get(NOTIFICATIONS).json()["results"] == []
        assert_problem(api(user).post(f"{NOTIFICATIONS}/{notification.id}/read"), 404)
    notification.refresh_from_db()
    assert notification.read_at is None


def test_who_moved_to_another_tenant_leaves_their_notifications_behind(api, alice, charlie, notification):
    alice.tenant = charlie.tenant
    alice.save()

    assert api(alice).get(NOTIFICATIONS).json()["results"] == []
    assert_problem(api(alice).post(f"{NOTIFICATIONS}/{notification.id}/read"), 404)


def test_an_unknown_notification(api, alice):
    assert_problem(api(alice).post(f"{NOTIFICATIONS}/{uuid.uuid4()}/read"), 404)
