import pytest
from django.contrib.auth.models import Group, Permission
from django.test import Client

from tests.voicehelper.conftest import PASSWORD
from voicehelper.console.roles import create_roles
from voicehelper.identity.models import User
from voicehelper.identity.services import register_user
from voicehelper.knowledge.admin import SHOWN_BYTES

from .files import pdf

SECRET = "the content of a document"


def client_of(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


def page(document) -> str:
    return f"/admin/knowledge/document/{document.id}/change/"


@pytest.fixture
def document(upload, bob):
    return upload(bob, SECRET + "ü" * SHOWN_BYTES, title="Animals")


@pytest.mark.parametrize(("may_see", "count"), [(True, 1), (False, 0)])
def test_the_content_takes_the_permission_for_payloads(document, may_see, count):
    viewer = User.objects.create_user("viewer", password=PASSWORD, is_staff=True)
    wanted = ["view_document", *(["view_payload"] if may_see else [])]
    viewer.user_permissions.set(Permission.objects.filter(codename__in=wanted))
    answer = client_of(viewer).get(page(document))
    assert answer.status_code == 200
    text = answer.content.decode()
    assert "Animals" in text
    assert text.count(SECRET) == count
    assert "ü" * SHOWN_BYTES not in text


def test_a_pdf_opens_without_its_bytes(alice, upload):
    answer = client_of(alice).get(page(upload(alice, pdf("Hello"), file_name="a.pdf")))
    assert answer.status_code == 200
    assert "%PDF" not in answer.content.decode()


def test_the_staff_of_a_tenant_sees_its_own(document, charlie, bob):
    create_roles()
    for user, status in ((charlie, 302), (bob, 200)):
        user.is_staff = True
        user.save()
        user.groups.set(Group.objects.filter(name="Viewer"))
        client = client_of(user)
        answer = client.get("/admin/knowledge/document/")
        assert answer.status_code == 200
        assert ("Animals" in answer.content.decode()) == (status == 200)
        assert client.get(page(document)).status_code == status


@pytest.mark.parametrize("role", ["Viewer", "Operator", "Admin"])
def test_every_role_looks_at_documents_and_changes_none(document, tenant, role):
    create_roles()
    user = register_user(tenant=tenant, username="looker", password=PASSWORD)
    user.is_staff = True
    user.save()
    user.groups.set(Group.objects.filter(name=role))
    client = client_of(user)
    assert client.get("/admin/knowledge/document/").status_code == 200
    for path in ("add/", f"{document.id}/change/", f"{document.id}/delete/"):
        assert client.post(f"/admin/knowledge/document/{path}", {"post": "yes"}).status_code == 403
