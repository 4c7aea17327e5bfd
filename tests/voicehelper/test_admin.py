"""The admin pages of the domain: they open, cost the same for many rows as for few, and change nothing."""

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from tests.voicehelper.conftest import PASSWORD
from voicehelper.analytics.event_handlers import count
from voicehelper.analytics.models import DailyTotal
from voicehelper.audit.event_handlers import record
from voicehelper.audit.models import AuditEntry
from voicehelper.conversations.models import Conversation, Message
from voicehelper.conversations.services import create_conversation, send_message
from voicehelper.identity.models import ApiToken, Tenant, User
from voicehelper.identity.services import create_tenant, register_user
from voicehelper.knowledge.models import Document
from voicehelper.knowledge.services import upload_document
from voicehelper.notifications.models import Notification
from voicehelper.notifications.services import notify

READ_ONLY = [Conversation, Message, Notification, DailyTotal, AuditEntry, ApiToken, Document]
MODELS = [Tenant, User, *READ_ONLY]


@pytest.fixture
def site(client, alice):
    client.force_login(alice)
    return client


def admin_url(model, page: str = "") -> str:
    return f"/admin/{model._meta.app_label}/{model._meta.model_name}/{page}"


@pytest.fixture
def add_rows(emitted):
    """Add a row to every table, each of another tenant and user."""

    def add(number: int) -> None:
        tenant = create_tenant(name=f"Tenant {number}")
        user = register_user(tenant=tenant, username=f"user-{number}", password=PASSWORD)
        ApiToken.objects.issue(user=user, name=f"Token {number}")
        conversation = create_conversation(user=user, title=f"Title {number}")
        send_message(user=user, conversation_id=conversation.id, content="Hi")
        upload_document(user=user, data=b"Hi", file_name=f"{number}.txt")
        notify(recipient=user, kind="conversation.created", aggregate_id=str(conversation.id), subject="New")
        created = emitted("conversation.created")[-1:]
        count(created)
        record(created)

    return add


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_a_list_costs_as_many_queries_for_many_rows_as_for_few(site, add_rows, model):
    for number in range(2):
        add_rows(number)
    with CaptureQueriesContext(connection) as few:
        assert site.get(admin_url(model)).status_code == 200
    for number in range(2, 12):
        add_rows(number)
    with CaptureQueriesContext(connection) as many:
        answer = site.get(admin_url(model))
    assert len(answer.context["cl"].result_list) >= 12
    assert len(many) == len(few)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_a_row_opens_and_can_be_searched_for(site, add_rows, model):
    add_rows(1)
    row = model.objects.order_by("-pk")[0]
    assert site.get(admin_url(model, f"{row.pk}/change/")).status_code == 200
    assert site.get(admin_url(model), {"q": str(row.pk)}).status_code == 200
    assert site.get(admin_url(model), {"q": "nothing like this"}).status_code == 200


@pytest.mark.parametrize("model", READ_ONLY, ids=lambda model: model.__name__)
def test_what_the_services_and_consumers_write_is_read_only(site, add_rows, model):
    add_rows(1)
    row = model.objects.get()
    for page in ("add/", f"{row.pk}/change/", f"{row.pk}/delete/"):
        assert site.post(admin_url(model, page), {"post": "yes"}).status_code == 403
    assert model.objects.get() == row
