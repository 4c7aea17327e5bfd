import json
from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from voicehelper.identity.models import ApiToken, Tenant, User


def create_demo(capsys, *options: str) -> str:
    call_command("create_demo", *options)
    return capsys.readouterr().out


def test_it_makes_people_who_can_log_in(db, capsys, client):
    demo = json.loads(create_demo(capsys, "--json"))

    assert demo["tenant"] == "Demo"
    assert [(u["username"], u["tenant"], u["role"]) for u in demo["users"]] == [
        ("alice", "Demo", "admin"),
        ("bob", "Demo", "member"),
        ("charlie", "Other", "admin"),
    ]
    for user in demo["users"]:
        assert user["token"].startswith("vh_")
        answer = client.get("/api/v1/auth/me", headers={"Authorization": f"Token {user['token']}"})
        assert answer.json()["username"] == user["username"]
    alice = demo["users"][0]
    assert client.login(username=alice["username"], password=alice["password"])
    assert client.get("/admin/").status_code == 200


@pytest.fixture
def known(tmp_path):
    """The file that `make up` keeps the logins in."""
    return tmp_path / "demo.json"


def test_a_second_run_that_knows_the_first_changes_nothing(db, capsys, emitted, known):
    first = create_demo(capsys, "--json", f"--known={known}")
    known.write_text(first)
    assert create_demo(capsys, "--json", f"--known={known}") == first

    assert Tenant.objects.count() == len(emitted("identity.tenant.created")) == 2
    assert User.objects.count() == len(emitted("identity.user.created")) == 3
    assert ApiToken.objects.count() == len(emitted("identity.token.created")) == 3


def test_a_second_run_that_knows_nothing_shows_new_tokens_and_the_old_ones_work(db, capsys, client):
    runs = [json.loads(create_demo(capsys, "--json")) for _ in range(2)]
    texts = {user["token"] for demo in runs for user in demo["users"]}
    assert len(texts) == 6
    for text in texts:
        assert client.get("/api/v1/auth/me", headers={"Authorization": f"Token {text}"}).status_code == 200
    for _ in range(12):
        create_demo(capsys)
    assert ApiToken.objects.valid().count() == 30


@pytest.mark.parametrize(
    "end",
    [
        lambda tokens: tokens.update(revoked_at=timezone.now()),
        lambda tokens: tokens.update(expires_at=timezone.now() + timedelta(hours=23)),
        lambda tokens: tokens.update(user=User.objects.get(username="alice")),
        lambda tokens: tokens.delete(),
    ],
    ids=["revoked", "expires soon", "another's", "gone"],
)
def test_a_known_token_that_is_no_good_is_replaced(db, capsys, known, end):
    known.write_text(create_demo(capsys, "--json"))
    first = json.loads(known.read_text())
    end(ApiToken.objects.filter(user__username="bob"))
    second = json.loads(create_demo(capsys, "--json", f"--known={known}"))

    assert second["users"][0] == first["users"][0]
    assert second["users"][1]["token"] != first["users"][1]["token"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"users": 1}', '{"users": [{"username": "bob"}]}', '{"users": [1]}'])
def test_a_file_that_is_no_demo_is_as_good_as_none(db, capsys, known, text):
    known.write_text(text)
    assert len(json.loads(create_demo(capsys, "--json", f"--known={known}"))["users"]) == 3


def test_a_missing_person_is_made_again(db, capsys, known):
    known.write_text(create_demo(capsys, "--json"))
    first = json.loads(known.read_text())
    User.objects.get(username="bob").delete()
    second = json.loads(create_demo(capsys, "--json", f"--known={known}"))

    assert second["users"][0] == first["users"][0]
    assert second["users"][1]["token"] != first["users"][1]["token"]


def test_a_person_who_was_deactivated_is_shown_without_a_token(db, capsys):
    create_demo(capsys)
    User.objects.filter(username="bob").update(is_active=False)
    assert json.loads(create_demo(capsys, "--json"))["users"][1]["token"] == ""


def test_people_read_lines(db, capsys):
    lines = create_demo(capsys).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("alice / demo-password (admin of Demo)  Authorization: Token ")


def test_it_refuses_to_run_outside_development(db, settings):
    settings.IS_DEV = False
    with pytest.raises(CommandError, match="development only"):
        call_command("create_demo")
    assert not User.objects.exists()
