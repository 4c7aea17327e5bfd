import json
import uuid

import pytest

from tests.voicehelper.conftest import assert_problem
from tests.voicehelper.notifications.conftest import deliver, document_failed, document_indexed, happened
from tests.voicehelper.notifications.servers import is_signed
from voicehelper.notifications.models import Delivery, WebhookEndpoint
from voicehelper.notifications.services import create_webhook
from voicehelper.proto.analytics_pb2 import BudgetExceededPayload

WEBHOOKS = "/api/v1/webhooks"


def test_the_secret_is_shown_once(api, alice):
    answer = api(alice).post(WEBHOOKS, {"url": "https://example.com/hook", "kinds": ["document.failed"]}, format="json")
    assert answer.status_code == 201
    created = answer.json()
    assert created["secret"].startswith("whsec_")
    shown = api(alice).get(f"{WEBHOOKS}/{created['id']}").json()
    assert shown == {name: value for name, value in created.items() if name != "secret"}
    assert api(alice).get(WEBHOOKS).json()["results"] == [shown]
    assert set(shown) == {"id", "url", "description", "kinds", "active", "failures", "created_at"}
    assert (shown["kinds"], shown["active"], shown["failures"]) == (["document.failed"], True, 0)


def test_the_secret_is_not_in_the_database(api, alice):
    secret = api(alice).post(WEBHOOKS, {"url": "https://example.com/"}, format="json").json()["secret"]
    row = WebhookEndpoint.objects.values().get()
    assert secret.removeprefix("whsec_") not in str(row)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"url": ""},
        {"url": "no url"},
        {"url": "https://example.com/" + "x" * 500},
        {"url": "https://example.com/\ud800"},
        {"url": 5},
        {"url": "https://example.com", "kinds": ["all"]},
        {"url": "https://example.com", "kinds": "document.failed"},
        {"url": "https://example.com", "description": "x" * 201},
        {"url": "https://example.com", "description": "\x00"},
        [],
    ],
)
def test_what_is_no_webhook(api, alice, body):
    answer = api(alice).post(WEBHOOKS, json.dumps(body), content_type="application/json")
    assert_problem(answer, 400)
    assert not WebhookEndpoint.objects.exists()


def test_outside_development_it_is_https_and_public(api, alice, settings):
    settings.IS_DEV = False
    for url in ("http://example.com/", "https://127.0.0.1/", "https://[::1]/", "https://169.254.169.254/latest/"):
        assert "url" in assert_problem(api(alice).post(WEBHOOKS, {"url": url}, format="json"), 400)["errors"]


def test_a_tenant_has_so_many_at_most(api, alice, charlie, monkeypatch):
    monkeypatch.setattr(WebhookEndpoint, "MOST_OF_A_TENANT", 2)
    create_webhook(by=charlie, url="https://example.com/")
    first, second = (api(alice).post(WEBHOOKS, {"url": "https://example.com/"}, format="json") for _ in range(2))
    assert first.status_code == second.status_code == 201
    assert_problem(api(alice).post(WEBHOOKS, {"url": "https://example.com/"}, format="json"), 409)
    api(alice).delete(f"{WEBHOOKS}/{first.json()['id']}")
    assert api(alice).post(WEBHOOKS, {"url": "https://example.com/"}, format="json").status_code == 201


def test_it_is_told_of_the_kinds_it_names_and_by_default_of_all(alice, bob, webhook, receiver):
    create_webhook(by=alice, url=receiver.url, kinds=["document.indexed"])
    document_failed(bob)
    document_indexed(bob)
    assert deliver() == 5  # two of them e-mails
    assert sorted(data["type"] for data in receiver.data) == ["document.failed", "document.indexed", "document.indexed"]


def test_what_it_is_told(api, alice, bob, receiver):
    created = api(alice).post(WEBHOOKS, {"url": receiver.url}, format="json").json()
    event = document_failed(bob, title="Grüße <b>")
    deliver()
    [(headers, body)], [data] = receiver.requests, receiver.data
    assert is_signed(created["secret"], headers, body)
    assert data["type"] == "document.failed"
    assert data["data"]["event_id"] == str(event.event_id)
    assert data["data"]["tenant_id"] == str(alice.tenant_id)
    assert (data["data"]["title"], data["data"]["error"]) == ("Grüße <b>", "It is no PDF.")
    assert data["data"]["subject"] == "Document could not be read: Grüße <b>"


@pytest.mark.parametrize(("value", "shown"), [(1234.5, "$1,234.50"), (float("nan"), "unknown")])
def test_figures_are_numbers_and_it_is_json_whatever_they_are(alice, webhook, receiver, value, shown):
    payload = BudgetExceededPayload(day="2026-01-31", measure="cost_dollars", value=value, average=100, limit=300)
    happened("analytics.budget.exceeded", payload, tenant=alice.tenant)
    deliver()
    [(_, body)] = receiver.requests
    data = json.loads(body, parse_constant=pytest.fail)["data"]
    assert data["value"] == (None if value != value else value) and data["value_text"] == shown
    assert (data["average"], data["limit"], data["day"]) == (100, 300, "2026-01-31")


def test_switched_off_and_on(api, alice, bob, webhook, receiver):
    url = f"{WEBHOOKS}/{webhook.id}"
    assert api(alice).patch(url, {"active": False, "description": "ours"}, format="json").json()["active"] is False
    document_failed(bob)
    assert not Delivery.objects.filter(channel="webhook").exists()
    WebhookEndpoint.objects.update(failures=7)
    changed = api(alice).patch(url, {"active": True, "kinds": ["document.indexed"]}, format="json").json()
    assert (changed["active"], changed["failures"], changed["description"]) == (True, 0, "ours")
    document_failed(bob)
    document_indexed(bob)
    deliver()
    assert [data["type"] for data in receiver.data] == ["document.indexed"]
    assert_problem(api(alice).patch(url, {"active": "perhaps"}, format="json"), 400)
    assert api(alice).patch(url, {"url": "https://example.com/"}, format="json").json()["url"] == receiver.url


def test_what_was_on_its_way_to_a_deleted_one_is_not_sent(api, alice, bob, webhook, receiver, emitted):
    document_failed(bob)
    assert api(alice).delete(f"{WEBHOOKS}/{webhook.id}").status_code == 204
    deliver()
    assert receiver.requests == []
    waiting = Delivery.objects.get(channel="webhook")
    assert (waiting.state, waiting.last_error) == ("failed", "The webhook is switched off or deleted.")
    assert [event.payload.error for event in emitted("notification.failed")] == [waiting.last_error]
    assert api(alice).get(WEBHOOKS).json()["results"] == []
    assert_problem(api(alice).get(f"{WEBHOOKS}/{webhook.id}"), 404)
    assert_problem(api(alice).delete(f"{WEBHOOKS}/{webhook.id}"), 404)


def test_a_test_is_sent_and_its_outcome_shown(api, alice, webhook, receiver):
    WebhookEndpoint.objects.update(kinds=["document.failed"])
    asked = api(alice).post(f"{WEBHOOKS}/{webhook.id}/test")
    assert asked.status_code == 202 and asked.json()["state"] == "pending"
    receiver.status = 500
    deliver()
    assert receiver.data[0]["type"] == "webhook.test"
    [shown] = api(alice).get(f"{WEBHOOKS}/{webhook.id}/deliveries").json()["results"]
    assert (shown["id"], shown["state"], shown["attempts"]) == (asked.json()["id"], "pending", 1)
    assert shown["last_error"] == "HTTP 500"


def test_a_test_of_one_that_fails_waits_until_it_is_said_to_be_well(api, alice, webhook, receiver):
    url = f"{WEBHOOKS}/{webhook.id}"
    receiver.status = 500
    for _ in range(3):
        api(alice).post(f"{url}/test")
    assert deliver() == 1
    api(alice).post(f"{url}/test")  # or a tenant could keep the workers busy with receivers that hang
    assert deliver() == 0
    receiver.status = 200
    assert api(alice).patch(url, {"active": True}, format="json").json()["failures"] == 0
    assert deliver() == 4
    assert not Delivery.objects.exclude(state="sent").exists()


def test_a_test_with_an_idempotency_key_is_sent_once(api, alice, webhook):
    client = api(alice)
    first, second = (client.post(f"{WEBHOOKS}/{webhook.id}/test", headers={"Idempotency-Key": "k"}) for _ in range(2))
    assert first.status_code == second.status_code == 202 and first.json() == second.json()
    assert Delivery.objects.count() == 1


def test_a_rotated_secret_and_for_a_day_the_old_one(api, alice, receiver):
    created = api(alice).post(WEBHOOKS, {"url": receiver.url}, format="json").json()
    url = f"{WEBHOOKS}/{created['id']}"
    rotated = api(alice).post(f"{url}/rotate-secret").json()
    assert rotated["secret"] != created["secret"]
    api(alice).post(f"{url}/test")
    deliver()
    assert all(is_signed(secret, *receiver.requests[0]) for secret in (created["secret"], rotated["secret"]))

    WebhookEndpoint.objects.update(previous_salt_until="2026-01-01T00:00Z")
    api(alice).post(f"{url}/test")
    deliver()
    assert is_signed(rotated["secret"], *receiver.requests[1])
    assert not is_signed(created["secret"], *receiver.requests[1])


ENDPOINTS = [
    ("get", ""),
    ("patch", ""),
    ("delete", ""),
    ("post", "/test"),
    ("post", "/rotate-secret"),
    ("get", "/deliveries"),
]


@pytest.mark.parametrize(("method", "path"), ENDPOINTS)
def test_another_tenants_webhook_does_not_exist(api, alice, charlie, webhook, method, path):
    before = WebhookEndpoint.objects.values().get()
    assert_problem(getattr(api(charlie), method)(f"{WEBHOOKS}/{webhook.id}{path}"), 404)
    assert_problem(getattr(api(alice), method)(f"{WEBHOOKS}/{uuid.uuid4()}{path}"), 404)
    assert WebhookEndpoint.objects.values().get() == before and not Delivery.objects.exists()


def test_another_tenants_webhooks_are_not_listed_and_not_told(api, bob, charlie, webhook, receiver):
    assert api(charlie).get(WEBHOOKS).json()["results"] == []
    document_failed(charlie)
    deliver()
    assert receiver.requests == []


@pytest.mark.parametrize(
    "url",
    ["notifications", "notification-preferences", "webhooks", *(f"webhooks/{{id}}{path}" for _, path in ENDPOINTS)],
)
def test_what_may_be_done_can_be_asked(api, alice, charlie, webhook, url):
    address = f"/api/v1/{url.format(id=webhook.id)}"
    assert api(alice).options(address).status_code == 200
    if "{id}" in url:
        assert webhook.url not in api(charlie).options(address).content.decode()


@pytest.mark.parametrize(("method", "path"), [("get", None), ("post", None), *ENDPOINTS])
@pytest.mark.parametrize("scope", ["read", "write", "admin"])
def test_a_token_does_what_its_scope_is_for(api, alice, webhook, method, path, scope):
    url = WEBHOOKS if path is None else f"{WEBHOOKS}/{webhook.id}{path}"
    answer = getattr(api(alice, scope), method)(url, {}, format="json" if method != "get" else None)
    assert (answer.status_code != 403) == (scope == ("read" if method == "get" else "write"))


def test_nobody_on_the_way_is_to_keep_a_secret(api, alice):
    created = api(alice).post(WEBHOOKS, {"url": "https://example.com/"}, format="json")
    rotated = api(alice).post(f"{WEBHOOKS}/{created.json()['id']}/rotate-secret")
    assert created["Cache-Control"] == rotated["Cache-Control"] == "no-store"


@pytest.mark.parametrize(("method", "path"), [("get", None), ("post", None), *ENDPOINTS])
def test_webhooks_are_for_admins(api, client, bob, webhook, method, path):
    url = WEBHOOKS if path is None else f"{WEBHOOKS}/{webhook.id}{path}"
    assert_problem(getattr(api(bob), method)(url), 403)
    assert getattr(client, method)(url).status_code == 401
    assert WebhookEndpoint.objects.get().deleted_at is None
