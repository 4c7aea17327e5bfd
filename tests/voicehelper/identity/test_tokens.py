"""API tokens: what is kept of them, what they open, and until when."""

import logging
from datetime import UTC, datetime, timedelta

import pytest
from django.core import serializers
from django.db import IntegrityError, connection, transaction
from django.utils import timezone
from rest_framework.test import APIClient
from uuid_utils.compat import uuid7

from tests.voicehelper.conftest import PASSWORD, assert_problem
from voicehelper.conversations.models import Conversation
from voicehelper.identity import services, tokens
from voicehelper.identity.models import ApiToken, Scope, User
from voicehelper.identity.services import (
    TokenNotValid,
    TooManyTokens,
    UserInactive,
    create_token,
    deactivate_user,
    log_in,
    revoke_token,
    rotate_token,
)

ME = "/api/v1/me"
TOKENS = "/api/v1/tokens"


def client_with(text: str, keyword: str = "Token") -> APIClient:
    client = APIClient(raise_request_exception=False)
    client.credentials(HTTP_AUTHORIZATION=f"{keyword} {text}")
    return client


def make(user: User, *scopes: str, **fields) -> ApiToken:
    return create_token(user=user, name="laptop", scopes=scopes or Scope.values, **fields).token


def at(moment: datetime, monkeypatch) -> None:
    """Have the clock of the application stand at a moment."""
    monkeypatch.setattr(timezone, "now", lambda: moment)


# -- what a token is


def test_a_token_names_itself_and_holds_256_random_bits(bob):
    token, text = create_token(user=bob, name="laptop", scopes=["read"])
    assert text.startswith(f"vh_{token.id.hex}_")
    assert token.prefix == f"vh_{token.id.hex}"
    secret = text.removeprefix(f"{token.prefix}_")
    assert len(secret) == 43  # 32 bytes in base 64
    assert token.secret_hash == tokens.hash_of(text) != tokens.hash_of(secret)
    assert ApiToken.objects.with_text(text) == token


def test_no_two_tokens_are_alike(bob):
    texts = {tokens.new_text(bob.id) for _ in range(1000)}
    assert len(texts) == 1000
    assert all(tokens.id_in(text) == bob.id for text in texts)


@pytest.mark.parametrize("text", ["", "vh_", "vh__", "vh_1_2", "nonsense", "g" * 40, "é" * 40, "a" * 10_000, "\0"])
def test_what_is_no_token_is_not_even_looked_up(db, text, django_assert_num_queries):
    with django_assert_num_queries(0):
        assert ApiToken.objects.with_text(text) is None


def test_the_right_id_does_not_do_without_the_secret(bob):
    token, text = create_token(user=bob, name="laptop", scopes=["read"])
    for wrong in (tokens.new_text(token.id), text[:-1] + ("A" if text[-1] != "A" else "B"), tokens.new_text(uuid7())):
        assert ApiToken.objects.with_text(wrong) is None
        assert_problem(client_with(wrong).get(ME), 401)


def test_the_secret_is_nowhere_but_in_the_answer(alice, api, emitted, client, caplog):
    caplog.set_level(logging.DEBUG)
    answer = api(alice).post(TOKENS, {"name": "laptop", "scopes": ["read"]}, format="json")
    assert answer["Cache-Control"] == "no-store"
    text = answer.json()["token"]
    secret = text.split("_", 2)[2]
    assert client_with(text).get(ME).status_code == 200
    assert_problem(client_with(text + "x").get(ME), 401)

    client.force_login(alice)
    token = ApiToken.objects.get(name="laptop")
    for page in ("", f"{token.id}/change/", "export/"):
        shown = client.get(f"/admin/identity/apitoken/{page}")
        assert shown.status_code == 200
        body = b"".join(shown) if shown.streaming else shown.content
        assert token.prefix in body.decode()
        assert secret not in body.decode() and token.secret_hash not in body.decode()
    listed = api(alice).get(TOKENS).content.decode()
    assert token.prefix in listed and secret not in listed and token.secret_hash not in listed

    assert secret not in serializers.serialize("json", ApiToken.objects.all())
    with connection.cursor() as cursor:
        for table in connection.introspection.table_names(cursor):
            cursor.execute(f'SELECT t::text FROM "{table}" t')
            assert not [row for (row,) in cursor.fetchall() if secret in row], table
    [event] = emitted("identity.token.created")
    assert secret.encode() not in event.payload.SerializeToString()
    lines = [str(record.__dict__) for record in caplog.records]
    assert lines and not [line for line in lines if secret in line]


# -- what opens


@pytest.mark.parametrize("keyword", ["Token", "Bearer", "token", "BEARER"])
def test_both_keywords_open(bob, keyword):
    text = create_token(user=bob, name="laptop", scopes=["read"]).text
    assert client_with(text, keyword).get(ME).json()["username"] == "bob"


@pytest.mark.parametrize("header", ["Token", "Bearer ", "Token a b", "Token \xe9", "Bearer \x7f", "Token  "])
def test_a_header_without_a_token_is_refused(db, header):
    client = APIClient(raise_request_exception=False)
    client.credentials(HTTP_AUTHORIZATION=header)
    answer = client.get(ME)
    assert_problem(answer, 401)
    assert answer["WWW-Authenticate"] == "Token"


def test_a_token_costs_one_look_up(bob, api, django_assert_num_queries):
    client = api(bob)
    with django_assert_num_queries(2):  # the token with its user, the tenant
        assert client.get(ME).status_code == 200


def test_its_use_is_noted_once_a_minute(bob, monkeypatch, django_assert_num_queries):
    token, text = create_token(user=bob, name="laptop", scopes=["read"])
    client, start = client_with(text), timezone.now()
    assert token.last_used_at is None
    for seconds, noted in ((1, 1), (30, 1), (60, 1), (62, 62), (100, 62), (130, 130)):
        at(start + timedelta(seconds=seconds), monkeypatch)
        with django_assert_num_queries(3 if seconds == noted else 2):
            assert client.get(ME).status_code == 200
        token.refresh_from_db()
        assert token.last_used_at == start + timedelta(seconds=noted)


def test_a_deactivated_user_opens_nothing(bob, api):
    client = api(bob)
    User.objects.filter(id=bob.id).update(is_active=False)
    assert assert_problem(client.get(ME), 401)["detail"] == "The user is deactivated."


# -- scopes


REQUESTS = [
    ("get", ME, "read"),
    ("get", "/api/v1/conversations", "read"),
    ("get", "/api/v1/tenant", "read"),
    ("get", "/api/v1/users", "read"),
    ("get", TOKENS, "read"),
    ("post", "/api/v1/conversations", "write"),
    ("post", "/api/v1/messages", "write"),
    ("post", f"/api/v1/notifications/{uuid7()}/read", "write"),
    ("post", "/api/v1/users", "admin"),
    ("patch", f"/api/v1/users/{uuid7()}", "admin"),
    ("post", TOKENS, "admin"),
    ("post", f"{TOKENS}/{uuid7()}/rotate", "admin"),
    ("delete", f"{TOKENS}/{uuid7()}", "admin"),
]


@pytest.mark.parametrize(("method", "path", "needed"), REQUESTS)
@pytest.mark.parametrize("scope", Scope.values)
def test_a_token_is_good_for_its_scopes_alone(alice, api, method, path, needed, scope):
    answer = getattr(api(alice, scope), method)(path, {}, format="json")
    if scope == needed:
        assert answer.status_code != 403, answer.content
    else:
        assert assert_problem(answer, 403)["detail"] == f"The token lacks the scope {needed}."


def test_no_scope_makes_an_admin_of_a_member(bob, api):
    answer = api(bob).post("/api/v1/users", {"username": "dora", "password": PASSWORD}, format="json")
    assert assert_problem(answer, 403)["detail"] == "Only an admin of the tenant may do this."
    assert not User.objects.filter(username="dora").exists()


def test_the_admin_site_s_session_is_limited_by_the_role_alone(alice, bob, client):
    client.force_login(bob)
    assert client.get("/api/v1/users").status_code == 200
    assert_problem(client.post("/api/v1/users", {}, content_type="application/json"), 403)


def test_beside_a_session_it_is_the_token_that_counts(alice, bob):
    browser = APIClient(enforce_csrf_checks=True, raise_request_exception=False)
    browser.force_login(alice)
    assert_problem(browser.post("/api/v1/conversations", {"title": "x"}, format="json"), 403)  # no CSRF token
    reader, writer = (create_token(user=bob, name="laptop", scopes=[scope]).text for scope in ("read", "write"))
    for token, status in ((reader, 403), (writer, 201), (reader[:-1], 401), ("", 401)):
        browser.credentials(HTTP_AUTHORIZATION=f"Token {token}")
        assert browser.post("/api/v1/conversations", {"title": "x"}, format="json").status_code == status
    assert Conversation.objects.get().user == bob


def test_no_page_of_another_origin_is_let_in(bob, api):
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for answer in (api(bob).options(ME, headers=asked), api(bob).get(ME, headers=asked)):
        assert not [name for name in answer.headers if name.startswith("Access-Control")]


@pytest.mark.parametrize("scopes", [[], ["root"], ["read", "root"]])
def test_the_database_knows_the_scopes(bob, scopes):
    token = make(bob)
    with pytest.raises(IntegrityError), transaction.atomic():
        ApiToken.objects.filter(id=token.id).update(scopes=scopes)


# -- making one


def test_a_token_is_made_and_the_fact_emitted(bob, api, emitted):
    until = datetime(2036, 1, 1, 12, tzinfo=UTC)
    body = {"name": "laptop", "scopes": ["write", "read", "write"], "expires_at": until.isoformat()}
    answer = api(bob).post(TOKENS, body, format="json")
    assert answer.status_code == 201
    made = answer.json()
    token = ApiToken.objects.get(name="laptop")
    assert (made["id"], made["user_id"], made["prefix"]) == (str(token.id), str(bob.id), token.prefix)
    assert (made["scopes"], made["state"], made["expires_at"]) == (["read", "write"], "valid", "2036-01-01T12:00:00Z")
    assert client_with(made["token"]).get(ME).json()["id"] == str(bob.id)

    [event] = emitted("identity.token.created")
    assert (event.aggregate_id, event.tenant_id, event.user_id) == (str(bob.id), str(bob.tenant_id), str(bob.id))
    assert (event.payload.token_id, event.payload.user_id) == (str(token.id), str(bob.id))
    assert (event.payload.name, list(event.payload.scopes)) == ("laptop", ["read", "write"])
    assert event.payload.expires_at.ToDatetime(UTC) == until


def test_a_token_that_does_not_expire(bob, emitted):
    token = make(bob, "read")
    assert token.expires_at is None
    assert not emitted("identity.token.created")[0].payload.HasField("expires_at")


NEW = {"name": "laptop", "scopes": ["read"]}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "x" * 101}, "name"),
        ({"name": "a\0b"}, "name"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["root"]}, "scopes"),
        ({"scopes": "read"}, "scopes"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
        ({"expires_at": "9999-12-31T23:59:59-12:00"}, "expires_at"),
        ({"expires_at": "tomorrow"}, "expires_at"),
    ],
)
def test_what_cannot_be_made(bob, api, change, field):
    problem = assert_problem(api(bob).post(TOKENS, NEW | change, format="json"), 400)
    assert list(problem["errors"]) == [field]


def test_a_user_has_only_so_many_valid_tokens(bob, api, monkeypatch):
    monkeypatch.setattr(services, "MAX_TOKENS", 3)
    client = api(bob)  # the first
    second, _ = make(bob), make(bob)
    with pytest.raises(TooManyTokens):
        make(bob)
    assert_problem(client.post(TOKENS, NEW, format="json"), 409)
    revoke_token(token=second, reason="", by=bob)
    assert client.post(TOKENS, NEW, format="json").status_code == 201


def test_logging_in_again_and_again_keeps_the_newest_tokens(bob, emitted):
    own = make(bob)
    logins = [log_in(user=bob) for _ in range(services.MAX_LOGIN_TOKENS + 2)]
    states = [ApiToken.objects.get(id=token.id).state for token, _ in logins]
    assert states == ["revoked"] * 2 + ["valid"] * services.MAX_LOGIN_TOKENS
    own.refresh_from_db()
    assert own.state == "valid"
    assert [event.payload.token_id for event in emitted("identity.token.revoked")] == [
        str(token.id) for token, _ in logins[:2]
    ]
    assert client_with(logins[0].text).get(ME).status_code == 401
    assert client_with(logins[-1].text).get(ME).status_code == 200


@pytest.mark.parametrize("by_login", [False, True])
def test_rotating_again_and_again_leaves_no_more_than_two_valid(bob, by_login, emitted):
    token = log_in(user=bob).token if by_login else make(bob)
    for _ in range(4):
        first, token = token, rotate_token(token=token, grace=timedelta(days=7), by=bob).token
    assert {valid.id for valid in bob.api_tokens.valid()} == {first.id, token.id}
    assert [event.payload.reason for event in emitted("identity.token.revoked")] == ["Its replacement was rotated."] * 3


@pytest.mark.parametrize("get_token", [make, lambda user: log_in(user=user)])
def test_what_is_over_for_long_is_forgotten(alice, bob, get_token, monkeypatch):
    now = timezone.now()
    revoked, expired, rotated, kept, hers = make(bob), make(bob), make(bob), make(bob), make(alice)
    revoke_token(token=revoked, reason="lost", by=bob)
    revoke_token(token=hers, reason="lost", by=bob)
    ApiToken.objects.filter(id=expired.id).update(expires_at=now)
    new = rotate_token(token=rotated, grace=timedelta(0), by=bob).token
    at(now + timedelta(days=89), monkeypatch)
    get_token(bob)
    assert bob.api_tokens.count() == 6
    at(now + timedelta(days=91), monkeypatch)
    get_token(bob)
    left = set(bob.api_tokens.values_list("id", flat=True))
    assert {kept.id, new.id} < left and not left & {revoked.id, expired.id, rotated.id}
    assert alice.api_tokens.count() == 1


def test_a_deactivated_user_gets_no_token(alice, bob):
    deactivate_user(user=bob, by=alice)
    with pytest.raises(UserInactive):
        make(bob)
    with pytest.raises(UserInactive):
        log_in(user=bob)


# -- until when


def test_a_token_expires(bob, monkeypatch):
    now = timezone.now()
    _, text = create_token(user=bob, name="laptop", scopes=["read"], expires_at=now + timedelta(hours=1))
    at(now + timedelta(minutes=59), monkeypatch)
    assert client_with(text).get(ME).status_code == 200
    at(now + timedelta(hours=1), monkeypatch)
    assert assert_problem(client_with(text).get(ME), 401)["detail"] == "The token is expired."


def test_a_revoked_token_is_refused_from_the_next_request_on(bob, api, emitted):
    token, text = create_token(user=bob, name="laptop", scopes=["read"])
    client = client_with(text)
    assert client.get(ME).status_code == 200
    assert api(bob).delete(f"{TOKENS}/{token.id}").status_code == 204
    assert assert_problem(client.get(ME), 401)["detail"] == "The token is revoked."

    [event] = emitted("identity.token.revoked")
    assert (event.aggregate_id, event.tenant_id, event.user_id) == (str(bob.id), str(bob.tenant_id), str(bob.id))
    assert (event.payload.token_id, event.payload.user_id) == (str(token.id), str(bob.id))
    assert event.payload.reason == "Its user revoked it."
    token.refresh_from_db()
    revoked_at = token.revoked_at
    assert api(bob).delete(f"{TOKENS}/{token.id}").status_code == 204
    token.refresh_from_db()
    assert token.revoked_at == revoked_at
    assert len(emitted("identity.token.revoked")) == 1


def test_an_admin_revokes_the_tokens_of_the_tenant(alice, bob, api, emitted):
    token, text = create_token(user=bob, name="laptop", scopes=["read"])
    assert api(alice).delete(f"{TOKENS}/{token.id}").status_code == 204
    assert_problem(client_with(text).get(ME), 401)
    [event] = emitted("identity.token.revoked")
    assert (event.aggregate_id, event.user_id) == (str(bob.id), str(alice.id))
    assert event.payload.reason == "An admin of the tenant revoked it."


def test_a_rotated_token_is_valid_for_the_grace_period(bob, api, emitted, monkeypatch):
    token, text = create_token(user=bob, name="laptop", scopes=["read", "write"])
    answer = api(bob).post(f"{TOKENS}/{token.id}/rotate", {"grace_seconds": 600}, format="json")
    assert answer.status_code == 201
    assert answer["Cache-Control"] == "no-store"
    new = answer.json()
    assert new["id"] != str(token.id) and new["token"] != text
    assert (new["name"], new["scopes"], new["expires_at"]) == ("laptop", ["read", "write"], None)
    token.refresh_from_db()
    assert str(token.replaced_by_id) == new["id"]

    start = timezone.now()
    for seconds, old_status in ((0, 200), (590, 200), (601, 401)):
        at(start + timedelta(seconds=seconds), monkeypatch)
        assert client_with(text).get(ME).status_code == old_status
        assert client_with(new["token"]).get(ME).status_code == 200

    [event] = emitted("identity.token.rotated")
    assert (event.aggregate_id, event.user_id) == (str(bob.id), str(bob.id))
    assert (event.payload.token_id, event.payload.replaced_by) == (str(token.id), new["id"])
    assert emitted("identity.token.created")[-1].payload.token_id == new["id"]


def test_without_a_grace_period_the_old_token_ends_at_once(bob):
    token, text = create_token(user=bob, name="laptop", scopes=["read"])
    rotate_token(token=token, grace=timedelta(0), by=bob)
    assert_problem(client_with(text).get(ME), 401)


def test_rotation_neither_extends_the_old_token_nor_shortens_the_new_one(bob, monkeypatch):
    now = timezone.now()
    token = make(bob, expires_at=now + timedelta(days=30))
    at(now + timedelta(days=29, hours=23), monkeypatch)
    new = rotate_token(token=token, grace=timedelta(days=1), by=bob).token
    token.refresh_from_db()
    assert token.expires_at == now + timedelta(days=30)
    assert abs(new.expires_at - (now + timedelta(days=59, hours=23))) < timedelta(minutes=1)


@pytest.mark.parametrize(
    ("end", "detail"),
    [
        (lambda token: revoke_token(token=token, reason=""), "The token is revoked."),
        (lambda token: ApiToken.objects.filter(id=token.id).update(expires_at=timezone.now()), "The token is expired."),
        (lambda token: rotate_token(token=token, grace=timedelta(days=1)), "The token was rotated before."),
    ],
    ids=["revoked", "expired", "rotated"],
)
def test_what_is_not_rotated(bob, api, end, detail):
    token = make(bob)
    end(token)
    before = ApiToken.objects.count()
    assert assert_problem(api(bob).post(f"{TOKENS}/{token.id}/rotate"), 409)["detail"] == detail
    with pytest.raises(TokenNotValid):
        rotate_token(token=token, grace=timedelta(0))
    assert ApiToken.objects.count() == before + 1  # that of the client


@pytest.mark.parametrize("grace", [-1, 604_801, "soon", None, 1.5])
def test_a_grace_period_that_cannot_be(bob, api, grace):
    token = make(bob)
    answer = api(bob).post(f"{TOKENS}/{token.id}/rotate", {"grace_seconds": grace}, format="json")
    assert list(assert_problem(answer, 400)["errors"]) == ["grace_seconds"]


# -- whose


def test_everybody_sees_their_own_and_admins_those_of_the_tenant(alice, bob, charlie, api):
    hers, his, theirs = make(alice), make(bob), make(charlie)

    def names(answer) -> set[str]:
        assert answer.status_code == 200, answer.content
        return {row["id"] for row in answer.json()["results"]} & {str(token.id) for token in (hers, his, theirs)}

    assert names(api(bob).get(TOKENS)) == {str(his.id)}
    assert names(api(alice).get(TOKENS)) == {str(hers.id), str(his.id)}
    assert names(api(alice).get(TOKENS, {"user_id": bob.id})) == {str(his.id)}
    assert names(api(alice).get(TOKENS, {"user_id": charlie.id})) == set()
    assert names(api(bob).get(TOKENS, {"user_id": alice.id})) == set()
    assert names(api(charlie).get(TOKENS)) == {str(theirs.id)}
    problem = assert_problem(api(alice).get(TOKENS, {"user_id": "bob"}), 400)
    assert list(problem["errors"]) == ["user_id"]


def test_nobody_rotates_or_revokes_what_is_not_theirs(alice, bob, charlie, api, emitted):
    hers, his = make(alice), make(bob)
    for client, token in ((api(charlie), hers), (api(charlie), his), (api(bob), hers)):
        assert_problem(client.delete(f"{TOKENS}/{token.id}"), 404)
        assert_problem(client.post(f"{TOKENS}/{token.id}/rotate"), 404)
    assert_problem(api(alice).post(f"{TOKENS}/{his.id}/rotate"), 404)  # she would be shown a key to his account
    assert emitted("identity.token.revoked", "identity.token.rotated") == []
    assert {ApiToken.objects.get(id=token.id).state for token in (hers, his)} == {"valid"}


def test_an_operator_of_no_tenant_gets_no_token(db):
    operator = User.objects.create_superuser("operator", password=PASSWORD)
    body = {"username": "operator", "password": PASSWORD}
    answer = APIClient(raise_request_exception=False).post("/api/v1/auth/token", body, format="json")
    assert assert_problem(answer, 403)["detail"] == "Your account belongs to no tenant."
    assert not operator.api_tokens.exists()
