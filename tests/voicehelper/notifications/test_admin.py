"""Deliveries, webhooks and preferences in the admin: who sees what, and who may have what tried again."""

from datetime import timedelta
from importlib import import_module

import pytest
from django.apps import apps
from django.contrib.auth.models import Group
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from events_outbox.models import OperatorAction
from tests.voicehelper.conftest import PASSWORD
from tests.voicehelper.notifications.conftest import document_failed
from voicehelper.console.roles import create_roles
from voicehelper.identity.models import User
from voicehelper.identity.services import create_tenant, register_user
from voicehelper.notifications.models import Delivery, NotificationPreference, WebhookEndpoint
from voicehelper.notifications.services import create_webhook, set_preferences
from voicehelper.notifications.webhooks import secret_of

LIST = reverse("admin:notifications_delivery_changelist")


def client_of(user):
    client = Client()
    client.force_login(user)
    return client


@pytest.fixture
def member(db):
    """Make a client of a user of no tenant with a role."""
    create_roles()

    def log_in(role):
        user = User.objects.create_user(f"user-{role}", password=PASSWORD, is_staff=True)
        user.groups.set(Group.objects.filter(name=role))
        return client_of(user)

    return log_in


@pytest.fixture
def staff(db, tenant):
    """A client of eve, who is staff of alice's tenant and has every role."""
    create_roles()
    eve = register_user(tenant=tenant, username="eve", password=PASSWORD)
    eve.is_staff = True
    eve.save()
    eve.groups.set(Group.objects.all())
    return client_of(eve)


@pytest.fixture
def failed(bob):
    """A failed delivery of bob's tenant."""
    document_failed(bob, title="Secret Plan")
    Delivery.objects.update(state="failed", attempts=8, last_error="HTTP 500")
    return Delivery.objects.get()


def act(client, *deliveries, **fields):
    return client.post(LIST, {"action": "retry", "_selected_action": [d.pk for d in deliveries], **fields})


def test_failed_ones_are_tried_again_when_that_is_confirmed(member, failed):
    operator = member("Operator")
    asked = act(operator, failed)
    assert asked.status_code == 200 and b"Try 1 again" in asked.content
    failed.refresh_from_db()
    assert failed.state == "failed" and not OperatorAction.objects.exists()

    act(operator, failed, confirmed="yes")
    failed.refresh_from_db()
    assert (failed.state, failed.attempts) == ("pending", 0)
    action = OperatorAction.objects.get()
    assert (action.action, action.subject, action.by) == ("delivery.retried", str(failed.id), "user-Operator")


def test_what_has_not_failed_is_left_out(member, failed):
    Delivery.objects.update(state="sent")
    operator = member("Operator")
    asked = act(operator, failed)
    assert b"There is nothing to try again" in asked.content and b"1 that have not failed" in asked.content
    act(operator, failed, confirmed="yes")
    failed.refresh_from_db()
    assert failed.state == "sent" and not OperatorAction.objects.exists()


def test_that_a_mail_may_arrive_twice_is_said_before(member, failed):
    operator = member("Operator")
    assert b"may arrive twice" not in act(operator, failed).content
    Delivery.objects.update(last_error="Unknown outcome: it may have been sent, and is not sent again.")
    assert b"may arrive twice" in act(operator, failed).content


def test_from_its_page_as_well(member, failed):
    operator = member("Operator")
    url = reverse("admin:notifications_delivery_act", args=[failed.pk, "retry"])
    page = operator.get(reverse("admin:notifications_delivery_change", args=[failed.pk])).content.decode()
    assert url in page
    assert operator.get(url).status_code == 200
    operator.post(url, {"confirmed": "yes"})
    failed.refresh_from_db()
    assert failed.state == "pending"
    page = operator.get(reverse("admin:notifications_delivery_change", args=[failed.pk])).content.decode()
    assert url not in page


def test_so_many_at_once_at_most(member, failed, monkeypatch):
    monkeypatch.setattr("voicehelper.notifications.admin.AT_ONCE", 0)
    operator = member("Operator")
    answer = operator.post(LIST, {"action": "retry", "_selected_action": [failed.pk], "confirmed": "yes"}, follow=True)
    assert b"Select at most 0" in answer.content
    failed.refresh_from_db()
    assert failed.state == "failed"


def test_who_may_only_look_has_nothing_tried_again(member, failed):
    viewer = member("Viewer")
    assert viewer.get(LIST).status_code == 200
    assert act(viewer, failed).status_code == act(viewer, failed, confirmed="yes").status_code == 403
    url = reverse("admin:notifications_delivery_act", args=[failed.pk, "retry"])
    assert viewer.post(url, {"confirmed": "yes"}).status_code == 403
    failed.refresh_from_db()
    assert failed.state == "failed"


def test_the_list_is_filtered_by_state_and_channel(member, failed, alice, webhook, bob):
    document_failed(bob)
    viewer = member("Viewer")

    def shown(**conditions):
        return {row.pk for row in viewer.get(LIST, conditions).context["cl"].result_list}

    assert shown(state="failed") == {failed.pk}
    assert shown(channel="webhook") == set(Delivery.objects.filter(channel="webhook").values_list("pk", flat=True))
    assert shown(state="sent") == set()
    assert shown(q=str(failed.event_id)) == {failed.pk}
    assert len(shown(kind="document.failed")) == Delivery.objects.count() == 4


@pytest.mark.parametrize("role", ["Viewer", "Admin"])
def test_what_it_says_takes_the_permission_for_payloads(member, failed, role):
    client = member(role)
    page = client.get(reverse("admin:notifications_delivery_change", args=[failed.pk])).content.decode()
    assert ("Reason: It is no PDF." in page) == (role == "Admin")
    for lookup in ("body__contains", "body_html__contains", "notification__body__contains"):
        assert client.get(LIST, {lookup: "x"}).status_code == 400


def test_no_secret_of_a_webhook_is_shown(member, webhook):
    for role in ("Viewer", "Admin"):
        client = member(role)
        for url in (
            reverse("admin:notifications_webhookendpoint_changelist"),
            reverse("admin:notifications_webhookendpoint_change", args=[webhook.pk]),
        ):
            page = client.get(url).content.decode()
            assert "127.0.0.1" in page
            assert webhook.salt not in page and secret_of(webhook) not in page
    url = reverse("admin:notifications_webhookendpoint_changelist")
    exported = b"".join(client.get(reverse("admin:notifications_webhookendpoint_export")).streaming_content).decode()
    assert webhook.url in exported and webhook.salt not in exported
    for lookup in ("salt__startswith", "previous_salt__startswith", "salt"):
        assert client.get(url, {lookup: webhook.salt[0]}).status_code == 400
    assert client.get(LIST, {"endpoint__salt__startswith": webhook.salt[0]}).status_code == 400


def test_a_tenants_staff_sees_and_reaches_its_own_alone(staff, failed, bob, charlie, alice):
    mine = {"delivery": failed, "webhookendpoint": create_webhook(by=alice, url="https://example.com/")}
    create_webhook(by=charlie, url="https://example.org/")
    document_failed(charlie)
    Delivery.objects.update(state="failed")
    for user in (bob, charlie):
        set_preferences(user=user, preferences=[("document.indexed", "email", True)])
    mine["notificationpreference"] = NotificationPreference.objects.get(user=bob)
    theirs = {
        "delivery": Delivery.objects.filter(channel="email").get(tenant=charlie.tenant),
        "webhookendpoint": WebhookEndpoint.objects.get(tenant=charlie.tenant),
        "notificationpreference": NotificationPreference.objects.get(user=charlie),
    }
    for model, row in mine.items():
        listed = staff.get(reverse(f"admin:notifications_{model}_changelist")).context["cl"].result_list
        assert [found.pk for found in listed] == [row.pk]
        assert staff.get(reverse(f"admin:notifications_{model}_change", args=[row.pk])).status_code == 200
        assert staff.get(reverse(f"admin:notifications_{model}_change", args=[theirs[model].pk])).status_code == 302
    act(staff, theirs["delivery"], confirmed="yes")
    url = reverse("admin:notifications_delivery_act", args=[theirs["delivery"].pk, "retry"])
    assert staff.post(url, {"confirmed": "yes"}).status_code == 404
    theirs["delivery"].refresh_from_db()
    assert theirs["delivery"].state == "failed"
    assert not OperatorAction.objects.filter(action="delivery.retried").exists()


def test_nothing_is_added_changed_or_deleted(staff, failed, alice):
    alice_client = client_of(alice)
    for page in ("add/", f"{failed.pk}/change/", f"{failed.pk}/delete/"):
        assert alice_client.post(f"{LIST}{page}", {"post": "yes"}).status_code == 403


@pytest.mark.parametrize("model", ["delivery", "webhookendpoint", "notificationpreference"])
def test_a_list_costs_as_many_queries_for_many_rows_as_for_few(member, model):
    viewer, url = member("Viewer"), reverse(f"admin:notifications_{model}_changelist")

    def queries_after(*numbers):
        for number in numbers:
            tenant = create_tenant(name=f"Tenant {number}")
            user = register_user(tenant=tenant, username=f"user-{number}", password=PASSWORD, role=User.Role.ADMIN)
            User.objects.filter(id=user.id).update(email="one@example.com")
            create_webhook(by=user, url="https://example.com/")
            set_preferences(user=user, preferences=[("document.indexed", "email", True)])
            document_failed(user)
        with CaptureQueriesContext(connection) as queries:
            assert len(viewer.get(url).context["cl"].result_list) > numbers[-1]
        return len(queries)

    queries_after(0)
    assert queries_after(1) == queries_after(2, 3, 4, 5)


def test_a_migrated_database_has_the_roles_permissions(db):
    Group.objects.all().delete()
    for name in ("Viewer", "Operator", "Admin"):
        Group.objects.create(name=name)
    migration = import_module("voicehelper.notifications.migrations.0003_roles")
    with connection.schema_editor() as editor:
        migration.grant(apps, editor)
    look = {"view_delivery", "view_webhookendpoint", "view_notificationpreference"}
    operate = look | {"retry_delivery"}
    for name, expected in (("Viewer", look), ("Operator", operate), ("Admin", operate)):
        assert set(Group.objects.get(name=name).permissions.values_list("codename", flat=True)) == expected


def test_the_first_page_says_that_nobody_sends_and_leads_to_what_waits(member, bob):
    document_failed(bob)
    Delivery.objects.update(next_attempt_at=timezone.now() - timedelta(minutes=6))
    viewer = member("Viewer")
    page = viewer.get(reverse("admin:index")).content.decode()
    assert "Nobody runs deliver_notifications: 1 e-mail to be sent, the first has been due for 6 min" in page
    link = f"{LIST}?state=pending&channel=email"
    assert link.replace("&", "&amp;") in page
    assert len(viewer.get(link).context["cl"].result_list) == 1
