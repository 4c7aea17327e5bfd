"""The API against its own description: whatever is sent, what comes back is what the description says."""

from collections import defaultdict
from collections.abc import Iterator
from uuid import UUID

import pytest
import schemathesis
from django.core.handlers.wsgi import WSGIHandler
from django.core.signals import request_finished, request_started
from django.db import close_old_connections, transaction
from django.utils import timezone
from hypothesis import HealthCheck, Phase, settings
from schemathesis import checks
from schemathesis.transport.serialization import Binary

from tests.voicehelper.conftest import PASSWORD, consume
from tests.voicehelper.knowledge.conftest import change, milvus, milvus_server  # noqa: F401
from voicehelper.assistant.conf import AssistantSettings
from voicehelper.conversations.services import complete_conversation, create_conversation, send_message
from voicehelper.identity.models import ApiToken
from voicehelper.identity.services import create_token, register_user
from voicehelper.knowledge.services import upload_document
from voicehelper.notifications.models import Notification
from voicehelper.notifications.services import create_webhook, notify, try_webhook

CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.unsupported_method,
    checks.allow_header_conformance,
]


QUICKLY = settings(
    derandomize=True,  # the same requests each time
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)

schema = schemathesis.openapi.from_wsgi("/api/v1/schema/", WSGIHandler())
schema.config.generation.update(with_security_parameters=False)
schema.config.analysis.constants.enabled = False  # or it would depend on what the code says


@pytest.fixture(autouse=True)
def within_the_test_s_transaction(db) -> Iterator[None]:
    """A request does not close the connection: as Django's own test client has it."""
    for signal in (request_started, request_finished):
        signal.disconnect(close_old_connections)
    yield
    for signal in (request_started, request_finished):
        signal.connect(close_old_connections)


@pytest.fixture
def objects(settings, milvus, alice, bob) -> dict[str, list[str]]:  # noqa: F811
    """What alice's tenant has, some of everything: the part of the path after /api/v1/ -> ids."""
    settings.TENANT_REQUESTS_PER_MINUTE = 0
    settings.ASSISTANT = AssistantSettings(offline_word_seconds=0)
    register_user(tenant=alice.tenant, username="dora", password=PASSWORD)
    conversation = create_conversation(user=alice, title="Open", mode="voice")
    ended = create_conversation(user=bob, title="Ended", mode="chat")
    complete_conversation(user=bob, conversation_id=ended.id)
    send_message(user=alice, conversation_id=conversation.id, content="How large is an elephant?", role="user")
    document = upload_document(
        user=bob, data=b"Elephants are large.", file_name="animals.txt", title="Animals", declared_type="text/plain"
    )
    for consumer in ("knowledge", "analytics", "notification", "audit"):
        consume(consumer)
    notify(recipient=alice, kind="conversation.created", aggregate_id=str(conversation.id), subject="New")
    webhook = create_webhook(by=alice, url="https://example.org/hook")
    try_webhook(by=alice, endpoint_id=webhook.id)
    token = create_token(user=alice, name="spare", scopes=["read"], by=alice).token
    ids = {
        "conversations": [conversation.id, ended.id],
        "documents": [document.id],
        "notifications": Notification.objects.filter(recipient=alice).values_list("id", flat=True),
        "tokens": [token.id],
        "users": [bob.id, alice.id],
        "webhooks": [webhook.id],
    }
    return {name: [str(one) for one in some] for name, some in ids.items()}


@pytest.fixture
def token(alice) -> str:
    """Another than those that the API is asked to revoke."""
    return ApiToken.objects.issue(user=alice, name="test", last_used_at=timezone.now()).text


ACCEPTED = {
    "/api/v1/auth/token": {"username": "dora", "password": PASSWORD},
    "/api/v1/documents": {"file": Binary(b"Mice are small.")},
    "/api/v1/users": {"password": PASSWORD},
    "/api/v1/webhooks": {"url": "https://example.org/another"},
}
"""What a made-up text or a picture would not do for."""


def make_real(case, objects: dict[str, list[str]]) -> None:
    """Put ids of objects that there are in place of most made-up ones, the same in the same case."""
    # Copies: cases share them.
    case.path_parameters = with_real_id(case.path_parameters, "id", objects.get(case.path.split("/")[3], []))
    case.query = with_real_id(case.query, "user_id", objects["users"])
    case.body = with_real_id(case.body, "conversation_id", objects["conversations"])
    for name, value in ACCEPTED.get(case.path, {}).items():
        if isinstance(case.body, dict) and is_replaced(case.body.get(name)):
            case.body = {**case.body, name: value}


def is_replaced(made_up: object) -> bool:
    """A short text is, and a picture; what tries a limit is not."""
    if isinstance(made_up, Binary):
        return made_up.data.startswith(b"\x89PNG")
    return isinstance(made_up, str) and 0 < len(made_up) < 50


def with_real_id(values, name: str, ids: list[str]):
    try:
        number = UUID(values[name]).int
    except (AttributeError, KeyError, TypeError, ValueError):  # it is no id that is tried here
        return values
    return {**values, name: ids[number % len(ids)]} if ids and number % 4 else values


@pytest.fixture(scope="module")
def answers() -> Iterator[dict[str, set[int]]]:
    """Operation -> statuses. In the end each has succeeded at least once, or little would have been tried."""
    seen: dict[str, set[int]] = defaultdict(set)
    yield seen
    assert [label for label, statuses in seen.items() if min(statuses) >= 300] == []


@schema.parametrize()
@settings(QUICKLY, max_examples=25)
def test_as_an_admin(case, objects, token, answers):
    make_real(case, objects)
    with transaction.atomic():  # each request finds everything as it was
        answer = case.call_and_validate(headers={"Authorization": f"Token {token}"}, checks=CHECKS)
        transaction.set_rollback(True)
    if answer.request.method == case.method:  # it may be one that the path does not offer
        answers[case.operation.label].add(answer.status_code)
    if answer.status_code >= 400:
        assert answer.headers["content-type"] == ["application/problem+json"]


@schema.parametrize()
@settings(QUICKLY, max_examples=2, phases=[Phase.generate])
def test_without_a_token(case):
    if case.path_parameters:
        case.path_parameters["id"] = "01936d2e-0000-7000-8000-000000000000"
    answer = case.call_and_validate(checks=CHECKS)
    if case.path != "/api/v1/auth/token":
        assert answer.status_code == 401
