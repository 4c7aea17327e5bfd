"""The API's description and the page to read it on."""

import re

import pytest

from tests.voicehelper.conftest import assert_problem
from voicehelper.api_docs import description

DOCS, SCHEMA = "/api/v1/docs/", "/api/v1/schema/"


def operations():
    return [
        (f"{method.upper()} {path}", operation)
        for path, methods in description()["paths"].items()
        for method, operation in methods.items()
    ]


def test_the_description_is_for_everybody(client):
    answer = client.get(SCHEMA)
    assert answer.status_code == 200
    assert answer["Content-Type"] == "application/vnd.oai.openapi+json"
    assert answer.json()["info"]["title"] == "VoiceHelper"


def test_what_is_wrong_at_these_addresses_is_a_problem(client):
    for path in (DOCS, SCHEMA):
        assert_problem(client.post(path), 405)
        assert_problem(client.get(path, headers={"Accept": "image/png"}), 406)


def test_the_page_asks_for_nothing_inline_and_nothing_from_elsewhere(client):
    page = client.get(DOCS).content.decode()
    script = client.get(f"{DOCS}?script=")
    assert script["Content-Type"] == "application/javascript"
    assert '"validatorUrl": null' in script.content.decode()
    assert f'url: "{SCHEMA}"' in script.content.decode()
    assert re.findall(r"<style|<script(?! src)|\sstyle=|\son\w+=", page) == []
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(addresses) == 6
    for address in addresses:
        assert address.startswith("/") and not address.startswith("//")


def test_the_page_is_built_of_files_that_are_there(client):
    page = client.get(DOCS).content.decode()
    for address in re.findall(r'(?:src|href)="(/static[^"]*)"', page):
        answer = client.get(address)
        assert answer.status_code == 200, address
        assert answer.getvalue()  # which closes the file as well


@pytest.mark.parametrize(("label", "operation"), operations())
def test_an_operation_says_what_it_does(label, operation):
    assert operation["summary"] and operation["description"]
    for status, answer in operation["responses"].items():
        assert answer["description"]
        problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
        assert (answer.get("content") == problem) == (int(status) >= 400)


def test_errors_are_named_where_they_can_happen():
    answers = {label: set(operation["responses"]) for label, operation in operations()}
    seen = {"401", "403", "429"}
    assert answers["GET /api/v1/tenant"] == {"200", "304", "406", *seen}
    assert answers["GET /api/v1/conversations"] == {"200", "304", "404", "406", *seen}
    assert answers["GET /api/v1/documents/{id}/content"] == {"200", "304", "404", *seen}
    sent = {"400", "406", "413", "415"}
    assert answers["POST /api/v1/auth/token"] == {"200", "409", "429", *sent}
    assert answers["POST /api/v1/conversations"] == {"201", "409", "422", *sent, *seen}
    assert answers["POST /api/v1/conversations/{id}/replies"] == {
        *("200", "201", "400", "404", "406", "409", "502", "503", "504"),
        *seen,
    }


def test_the_idempotency_key_is_described_where_it_is_heeded(api, alice):
    heeding = {
        label
        for label, operation in operations()
        if "Idempotency-Key" in {parameter["name"] for parameter in operation.get("parameters", [])}
    }
    assert "POST /api/v1/messages" in heeding
    assert not any(label.startswith("GET") for label in heeding)
    client = api(alice)
    for label, operation in operations():
        path = label.partition(" ")[2]
        if label.startswith("POST") and "{" not in path and operation["security"] != [{}]:
            answer = client.post(path, {}, headers={"Idempotency-Key": "no key"})
            assert (b"visible ASCII" in answer.content) == (label in heeding), label


def test_a_summary_is_what_the_docstring_says_of_the_method():
    summaries = {label: operation["summary"] for label, operation in operations()}
    assert summaries["GET /api/v1/webhooks/{id}"] == "a webhook"
    assert summaries["PATCH /api/v1/webhooks/{id}"] == "what it is told of, or whether at all"
    assert summaries["DELETE /api/v1/webhooks/{id}"] == "it"
    assert summaries["POST /api/v1/conversations/{id}/replies"].startswith("the assistant replies")


def test_a_token_s_scope_is_said():
    scopes = {label: re.findall(r"scope `(\w+)`\.$", operation["description"]) for label, operation in operations()}
    assert scopes["GET /api/v1/users"] == ["read"]
    assert scopes["POST /api/v1/users"] == ["admin"]
    assert scopes["POST /api/v1/messages"] == ["write"]
    assert scopes["POST /api/v1/auth/token"] == []


def test_conditions_are_described_where_they_are_looked_at():
    """As docs/api.md says: every GET knows If-None-Match, every change by PUT or PATCH If-Match."""
    for name, operation in operations():
        method = name.split()[0]
        headers = {parameter["name"] for parameter in operation.get("parameters", []) if parameter["in"] == "header"}
        assert ("If-None-Match" in headers) == ("304" in operation["responses"]) == (method == "GET"), name
        assert ("If-Match" in headers) == ("412" in operation["responses"]) == (method in ("PUT", "PATCH")), name
