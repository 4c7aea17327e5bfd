"""The tenant's users over the API: who makes, changes and shuts out whom."""

import json

import pytest
from django.utils import timezone
from rest_framework.test import APIClient
from uuid_utils.compat import uuid7

from tests.voicehelper.conftest import PASSWORD, assert_problem
from voicehelper.identity.models import ApiToken, User
from voicehelper.identity.services import (
    LastAdmin,
    change_role,
    create_token,
    deactivate_user,
    register_user,
    revoke_token,
)

USERS = "/api/v1/users"
NEW = {"username": "dora", "password": PASSWORD}


def url(user: User) -> str:
    return f"{USERS}/{user.id}"


@pytest.fixture
def erin(tenant) -> User:
    """A second admin of alice's tenant, who is no operator."""
    return register_user(tenant=tenant, username="erin", password=PASSWORD, role=User.Role.ADMIN)


def test_me_and_my_tenant(bob, api):
    client = api(bob)
    assert client.get("/api/v1/me").json() == client.get("/api/v1/auth/me").json()
    answer = client.get("/api/v1/tenant").json()
    assert answer == {
        "id": str(bob.tenant_id),
        "name": "Demo",
        "created_at": bob.tenant.created_at.isoformat().replace("+00:00", "Z"),
    }


def test_a_tenant_s_users_see_each_other_and_nobody_else(alice, bob, charlie, api):
    for client in (api(alice), api(bob)):
        listed = client.get(USERS).json()["results"]
        assert [user["username"] for user in listed] == ["bob", "alice"]
        assert client.get(url(alice)).json() == listed[1]
        assert_problem(client.get(url(charlie)), 404)
    assert listed[0] == {
        "id": str(bob.id),
        "username": "bob",
        "email": "",
        "role": "member",
        "is_active": True,
        "created_at": bob.date_joined.isoformat().replace("+00:00", "Z"),
    }


def test_an_admin_creates_a_user(alice, api, emitted):
    body = {**NEW, "email": "dora@example.com", "role": "admin"}
    answer = api(alice).post(USERS, body, format="json")
    assert answer.status_code == 201
    dora = User.objects.get(username="dora")
    assert answer.json()["id"] == str(dora.id)
    assert "password" not in answer.json()
    assert (dora.tenant_id, dora.role, dora.email) == (alice.tenant_id, "admin", "dora@example.com")
    assert not dora.is_staff and not dora.is_superuser
    assert dora.check_password(PASSWORD)
    event = emitted("identity.user.created")[-1]
    assert (event.aggregate_id, event.tenant_id, event.user_id) == (
        str(dora.id),
        str(alice.tenant_id),
        str(alice.id),
    )
    assert (event.payload.username, event.payload.role) == ("dora", "admin")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"username": "bob"}, "username"),
        ({"username": "charlie"}, "username"),
        ({"username": "with space"}, "username"),
        ({"username": ""}, "username"),
        ({"username": "x" * 151}, "username"),
        ({"username": "ﷺ" * 20}, "username"),  # longer, and of other characters, once it is normalised
        ({"username": "do\0ra"}, "username"),
        ({"username": "do\ud800ra"}, "username"),
        ({"password": "12345"}, "password"),
        ({"password": "dora-dora"}, "password"),
        ({"password": "a\0b"}, "password"),
        ({"email": "dora"}, "email"),
        ({"role": "owner"}, "role"),
    ],
)
def test_who_cannot_be_created(alice, bob, charlie, api, emitted, change, field):
    before = User.objects.count()
    body = {**NEW, **change}
    if field == "password" and change["password"] == "dora-dora":
        body["username"] = "dora-dora"
    answer = api(alice).post(USERS, json.dumps(body), content_type="application/json")
    assert list(assert_problem(answer, 400)["errors"]) == [field]
    assert User.objects.count() == len(emitted("identity.user.created")) == before


def test_a_username_is_stored_as_it_is_compared(alice, api):
    assert api(alice).post(USERS, {**NEW, "username": "ﬁona"}, format="json").json()["username"] == "fiona"
    assert_problem(api(alice).post(USERS, {**NEW, "username": "fiona"}, format="json"), 400)


def test_an_admin_changes_a_role(alice, bob, api, emitted):
    answer = api(alice).patch(url(bob), {"role": "admin"}, format="json")
    assert (answer.status_code, answer.json()["role"]) == (200, "admin")
    [event] = emitted("identity.user.role.changed")
    assert (event.aggregate_id, event.tenant_id, event.user_id) == (
        str(bob.id),
        str(bob.tenant_id),
        str(alice.id),
    )
    assert (event.payload.user_id, event.payload.old_role, event.payload.new_role) == (str(bob.id), "member", "admin")
    assert api(alice).patch(url(bob), {"role": "admin"}, format="json").status_code == 200
    assert len(emitted("identity.user.role.changed")) == 1


def test_a_role_counts_from_the_next_request_on(alice, erin, api):
    client = api(erin)
    change_role(user=erin, role="member", by=alice)
    assert_problem(client.post(USERS, NEW, format="json"), 403)


def test_to_deactivate_a_user_revokes_the_tokens(alice, bob, api, emitted):
    texts = [create_token(user=bob, name=name, scopes=["read"]) for name in ("laptop", "phone")]
    gone = create_token(user=bob, name="gone", scopes=["read"]).token
    revoke_token(token=gone, reason="lost", by=bob)
    ApiToken.objects.filter(name="phone").update(expires_at=timezone.now())
    client = APIClient(raise_request_exception=False)
    client.credentials(HTTP_AUTHORIZATION=f"Token {texts[0].text}")
    answer = api(alice).patch(url(bob), {"is_active": False}, format="json")
    assert (answer.status_code, answer.json()["is_active"]) == (200, False)

    assert_problem(client.get("/api/v1/me"), 401)
    [event] = emitted("identity.user.deactivated")
    assert (event.aggregate_id, event.payload.user_id, event.user_id) == (str(bob.id), str(bob.id), str(alice.id))
    assert not ApiToken.objects.valid().filter(user=bob).exists()
    lost, revoked = emitted("identity.token.revoked")  # an expired one needs no revoking
    assert (lost.payload.token_id, revoked.payload.token_id) == (str(gone.id), str(texts[0].token.id))
    assert (revoked.aggregate_id, revoked.payload.reason) == (str(bob.id), "The user was deactivated.")

    assert api(alice).patch(url(bob), {"is_active": False}, format="json").status_code == 200
    assert len(emitted("identity.user.deactivated")) == 1


def test_a_deactivated_user_stays_so(alice, erin, api):
    deactivate_user(user=erin, by=alice)
    client = api(alice)
    assert_problem(client.patch(url(erin), {"is_active": True, "role": "member"}, format="json"), 409)
    erin.refresh_from_db()
    assert (erin.is_active, erin.role) == (False, "admin")
    assert client.patch(url(erin), {"role": "member"}, format="json").json()["role"] == "member"


@pytest.mark.parametrize("change", [{"role": "member"}, {"is_active": False}, {"role": "member", "is_active": False}])
def test_the_last_admin_stays_one(alice, bob, erin, charlie, api, emitted, change):
    deactivate_user(user=erin, by=alice)  # an admin who is not active is none
    client = api(alice)
    answer = client.patch(url(alice), change, format="json")
    assert assert_problem(answer, 409)["detail"] == "The tenant has no other admin."
    alice.refresh_from_db()
    assert (alice.role, alice.is_active) == ("admin", True)
    assert emitted("identity.user.role.changed") == []
    assert len(emitted("identity.user.deactivated")) == 1
    assert client.get("/api/v1/me").status_code == 200

    change_role(user=bob, role="admin", by=alice)
    assert client.patch(url(alice), change, format="json").status_code == 200


def test_a_change_that_is_refused_in_part_is_refused_as_a_whole(alice, bob, erin, api, emitted, monkeypatch):
    def refuse(**_):
        raise LastAdmin("no")

    monkeypatch.setattr("voicehelper.identity.views.deactivate_user", refuse)
    assert_problem(api(alice).patch(url(bob), {"role": "admin", "is_active": False}, format="json"), 409)
    bob.refresh_from_db()
    assert bob.role == "member"
    assert emitted("identity.user.role.changed") == []


def test_an_operator_s_account_is_not_the_tenant_s_to_change(alice, erin, api):
    for change in ({"is_active": False}, {"role": "member"}):
        assert_problem(api(erin).patch(url(alice), change, format="json"), 403)
    alice.refresh_from_db()
    assert (alice.is_active, alice.role) == (True, "admin")


@pytest.mark.parametrize("change", [{"role": "owner"}, {"is_active": "maybe"}, {"role": None}, []])
def test_a_change_that_makes_no_sense(alice, bob, api, change):
    assert_problem(api(alice).patch(url(bob), change, format="json"), 400)


def test_members_change_nobody(alice, bob, api):
    for user in (alice, bob):
        assert_problem(api(bob).patch(url(user), {"role": "admin"}, format="json"), 403)
        assert_problem(api(bob).patch(url(user), {"is_active": False}, format="json"), 403)
    bob.refresh_from_db()
    assert (bob.role, bob.is_active) == ("member", True)


def test_another_tenant_s_users_do_not_exist(bob, charlie, api, emitted):
    for change in ({"role": "admin"}, {"is_active": False}):
        theirs = assert_problem(api(charlie).patch(url(bob), change, format="json"), 404)
        nobody = assert_problem(api(charlie).patch(f"{USERS}/{uuid7()}", change, format="json"), 404)
        assert theirs["detail"] == nobody["detail"]
    assert [user["username"] for user in api(charlie).get(USERS).json()["results"]] == ["charlie"]
    assert emitted("identity.user.role.changed", "identity.user.deactivated") == []
