import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Group
from django.utils import timezone

from events_outbox.models import OperatorAction
from tests.voicehelper.conftest import PASSWORD
from voicehelper.console.roles import create_roles
from voicehelper.identity.models import ApiToken, Tenant, User
from voicehelper.identity.services import register_user


@pytest.fixture
def site(client, alice):
    client.force_login(alice)
    return client


def test_a_new_tenant_is_emitted(site, alice, emitted):
    answer = site.post("/admin/identity/tenant/add/", {"name": "Third"})

    assert answer.status_code == 302
    event = emitted("identity.tenant.created")[-1]
    assert event.aggregate_id == str(Tenant.objects.get(name="Third").id)
    assert event.user_id == str(alice.id)


def test_a_renamed_tenant_is_not_a_new_one(site, tenant, emitted):
    answer = site.post(f"/admin/identity/tenant/{tenant.id}/change/", {"name": "Renamed"})

    assert answer.status_code == 302
    assert Tenant.objects.get().name == "Renamed"
    assert len(emitted("identity.tenant.created")) == 1


def test_a_new_user_is_emitted(site, alice, tenant, emitted):
    new = {
        "tenant": str(tenant.id),
        "role": "member",
        "username": "dora",
        "password1": PASSWORD,
        "password2": PASSWORD,
    }
    answer = site.post("/admin/identity/user/add/", new)

    dora = User.objects.get(username="dora")
    assert answer.status_code == 302
    assert str(dora.id) in answer["Location"]
    assert dora.check_password(PASSWORD)
    event = emitted("identity.user.created")[-1]
    assert (event.aggregate_id, event.user_id) == (str(dora.id), str(alice.id))


def test_a_new_user_needs_a_tenant(site):
    new = {"role": "member", "username": "dora", "password1": PASSWORD, "password2": PASSWORD}
    answer = site.post("/admin/identity/user/add/", new)

    assert answer.status_code == 200
    assert "tenant" in answer.context["adminform"].form.errors
    assert not User.objects.filter(username="dora").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"password1": "12345", "password2": "12345"},
        {"password1": "", "password2": "", "usable_password": "false"},
    ],
    ids=["weak", "none"],
)
def test_a_new_user_needs_a_good_password(site, tenant, change):
    new = {"tenant": str(tenant.id), "role": "member", "username": "dora", **change}
    answer = site.post("/admin/identity/user/add/", new)

    assert answer.status_code == 200
    assert answer.context["adminform"].form.errors
    assert not User.objects.filter(username="dora").exists()


def change(site, user, **changed):
    """Send the form of a user, as it stands but for what is changed; None: left out, as a box without its tick."""
    url = f"/admin/identity/user/{user.id}/change/"
    fields = site.get(url).context["adminform"].form.initial
    form = {
        "username": user.username,
        "role": user.role,
        "is_active": "on" if user.is_active else None,
        "is_staff": "on" if user.is_staff else None,
        "is_superuser": "on" if user.is_superuser else None,
        "date_joined_0": fields["date_joined"].date().isoformat(),
        "date_joined_1": fields["date_joined"].time().isoformat(),
        **changed,
    }
    return site.post(url, {name: value for name, value in form.items() if value is not None}, follow=False)


def test_a_user_can_be_changed(site, alice, bob, emitted):
    answer = change(site, bob, role="admin")

    assert answer.status_code == 302
    bob.refresh_from_db()
    assert bob.role == "admin"
    assert len(emitted("identity.user.created")) == 2
    [event] = emitted("identity.user.role.changed")
    assert (event.aggregate_id, event.user_id) == (str(bob.id), str(alice.id))


def test_a_user_deactivated_in_the_admin_loses_the_tokens(site, alice, bob, emitted):
    token = ApiToken.objects.issue(user=bob, name="laptop").token
    assert change(site, bob, is_active=None, first_name="Bob").status_code == 302
    bob.refresh_from_db()
    assert (bob.is_active, bob.first_name) == (False, "Bob")
    [event] = emitted("identity.user.deactivated")
    assert (event.aggregate_id, event.user_id) == (str(bob.id), str(alice.id))
    assert emitted("identity.token.revoked")[0].payload.token_id == str(token.id)

    assert change(site, bob, is_active="on", role="admin").status_code == 302
    bob.refresh_from_db()
    assert (bob.is_active, bob.role) == (True, "admin")


@pytest.mark.parametrize("changed", [{"role": "member"}, {"is_active": None}])
def test_the_last_admin_stays_one_in_the_admin_too(site, alice, emitted, changed):
    answer = change(site, alice, first_name="Alice", **changed)
    assert answer.status_code == 302
    shown = site.get(answer["Location"])
    assert "The tenant has no other admin. Nothing was changed." in shown.content.decode()
    alice.refresh_from_db()
    assert (alice.role, alice.is_active, alice.first_name) == ("admin", True, "")
    assert emitted("identity.user.role.changed", "identity.user.deactivated") == []


def test_a_user_stays_in_the_tenant(site, bob, charlie):
    assert change(site, bob, tenant=str(charlie.tenant_id)).status_code == 302
    tenant_id = bob.tenant_id
    bob.refresh_from_db()
    assert bob.tenant_id == tenant_id


def test_an_operator_is_no_tenant_s_business(site, tenant, emitted):
    operator = User.objects.create_user("olga", password=PASSWORD, is_staff=True)
    assert change(site, operator, is_active=None, role="admin").status_code == 302
    operator.refresh_from_db()
    assert (operator.is_active, operator.role) == (False, "admin")
    assert change(site, operator, is_active="on", tenant=str(tenant.id)).status_code == 302
    operator.refresh_from_db()
    assert (operator.is_active, operator.tenant) == (True, tenant)
    assert emitted("identity.user.role.changed", "identity.user.deactivated") == []


TOKENS = "/admin/identity/apitoken/"


def revoke(client, *chosen, **fields):
    return client.post(TOKENS, {"action": "revoke", "_selected_action": [token.pk for token in chosen], **fields})


@pytest.fixture
def laptop(bob):
    return ApiToken.objects.issue(user=bob, name="laptop").token


def test_tokens_are_revoked_when_that_is_confirmed_with_a_reason(site, alice, bob, laptop, emitted):
    phone = ApiToken.objects.issue(user=bob, name="phone").token
    for fields in ({}, {"confirmed": "yes"}, {"confirmed": "yes", "reason": " "}):
        page = revoke(site, laptop, phone, **fields)
        assert page.status_code == 200
        assert laptop.prefix in page.content.decode() and laptop.secret_hash not in page.content.decode()
        assert ApiToken.objects.valid().count() == 2

    assert revoke(site, laptop, confirmed="yes", reason="stolen").status_code == 302
    laptop.refresh_from_db()
    assert laptop.state == "revoked"
    assert ApiToken.objects.valid().get() == phone
    [event] = emitted("identity.token.revoked")
    assert (event.aggregate_id, event.user_id, event.payload.reason) == (str(bob.id), str(alice.id), "stolen")
    [noted] = OperatorAction.objects.all()
    assert (noted.action, noted.subject, noted.by, noted.reason) == ("token.revoked", str(laptop.id), "alice", "stolen")
    assert LogEntry.objects.get(object_id=str(laptop.id)).change_message == "Revoked: stolen"

    assert revoke(site, laptop, confirmed="yes", reason="again").status_code == 302
    assert len(emitted("identity.token.revoked")) == OperatorAction.objects.count() == 1


def test_a_token_s_page_has_the_action_until_it_is_revoked(site, laptop):
    page = f"{TOKENS}{laptop.id}/change/"
    assert f"{TOKENS}{laptop.id}/act/revoke/" in site.get(page).content.decode()
    answer = site.post(f"{TOKENS}{laptop.id}/act/revoke/", {"confirmed": "yes", "reason": "stolen"})
    assert answer["Location"] == page
    assert f"{TOKENS}{laptop.id}/act/revoke/" not in site.get(page).content.decode()


@pytest.mark.parametrize("role", ["Viewer", "Operator", "Admin"])
def test_admins_alone_revoke(client, laptop, role):
    create_roles()
    user = User.objects.create_user("olga", password=PASSWORD, is_staff=True)
    user.groups.set(Group.objects.filter(name=role))
    client.force_login(user)
    answer = revoke(client, laptop, confirmed="yes", reason="stolen")
    assert answer.status_code == (302 if role == "Admin" else 403)
    laptop.refresh_from_db()
    assert laptop.state == ("revoked" if role == "Admin" else "valid")


def test_a_tenant_s_staff_revokes_its_own_alone(client, laptop, charlie):
    theirs = ApiToken.objects.issue(user=charlie, name="phone").token
    create_roles()
    staff = register_user(tenant=laptop.user.tenant, username="eve", password=PASSWORD)
    User.objects.filter(id=staff.id).update(is_staff=True)
    staff.groups.set(Group.objects.filter(name="Admin"))
    client.force_login(staff)
    revoke(client, laptop, theirs, confirmed="yes", reason="stolen")
    assert list(ApiToken.objects.valid()) == [theirs]


def test_tokens_are_found_by_state_and_by_what_they_begin_with(site, bob, laptop):
    over = ApiToken.objects.issue(user=bob, name="over", expires_at=timezone.now()).token
    revoked = ApiToken.objects.issue(user=bob, name="revoked").token
    ApiToken.objects.filter(id=revoked.id).update(revoked_at=timezone.now())

    def found(**query):
        return [token.name for token in site.get(TOKENS, query).context["cl"].result_list]

    assert found(state="valid") == ["laptop"]
    assert found(state="expired") == ["over"]
    assert found(state="revoked") == ["revoked"]
    assert found(q=over.prefix) == ["over"]
    assert found(q="lap") == ["laptop"]
    assert found(q="bob") == ["revoked", "over", "laptop"]
    for lookup in ("secret_hash", "secret_hash__startswith"):
        assert site.get(TOKENS, {lookup: laptop.secret_hash[:4]}).status_code == 400


def test_nobody_is_deleted(site, bob, tenant):
    assert site.post(f"/admin/identity/user/{bob.id}/delete/", {"post": "yes"}).status_code == 403
    assert site.post(f"/admin/identity/tenant/{tenant.id}/delete/", {"post": "yes"}).status_code == 403
    assert User.objects.filter(id=bob.id).exists()
