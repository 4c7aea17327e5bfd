import pytest

from tests.voicehelper.conftest import assert_problem
from tests.voicehelper.notifications.conftest import conversation_failed, document_failed, document_indexed
from voicehelper.notifications.kinds import KINDS
from voicehelper.notifications.models import Delivery, Notification, NotificationPreference

PREFERENCES = "/api/v1/notification-preferences"


def prefer(kind, channel, enabled):
    return {"kind": kind, "channel": channel, "enabled": enabled}


@pytest.fixture
def put(api, bob):
    return lambda *preferences: api(bob).put(PREFERENCES, {"preferences": list(preferences)}, format="json")


def shown(response):
    assert response.status_code == 200, response.content
    return {
        (row["kind"], row["channel"]): (row["enabled"], row["can_be_changed"]) for row in response.json()["preferences"]
    }


def test_the_defaults_are_those_of_the_table(api, bob):
    by_default = shown(api(bob).get(PREFERENCES))
    assert set(by_default) == {(kind, channel) for kind in KINDS for channel in ("in_app", "email")}
    assert by_default["document.indexed", "in_app"] == (True, True)
    assert by_default["document.indexed", "email"] == (False, True)
    for kind in ("conversation.failed", "document.failed", "analytics.budget.exceeded"):
        assert by_default[kind, "in_app"] == (True, False)
        assert by_default[kind, "email"] == (True, True)


def test_what_is_put_replaces_what_was_there(api, bob, put):
    one = shown(put(prefer("document.indexed", "email", True), prefer("document.failed", "email", False)))
    assert one["document.indexed", "email"] == (True, True) and one["document.failed", "email"] == (False, True)
    two = shown(put(prefer("document.indexed", "in_app", False)))
    assert two["document.indexed", "in_app"] == (False, True) and two["document.failed", "email"] == (True, True)
    assert two == shown(api(bob).get(PREFERENCES))
    assert NotificationPreference.objects.count() == 1


def test_what_one_is_shown_can_be_put_back(api, bob, put):
    before = api(bob).get(PREFERENCES).json()
    assert api(bob).put(PREFERENCES, before, format="json").json() == before


@pytest.mark.parametrize(
    "preferences",
    [
        [prefer("conversation.exploded", "email", True)],
        [prefer("document.failed", "webhook", True)],
        [prefer("document.failed", "email", "maybe")],
        [prefer("document.failed", "email", True), prefer("document.failed", "email", False)],
        [prefer("document.failed", "in_app", False)],
        [{"kind": "document.failed"}],
        [prefer("document.failed", "email", True)] * 1000,
        "all",
        None,
        [None],
    ],
)
def test_what_cannot_be_preferred_changes_nothing(api, bob, put, preferences):
    put(prefer("document.indexed", "email", True))
    answer = api(bob).put(PREFERENCES, {"preferences": preferences}, format="json")
    assert_problem(answer, 400)
    assert NotificationPreference.objects.count() == 1


def test_a_failure_stays_in_the_app_whatever_the_rows_say(bob):
    NotificationPreference.objects.create(user=bob, kind="document.failed", channel="in_app", enabled=False)
    document_failed(bob)
    assert Notification.objects.for_recipient(bob).count() == 1


def test_they_are_followed_and_are_of_one_user(alice, bob, put):
    put(prefer("conversation.failed", "email", False))
    conversation_failed(bob)
    assert {delivery.recipient for delivery in Delivery.objects.all()} == {alice}
    assert Notification.objects.for_recipient(bob).count() == 1


def test_who_wants_mail_alone_is_told_by_mail_alone(api, bob, put, emitted):
    put(prefer("document.indexed", "in_app", False), prefer("document.indexed", "email", True))
    document_indexed(bob)
    assert Delivery.objects.get().recipient == bob
    assert api(bob).get("/api/v1/notifications").json()["results"] == []
    assert len(emitted("notification.created")) == 1 and emitted("notification.sent") == []


def test_who_wants_nothing_is_not_told(bob, put, emitted):
    put(prefer("document.indexed", "in_app", False))
    document_indexed(bob)
    assert not Notification.objects.exists() and not Delivery.objects.exists()


def test_each_sees_and_changes_their_own_alone(api, bob, charlie, put):
    put(prefer("document.indexed", "email", True))
    assert shown(api(charlie).get(PREFERENCES))["document.indexed", "email"] == (False, True)
    assert shown(api(charlie).put(PREFERENCES, {"preferences": []}, format="json"))
    assert NotificationPreference.objects.get().user == bob
