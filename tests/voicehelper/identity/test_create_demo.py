import json

import pytest
from django.core.management import CommandError, call_command

from voicehelper.identity.models import Tenant, User


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
        answer = client.get("/api/v1/auth/me", headers={"Authorization": f"Token {user['token']}"})
        assert answer.json()["username"] == user["username"]
    alice = demo["users"][0]
    assert client.login(username=alice["username"], password=alice["password"])
    assert client.get("/admin/").status_code == 200


def test_a_second_run_changes_nothing(db, capsys, emitted):
    first = create_demo(capsys, "--json")
    assert create_demo(capsys, "--json") == first

    assert Tenant.objects.count() == len(emitted("identity.tenant.created")) == 2
    assert User.objects.count() == len(emitted("identity.user.registered")) == 3


def test_a_missing_person_is_made_again(db, capsys):
    first = json.loads(create_demo(capsys, "--json"))
    User.objects.get(username="bob").delete()
    second = json.loads(create_demo(capsys, "--json"))

    assert second["users"][0] == first["users"][0]
    assert second["users"][1]["token"] != first["users"][1]["token"]


def test_people_read_lines(db, capsys):
    lines = create_demo(capsys).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("alice / demo-password (admin of Demo)  Authorization: Token ")


def test_it_refuses_to_run_outside_development(db, settings):
    settings.IS_DEV = False
    with pytest.raises(CommandError, match="development only"):
        call_command("create_demo")
    assert not User.objects.exists()
