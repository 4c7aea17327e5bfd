"""Who may see and do what in the admin: the roles, page by page and action by action, and the staff of a tenant."""

from importlib import import_module

import pytest
from django.apps import apps
from django.contrib import admin
from django.contrib.auth.models import Group, Permission
from django.db import connection
from django.test import Client
from django.urls import reverse

from events_outbox import pauses
from events_outbox.admin.read_only import TenantConfined
from events_outbox.consumer import ConsumerProcess
from events_outbox.handlers import consumer_named
from events_outbox.models import DeadLetter, OperatorAction, OutboxEvent, RelayCursor, UndeliverableEvent
from events_outbox.records import Record
from tests.voicehelper.conftest import PASSWORD, consume
from voicehelper.analytics.models import DailyTotal
from voicehelper.audit.models import AuditEntry
from voicehelper.console.roles import ROLES, admin_tenant, create_roles
from voicehelper.conversations.models import Message
from voicehelper.conversations.services import create_conversation, send_message
from voicehelper.identity.models import ApiToken, User
from voicehelper.identity.services import register_user
from voicehelper.knowledge.services import upload_document
from voicehelper.notifications.models import Notification
from voicehelper.notifications.services import notify

pytestmark = pytest.mark.django_db

SECRET = "the content of a message"


def rows_of(user: User) -> dict[str, object]:
    """A row of every model that knows tenants, of the user's tenant."""
    conversation = create_conversation(user=user, title=f"Title of {user.username}")
    send_message(user=user, conversation_id=conversation.id, content=SECRET)
    notify(recipient=user, kind="conversation.created", aggregate_id=str(conversation.id), subject="New")
    document = upload_document(user=user, data=SECRET.encode(), file_name="notes.txt")
    event = OutboxEvent.objects.filter(event_type="conversation.message.sent").latest("id")
    parked = UndeliverableEvent.objects.create(
        event=event, topic=event.topic, aggregate_id=event.aggregate_id, reason="OTHER", error="refused"
    )
    letter = DeadLetter.objects.create(
        consumer="audit",
        event_id=event.event_id,
        event_type=event.event_type,
        tenant_id=event.tenant_id,
        topic=event.topic,
        partition=0,
        offset=1,
        key=b"k",
        value=bytes(event.value),
        reason="failed",
        error="it was broken",
    )
    return {
        "event": event,
        "parked": parked,
        "letter": letter,
        "conversation": conversation,
        "message": Message.objects.get(conversation=conversation),
        "document": document,
        "notification": Notification.objects.get(recipient=user),
        "user": user,
        "token": ApiToken.objects.issue(user=user, name="laptop").token,
        "tenant": user.tenant,
    }


@pytest.fixture
def roles(db):
    create_roles()
    RelayCursor.objects.get_or_create(id=1)


def client_of(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


@pytest.fixture
def member(roles):
    """Make a client of a user of no tenant with a role (empty: none)."""

    def log_in(role: str) -> Client:
        user = User.objects.create_user(f"user-{role or 'none'}", password=PASSWORD, is_staff=True)
        user.groups.set(Group.objects.filter(name=role))
        return client_of(user)

    return log_in


@pytest.fixture
def own(bob):
    return rows_of(bob)


LISTS = {
    "events_outbox": [
        "outboxevent",
        "undeliverableevent",
        "deadletter",
        "processedevent",
        "operatoraction",
        "consumerpause",
        "relaycursor",
        "worker",
    ],
    "conversations": ["conversation", "message"],
    "knowledge": ["document"],
    "notifications": ["notification", "delivery", "webhookendpoint", "notificationpreference"],
    "analytics": ["dailytotal"],
    "audit": ["auditentry"],
    "identity": ["tenant", "user", "apitoken"],
    "auth": ["group"],
}
FOR_ADMINS = {"user", "group", "apitoken"}
EVERY_LIST = [(app, model) for app, models in LISTS.items() for model in models]


@pytest.mark.parametrize("role", ["", "Viewer", "Operator", "Admin"])
@pytest.mark.parametrize(("app", "model"), EVERY_LIST)
def test_which_lists_a_role_opens(member, role, app, model):
    opens = bool(role) and (role == "Admin" or model not in FOR_ADMINS)
    answer = member(role).get(reverse(f"admin:{app}_{model}_changelist"))
    assert answer.status_code == (200 if opens else 403)


def test_every_model_of_the_admin_is_among_those_lists():
    registered = {(model._meta.app_label, model._meta.model_name) for model in admin.site._registry}
    assert registered == set(EVERY_LIST)


ACTIONS = [
    ("outboxevent", "replay", "event"),
    ("undeliverableevent", "redrive", "parked"),
    ("undeliverableevent", "discard", "parked"),
    ("deadletter", "replay", "letter"),
    ("deadletter", "replay_by_force", "letter"),
    ("deadletter", "discard", "letter"),
]
PAGES = [
    ("events_outbox_replay", {}),
    ("events_outbox_redrive", {}),
    ("events_outbox_consumer_pause", {"consumer": "audit"}),
    ("events_outbox_consumer_resume", {"consumer": "analytics"}),
    ("events_outbox_relay_pause", {}),
    ("events_outbox_outboxevent_export", {}),
    ("events_outbox_deadletter_export", {}),
]
MAY_ACT = {"": False, "Viewer": False, "Operator": True, "Admin": True}


def post_action(client, model, action, *objects, **fields):
    url = reverse(f"admin:events_outbox_{model}_changelist")
    return client.post(url, {"action": action, "_selected_action": [o.pk for o in objects], **fields})


@pytest.mark.parametrize("role", MAY_ACT)
@pytest.mark.parametrize(("model", "action", "row"), ACTIONS)
def test_which_actions_a_role_has(member, own, role, model, action, row):
    client = member(role)
    asked = post_action(client, model, action, own[row])
    assert asked.status_code == (200 if MAY_ACT[role] else 403)
    if role:
        listed = client.get(reverse(f"admin:events_outbox_{model}_changelist")).content.decode()
        assert (f'<option value="{action}"' in listed) == MAY_ACT[role]
    if not MAY_ACT[role]:
        assert post_action(client, model, action, own[row], confirmed="yes", reason="x").status_code == 403
        assert not OperatorAction.objects.exclude(action="payload.viewed").exists()


@pytest.mark.parametrize("role", MAY_ACT)
@pytest.mark.parametrize(("name", "query"), PAGES)
def test_which_pages_of_actions_a_role_opens(member, role, name, query):
    pauses.pause("analytics", by="x", reason="y")
    client, url = member(role), reverse(f"admin:{name}", query=query)
    assert client.get(url).status_code == (200 if MAY_ACT[role] else 403)
    if not MAY_ACT[role]:
        assert client.post(url, {"confirmed": "yes", "reason": "x"}).status_code == 403
        assert not pauses.is_paused("audit") and pauses.relay_pause() is None and pauses.is_paused("analytics")


@pytest.mark.parametrize("role", ["Viewer", "Operator", "Admin"])
def test_a_payload_takes_its_permission_and_to_see_it_is_noted(member, own, bob, role):
    DeadLetter.objects.update(consumer="analytics")
    consume("audit")
    client = member(role)
    entry = AuditEntry.objects.get(event_id=own["event"].event_id)
    for row, text in (
        (own["event"], SECRET),
        (own["parked"], SECRET),
        (own["letter"], SECRET),
        (own["letter"], SECRET.encode()[:8].hex(" ")),
        (own["message"], SECRET),
        (own["document"], SECRET),
        (entry, SECRET),
    ):
        OperatorAction.objects.all().delete()
        url = reverse(f"admin:{row._meta.app_label}_{row._meta.model_name}_change", args=[row.pk])
        answer = client.get(url)
        assert answer.status_code == 200
        assert (text in answer.content.decode()) == (role == "Admin"), row
        assert OperatorAction.objects.filter(action="payload.viewed").count() == (role == "Admin"), row
    Permission.objects.get(codename="view_payload").user_set.add(User.objects.get(username=f"user-{role}"))
    url = reverse("admin:events_outbox_deadletter_change", args=[own["letter"].pk])
    assert SECRET in client.get(url).content.decode()


def test_what_somebody_changes_in_a_role_stays(roles):
    Group.objects.get(name="Operator").permissions.clear()
    Group.objects.get(name="Viewer").delete()
    assert create_roles() == ["Viewer"]
    assert not Group.objects.get(name="Operator").permissions.exists()
    assert set(Group.objects.values_list("name", flat=True)) >= set(ROLES)


def test_a_fresh_database_gets_the_roles_with_their_permissions(roles):
    Group.objects.all().delete()
    Permission.objects.all().delete()  # they are made after the migrations
    migration = import_module("voicehelper.console.migrations.0001_roles")
    with connection.schema_editor() as editor:
        migration.make(apps, editor)
    sizes = {name: Group.objects.get(name=name).permissions.count() for name in ROLES}
    assert sizes["Viewer"] > 10 and sizes["Operator"] == sizes["Viewer"] + 9 and sizes["Admin"] > sizes["Operator"]
    for name in ("Viewer", "Operator"):
        assert not Group.objects.get(name=name).permissions.filter(codename="view_payload").exists()


def test_no_list_is_filtered_by_what_its_reader_may_not_see(member, own):
    consume("audit")
    secrets = {
        "conversations_message": ("content__startswith", "content", "content__regex"),
        "audit_auditentry": ("payload__content__startswith", "payload__has_key"),
        "events_outbox_deadletter": ("key", "value__gte"),
        "events_outbox_outboxevent": ("value__gte", "value"),
    }
    client = member("Viewer")
    for name, lookups in secrets.items():
        url = reverse(f"admin:{name}_changelist")
        for lookup in lookups:
            assert client.get(url, {lookup: "t"}).status_code == 400, lookup
    url = reverse("admin:conversations_message_changelist")
    assert client.get(url, {"id": str(own["message"].pk)}).context["cl"].result_count == 1


@pytest.mark.parametrize(("model", "row"), [("outboxevent", "event"), ("undeliverableevent", "parked")])
def test_who_may_act_but_not_look_is_shown_nothing(roles, own, model, row):
    user = User.objects.create_user("blind", password=PASSWORD, is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=["replay_events", "redrive_undeliverableevent"]))
    client = client_of(user)
    action = {"outboxevent": "replay", "undeliverableevent": "redrive"}[model]
    act = reverse(f"admin:events_outbox_{model}_act", args=[own[row].pk, action])
    for url in (act, reverse(f"admin:events_outbox_{action}")):
        assert client.get(url).status_code == client.post(url, {"confirmed": "yes", "reason": "x"}).status_code == 403


def test_an_admin_makes_no_superuser(member, roles, bob, alice):
    client = member("Admin")
    form = client.get(reverse("admin:identity_user_change", args=[bob.pk])).context["adminform"].form
    assert "groups" in form.fields and not {"is_superuser", "user_permissions"} & set(form.fields)
    changed = client.post(reverse("admin:identity_user_change", args=[alice.pk]), {"username": "mallory"})
    new = {"password1": "x-9-x-9-x", "password2": "x-9-x-9-x"}
    password = client.post(reverse("admin:auth_user_password_change", args=[alice.pk]), new)
    assert changed.status_code == password.status_code == 403


# -- the staff of a tenant


@pytest.fixture
def staff(roles, tenant):
    """A client of eve, who is staff of the tenant Demo and has every role."""
    eve = register_user(tenant=tenant, username="eve", password=PASSWORD)
    eve.is_staff = True
    eve.save()
    eve.groups.set(Group.objects.all())
    return client_of(eve)


@pytest.fixture
def others(charlie):
    """Rows of the tenant Other."""
    return rows_of(charlie)


CONFINED = [
    "event",
    "parked",
    "letter",
    "conversation",
    "message",
    "notification",
    "user",
    "token",
    "tenant",
    "document",
]


def test_whose_rows_a_user_sees(bob, alice, db):
    assert admin_tenant(bob) == str(bob.tenant_id)
    assert admin_tenant(alice) is None  # a superuser
    assert admin_tenant(User(username="operator")) is None


def test_every_model_says_whose_its_rows_are_or_is_hidden(rf, bob):
    request = rf.get("/")
    request.user = bob
    for model, model_admin in admin.site._registry.items():
        if model._meta.model_name == "group":
            continue  # of nobody
        assert isinstance(model_admin, TenantConfined), model
        assert list(model_admin.get_queryset(request)[:1]) is not None  # the field is there


@pytest.mark.parametrize("row", CONFINED)
def test_a_tenants_staff_sees_its_own_rows_alone(staff, own, others, row):
    mine, theirs = own[row], others[row]
    name = f"admin:{mine._meta.app_label}_{mine._meta.model_name}"
    listed = staff.get(reverse(f"{name}_changelist"))
    shown = {found.pk for found in listed.context["cl"].result_list}
    assert mine.pk in shown and theirs.pk not in shown
    searched = staff.get(reverse(f"{name}_changelist"), {"q": str(theirs.pk)})
    assert theirs.pk not in {found.pk for found in searched.context["cl"].result_list}
    assert staff.get(reverse(f"{name}_change", args=[mine.pk])).status_code == 200
    for page in ("change", "history"):
        away = staff.get(reverse(f"{name}_{page}", args=[theirs.pk]))
        assert away.status_code == 302 and away["Location"] == reverse("admin:index")


@pytest.mark.parametrize("model", ["processedevent", "operatoraction", "consumerpause", "relaycursor", "worker"])
def test_what_knows_no_tenant_is_hidden_from_a_tenants_staff(staff, model):
    assert staff.get(reverse(f"admin:events_outbox_{model}_changelist")).status_code == 403
    assert reverse(f"admin:events_outbox_{model}_changelist") not in staff.get(reverse("admin:index")).content.decode()


@pytest.mark.parametrize(("model", "action", "row"), ACTIONS)
@pytest.mark.parametrize("across", ["0", "1"])
def test_an_action_of_a_tenants_staff_reaches_its_own_rows_alone(staff, own, others, model, action, row, across):
    for theirs_too in ([others[row]], [own[row], others[row]]):
        answer = post_action(staff, model, action, *theirs_too, select_across=across)
        text = answer.content.decode()
        for secret in (others["event"].event_id, others["event"].aggregate_id, others["tenant"].pk):
            assert str(secret) not in text
    post_action(staff, model, action, others[row], select_across="0", confirmed="yes", reason="x")
    url = reverse(f"admin:events_outbox_{model}_act", args=[others[row].pk, action])
    assert staff.get(url).status_code == staff.post(url, {"confirmed": "yes", "reason": "x"}).status_code == 404
    others["parked"].refresh_from_db()
    others["letter"].refresh_from_db()
    assert others["parked"].redrive_requested_at is None and others["parked"].discarded_at is None
    assert others["letter"].resolution == "" and others["letter"].replays == 0
    assert not OperatorAction.objects.filter(action="events.replayed").exists()


def test_a_redrive_by_filter_is_of_the_own_tenant(staff, own, others):
    url = reverse("admin:events_outbox_redrive")
    assert str(others["event"].event_id) not in staff.get(url).content.decode()
    staff.post(url, {"confirmed": "yes", "shown": "1"})
    assert UndeliverableEvent.objects.get(redrive_requested_at__isnull=False) == own["parked"]


def test_a_replay_is_of_the_own_tenant_whatever_is_asked_for(staff, own, others):
    UndeliverableEvent.objects.all().delete()
    OutboxEvent.objects.update(transaction_id=3)  # long published
    url = reverse("admin:events_outbox_replay")
    for query in (
        {"preview": "1", "tenant_id": str(others["tenant"].pk), "event_type": "*"},
        {"event_id": str(others["event"].event_id)},
        {"preview": "1", "aggregate_id": others["event"].aggregate_id},
    ):
        answer = staff.get(url, query)
        assert answer.status_code == 200
        assert not {str(row[1][3]) for row in answer.context["rows"]} - {str(own["tenant"].pk)}
        hidden = dict(answer.context["hidden"])
        assert hidden["tenant_id"] == str(own["tenant"].pk)


@pytest.mark.parametrize("name", ["relay_pause", "relay_resume", "consumer_pause", "consumer_resume"])
def test_a_tenants_staff_pauses_nothing_that_is_everybodys(staff, name):
    url = reverse(f"admin:events_outbox_{name}", query={"consumer": "audit"})
    assert staff.get(url).status_code == 403
    assert staff.post(url, {"confirmed": "yes", "reason": "x"}).status_code == 403


def test_a_tenants_staff_changes_no_users_and_finds_no_others(staff, own, others):
    for page in (reverse("admin:identity_user_add"), reverse("admin:identity_tenant_add")):
        assert staff.get(page).status_code == 403
    user = reverse("admin:identity_user_change", args=[own["user"].pk])
    assert staff.post(user, {"username": "mallory"}).status_code == 403
    assert staff.get(reverse("admin:auth_user_password_change", args=[own["user"].pk])).status_code == 403
    found = staff.get(
        reverse("admin:autocomplete"),
        {"app_label": "identity", "model_name": "user", "field_name": "tenant", "term": "O"},
    )
    assert "Other" not in found.content.decode()


def test_an_export_of_a_tenants_staff_is_of_its_own_rows(staff, own, others):
    for name in ("outboxevent", "deadletter", "undeliverableevent"):
        lines = b"".join(staff.get(reverse(f"admin:events_outbox_{name}_export")).streaming_content).decode()
        assert str(own["event"].event_id) in lines and str(others["event"].event_id) not in lines


def test_totals_and_the_audit_log_are_of_the_own_tenant(staff, own, others):
    for consumer in ("audit", "analytics"):
        DeadLetter.objects.all().delete()
        consume(consumer)
    for model, name in ((DailyTotal, "analytics_dailytotal"), (AuditEntry, "audit_auditentry")):
        theirs = model.objects.filter(tenant_id=str(others["tenant"].pk)).first()
        assert theirs is not None and model.objects.filter(tenant_id=str(own["tenant"].pk)).exists()
        shown = staff.get(reverse(f"admin:{name}_changelist")).context["cl"].result_list
        assert shown and {str(row.tenant_id) for row in shown} == {str(own["tenant"].pk)}
        assert staff.get(reverse(f"admin:{name}_change", args=[theirs.pk])).status_code == 302


def test_a_letter_that_is_no_event_is_of_no_tenant(staff, own):
    ConsumerProcess(consumer_named("audit")).handle_batch([Record("t", 0, 0, None, b"junk", [])])
    letter = DeadLetter.objects.get(event_type="")
    assert staff.get(reverse("admin:events_outbox_deadletter_change", args=[letter.pk])).status_code == 302


def test_another_tenants_user_name_hides_no_match_of_ones_own(staff, own, others, bob):
    name = others["user"].username
    titled = create_conversation(user=bob, title=f"What {name} asked")
    found = staff.get(reverse("admin:conversations_conversation_changelist"), {"q": name}).context["cl"].result_list
    assert [row.pk for row in found] == [titled.pk]
    mine = staff.get(reverse("admin:conversations_conversation_changelist"), {"q": bob.username})
    assert {row.pk for row in mine.context["cl"].result_list} == {titled.pk, own["conversation"].pk}
