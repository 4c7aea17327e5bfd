import pytest

from tests.voicehelper.conftest import PASSWORD
from voicehelper.identity.models import Tenant, User


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
    event = emitted("identity.user.registered")[-1]
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


def test_a_user_can_be_changed(site, bob, emitted):
    page = site.get(f"/admin/identity/user/{bob.id}/change/")
    fields = page.context["adminform"].form.initial
    changed = {
        "username": "bob",
        "tenant": str(bob.tenant_id),
        "role": "admin",
        "is_active": "on",
        "date_joined_0": fields["date_joined"].date().isoformat(),
        "date_joined_1": fields["date_joined"].time().isoformat(),
    }
    answer = site.post(f"/admin/identity/user/{bob.id}/change/", changed)

    assert answer.status_code == 302
    bob.refresh_from_db()
    assert bob.role == "admin"
    assert len(emitted("identity.user.registered")) == 2


def test_nobody_is_deleted(site, bob, tenant):
    assert site.post(f"/admin/identity/user/{bob.id}/delete/", {"post": "yes"}).status_code == 403
    assert site.post(f"/admin/identity/tenant/{tenant.id}/delete/", {"post": "yes"}).status_code == 403
    assert User.objects.filter(id=bob.id).exists()
