"""The daily totals in the admin: what its filters leave, added up."""

import pytest
from django.contrib.auth.models import Permission

from tests.voicehelper.analytics.conftest import DAY, completed, reply
from voicehelper.analytics import admin
from voicehelper.analytics.event_handlers import count

LIST = "/admin/analytics/dailytotal/"


@pytest.fixture
def site(client, alice, charlie):
    count(
        [
            reply(alice.tenant_id, cost=0.1, tokens=(10, 2), model="small"),
            reply(alice.tenant_id, cost=0.2, tokens=(10, 2), model="large", mode="voice"),
            completed(charlie.tenant_id),
        ]
    )
    client.force_login(alice)
    return client


def test_the_rows_chosen_are_added_up(site, charlie):
    answer = site.get(LIST)
    assert (answer.context["all_rows"], answer.context["all_figures"]["cost_dollars"]) == (3, "0.3")
    text = " ".join(answer.content.decode().split())
    assert "All of the 3 rows chosen: 0 conversations, 2 messages, 20 + 4 tokens, $0.3, success 1.0" in text
    assert site.get(LIST, {"model": "small"}).context["all_figures"]["cost_dollars"] == "0.1"
    assert site.get(LIST, {"mode": "voice"}).context["all_figures"]["cost_dollars"] == "0.2"
    assert site.get(LIST, {"q": str(charlie.tenant_id)}).context["all_figures"]["cost_dollars"] == "0"


def test_the_staff_of_a_tenant_has_its_own_added_up(site, alice):
    alice.is_superuser = False
    alice.save()
    alice.user_permissions.set(Permission.objects.filter(codename="view_dailytotal"))
    answer = site.get(LIST)
    assert (answer.context["all_rows"], answer.context["all_figures"]["completed"]) == (2, 0)


def test_too_many_rows_are_not_added_up(site, monkeypatch):
    monkeypatch.setattr(admin, "ADDED_ROWS", 2)
    answer = site.get(LIST)
    assert "all_figures" not in answer.context
    assert b"More than 2 rows are not added up" in answer.content
    assert site.get(LIST, {"day__year": DAY.year, "model": "small"}).context["all_rows"] == 1
