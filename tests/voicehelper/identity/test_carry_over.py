"""Tokens of rest_framework.authtoken, which kept them in plain text, go on working after the upgrade."""

from datetime import UTC, datetime
from importlib import import_module
from uuid import RFC_4122

import pytest
from django.apps import apps
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.contenttypes.models import ContentType
from django.db import connection
from django.db.migrations.recorder import MigrationRecorder
from rest_framework.test import APIClient

from tests.voicehelper.conftest import assert_problem
from voicehelper.identity.models import ApiToken

KEY = "9944b09199c62bcf9418ad846dd0e4bbdfc6ee4b"
migration = import_module("voicehelper.identity.migrations.0003_carry_over_tokens")


def tables() -> list[str]:
    with connection.cursor() as cursor:
        return connection.introspection.table_names(cursor)


def run(function) -> None:
    with connection.schema_editor() as editor:
        function(apps, editor)


@pytest.fixture
def before(bob, alice):
    """The database of the version before: bob has a token, and alice's deed about it is in the admin's log."""
    MigrationRecorder(connection).record_applied("authtoken", "0001_initial")
    run(migration.bring_back_the_table)
    created = datetime(2025, 3, 1, 13, 30, 54, 397_520, tzinfo=UTC)
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO authtoken_token (key, user_id, created) VALUES (%s, %s, %s)", [KEY, bob.id, created]
        )
        # As if that transaction were over: a table that it has still to check is not dropped.
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
        cursor.execute("SET CONSTRAINTS ALL DEFERRED")
    content_type = ContentType.objects.create(app_label="authtoken", model="tokenproxy")
    LogEntry.objects.create(
        user=alice, content_type=content_type, object_id=str(bob.id), object_repr=KEY, action_flag=CHANGE
    )
    LogEntry.objects.create(
        user=alice,
        content_type=ContentType.objects.get_for_model(type(bob)),
        object_id=str(bob.id),
        object_repr="a long name of a user",
        action_flag=CHANGE,
    )
    return created


def test_an_old_token_goes_on_working(bob, before):
    run(migration.carry_over)
    client = APIClient(raise_request_exception=False)
    client.credentials(HTTP_AUTHORIZATION=f"Token {KEY}")
    assert client.get("/api/v1/me").json()["username"] == "bob"
    assert client.post("/api/v1/conversations", {"title": "Hello"}, format="json").status_code == 201

    token = ApiToken.objects.get()
    assert (token.user, token.created_at, token.expires_at) == (bob, before, None)
    assert (token.prefix, token.scopes, token.state) == (KEY[:8], ["read", "write", "admin"], "valid")
    assert token.last_used_at is not None
    assert (token.id.version, token.id.variant) == (7, RFC_4122)
    assert token.id.int >> 80 == int(before.timestamp() * 1000)  # in the order in which they were made
    client.delete(f"/api/v1/tokens/{token.id}")
    assert_problem(client.get("/api/v1/me"), 401)


@pytest.mark.parametrize("wrong", [KEY.upper(), KEY[:-1], KEY[:-1] + "0", KEY + "0"])
def test_nothing_like_it_works(before, wrong):
    run(migration.carry_over)
    client = APIClient(raise_request_exception=False)
    client.credentials(HTTP_AUTHORIZATION=f"Token {wrong}")
    assert_problem(client.get("/api/v1/me"), 401)


def test_its_plain_text_is_gone(before):
    run(migration.carry_over)
    assert "authtoken_token" not in tables()
    with connection.cursor() as cursor:
        for table in tables():
            cursor.execute(f'SELECT t::text FROM "{table}" t')
            assert not [row for (row,) in cursor.fetchall() if KEY in row], table
    assert sorted(LogEntry.objects.values_list("object_repr", flat=True)) == [KEY[:8], "a long name of a user"]


def test_a_new_database_has_nothing_to_carry_over(db):
    assert "authtoken_token" not in tables()
    run(migration.carry_over)
    assert not ApiToken.objects.exists()
    run(migration.bring_back_the_table)
    assert "authtoken_token" not in tables()


def test_the_way_back_leaves_the_table_for_the_version_before(before):
    run(migration.carry_over)
    run(migration.bring_back_the_table)
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM authtoken_token")
        assert cursor.fetchone() == (0,)
