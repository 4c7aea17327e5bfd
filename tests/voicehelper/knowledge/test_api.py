import tracemalloc
import uuid

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test.client import encode_multipart
from rest_framework.test import APIClient

from events_outbox.testing import handle_now
from tests.voicehelper.conftest import assert_problem
from voicehelper.knowledge.models import Document
from voicehelper.knowledge.services import delete_document, upload_document

from .files import encrypted, pdf

DOCUMENTS = "/api/v1/documents"
SEARCH = "/api/v1/search"
MISSING = "01936d2e-0000-7000-8000-000000000000"


def post(client, data: bytes, name: str = "notes.txt", content_type: str = "text/plain", **fields):
    file = SimpleUploadedFile(name, data, content_type)
    return client.post(DOCUMENTS, {"file": file, **fields}, format="multipart")


def test_upload_read_and_delete(api, alice, bob, emitted):
    answer = post(api(bob), b"Elephants are large.", "Animals & more.md", "text/markdown")

    assert answer.status_code == 201
    body = answer.json()
    assert uuid.UUID(body["id"]).version == 7
    assert (body["title"], body["file_name"]) == ("Animals & more", "Animals & more.md")
    assert (body["content_type"], body["size_bytes"], body["page_count"]) == ("text/markdown", 20, None)
    assert (body["status"], body["error"], body["user_id"]) == ("uploaded", "", str(bob.id))
    [event] = emitted("document.uploaded")
    assert (event.aggregate_id, event.tenant_id, event.user_id) == (body["id"], str(bob.tenant_id), str(bob.id))
    assert (event.payload.title, event.payload.content_type, event.payload.size_bytes) == (
        *("Animals & more", "text/markdown", 20),
    )
    # A colleague sees it, too, and may delete it.
    client = api(alice)
    assert client.get(f"{DOCUMENTS}/{body['id']}").json() == body
    assert client.get(DOCUMENTS).json()["results"] == [body]
    content = client.get(f"{DOCUMENTS}/{body['id']}/content")
    assert (content.status_code, content.content) == (200, b"Elephants are large.")
    assert content["Content-Type"] == "text/markdown; charset=utf-8"
    assert content["Content-Disposition"] == 'attachment; filename="Animals & more.md"'
    assert content["X-Content-Type-Options"] == "nosniff"
    gone = client.delete(f"{DOCUMENTS}/{body['id']}")
    assert (gone.status_code, gone.content) == (204, b"")
    assert client.get(DOCUMENTS).json()["results"] == []
    for path in ("", "/content"):
        assert_problem(client.get(f"{DOCUMENTS}/{body['id']}{path}"), 404)
    assert_problem(client.delete(f"{DOCUMENTS}/{body['id']}"), 404)
    [event] = emitted("document.deleted")
    assert (event.aggregate_id, event.user_id) == (body["id"], str(alice.id))


def test_an_upload_with_a_key_happens_once(api, bob, emitted):
    def post(data: bytes, name: str = "a.pdf"):
        file = SimpleUploadedFile(name, data, "application/pdf")
        return api(bob).post(DOCUMENTS, {"file": file}, format="multipart", HTTP_IDEMPOTENCY_KEY="one")

    data = pdf("Elephants") + b"\xff"  # which is no text
    first, again = post(data), post(data)
    assert (first.status_code, again.status_code, again.json()) == (201, 201, first.json())
    assert again["Idempotency-Replayed"] == "true"
    assert_problem(post(data + b" "), 422)
    assert_problem(post(data, "b.pdf"), 422)
    assert api(bob).get(f"{DOCUMENTS}/{first.json()['id']}/content").content == data
    assert Document.objects.count() == len(emitted("document.uploaded")) == 1


def test_a_pdf_is_one_whatever_it_is_called(api, bob):
    data = pdf("Hello", "World")
    body = post(api(bob), data, "notes.txt", "text/plain").json()
    assert (body["content_type"], body["page_count"], body["title"]) == ("application/pdf", 2, "notes")
    content = api(bob).get(f"{DOCUMENTS}/{body['id']}/content", HTTP_ACCEPT="application/pdf")
    assert (content.content, content["Content-Type"]) == (data, "application/pdf")


def test_a_title_may_be_given(api, bob):
    assert post(api(bob), b"x", title=" My notes ").json()["title"] == "My notes"
    assert post(api(bob), b"x", title="").json()["title"] == "notes"
    assert post(api(bob), b"x", name="ü" * 200 + ".txt").json()["title"] == "ü" * 200
    problem = assert_problem(post(api(bob), b"x", title="x" * 201), 400)
    assert list(problem["errors"]) == ["title"]
    problem = assert_problem(post(api(bob), b"x", title="a\x00b"), 400)
    assert list(problem["errors"]) == ["title"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "The file is empty."),
        (b"  \n", "no text"),
        (b"caf\xe9", "byte 4 is not"),
        (b"PK\x03\x04\x00", "NUL"),
        (b"%PDF-1.7 nothing", "damaged"),
        (encrypted(pdf("Secret"), "tiger"), "password"),
    ],
    ids=["empty", "blank", "latin-1", "zip", "damaged", "encrypted"],
)
def test_what_cannot_be_read_is_refused_with_the_reason(api, bob, emitted, data, says):
    problem = assert_problem(post(api(bob), data), 400)
    assert says in problem["errors"]["file"][0]
    assert not Document.objects.exists()
    assert emitted("document.uploaded") == []


def test_a_pdf_with_too_many_pages(api, bob, change):
    change(max_pages=1)
    problem = assert_problem(post(api(bob), pdf("One", "Two")), 400)
    assert problem["errors"]["file"] == ["The PDF has 2 pages; 1 are allowed."]


def test_a_file_that_is_too_large(api, bob, change):
    change(max_bytes=100)
    assert post(api(bob), b"x" * 100).status_code == 201
    assert "101 bytes; 100 are allowed" in assert_problem(post(api(bob), b"x" * 101), 413)["detail"]
    # So much that not a byte of it is read.
    assert "100 bytes" in assert_problem(post(api(bob), b"x" * 100_000), 413)["detail"]
    assert Document.objects.count() == 1


def test_the_largest_file_is_kept_whole(api, bob, settings):
    data = b"Elephant " * (settings.KNOWLEDGE.max_bytes // 9)
    body = post(api(bob), data).json()
    assert body["size_bytes"] == len(data)
    assert api(bob).get(f"{DOCUMENTS}/{body['id']}/content").content == data


def test_an_upload_takes_few_times_its_size_in_memory(bob, settings):
    data = b"Elephant " * (settings.KNOWLEDGE.max_bytes // 9)
    upload_document(user=bob, data=data, file_name="warm.txt")
    tracemalloc.start()
    try:
        upload_document(user=bob, data=data, file_name="a.txt")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(data)


@pytest.mark.parametrize("fields", [{}, {"file": "text"}, {"title": "only"}])
def test_a_form_without_a_file(api, bob, fields):
    problem = assert_problem(api(bob).post(DOCUMENTS, fields, format="multipart"), 400)
    assert list(problem["errors"]) == ["file"]


@pytest.mark.parametrize("body", [b"", b"nonsense", b"--x\r\n", encode_multipart("x", {"file": "a"})[:-30]])
def test_a_body_that_is_no_form(api, bob, body):
    answer = api(bob).generic("POST", DOCUMENTS, body, content_type="multipart/form-data; boundary=x")
    assert_problem(answer, 400)


def test_a_form_of_too_many_files(api, bob):
    files = {f"file{number}": SimpleUploadedFile("a.txt", b"x") for number in range(200)}
    assert_problem(api(bob).post(DOCUMENTS, files, format="multipart"), 400)


def test_a_body_of_another_type(api, bob):
    assert_problem(api(bob).post(DOCUMENTS, {"file": "x"}, format="json"), 415)


def test_documents_come_newest_first_over_pages(api, bob, upload, django_assert_num_queries):
    made = [upload(bob).id for _ in range(60)]
    rows, url = [], DOCUMENTS
    while url:
        page = api(bob).get(url).json()
        rows += page["results"]
        url = page["next"]
    assert [row["id"] for row in rows] == [str(one) for one in reversed(made)]
    client = api(bob)
    with django_assert_num_queries(2):  # the token with its user, the page; no content
        client.get(DOCUMENTS)


def test_another_tenant_sees_and_does_nothing(api, bob, charlie, upload, emitted):
    document = upload(bob)
    handle_now("knowledge", raise_errors=True)
    client = api(charlie)
    assert client.get(DOCUMENTS).json()["results"] == []
    assert client.get(SEARCH, {"q": "elephants"}).json() == {"results": []}
    assert_problem(client.get(f"{DOCUMENTS}/{document.id}"), 404)
    assert_problem(client.get(f"{DOCUMENTS}/{document.id}/content"), 404)
    assert_problem(client.delete(f"{DOCUMENTS}/{document.id}"), 404)
    assert Document.objects.filter(id=document.id).exists()
    assert emitted("document.deleted") == []


@pytest.mark.parametrize("path", [f"{DOCUMENTS}/{MISSING}", f"{DOCUMENTS}/{MISSING}/content", f"{DOCUMENTS}/nonsense"])
def test_an_unknown_document(api, bob, path):
    assert_problem(api(bob).get(path), 404)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("get", DOCUMENTS), ("post", DOCUMENTS), ("get", f"{DOCUMENTS}/{MISSING}")),
        *(("delete", f"{DOCUMENTS}/{MISSING}"), ("get", f"{DOCUMENTS}/{MISSING}/content"), ("get", SEARCH)),
    ],
)
def test_strangers_stay_outside(db, method, path):
    assert_problem(getattr(APIClient(raise_request_exception=False), method)(path), 401)


def test_search(api, bob, upload):
    document = upload(bob, "Elephants are large.", title="Animals")
    handle_now("knowledge", raise_errors=True)
    answer = api(bob).get(SEARCH, {"q": "large elephants"})
    assert answer.status_code == 200
    [found] = answer.json()["results"]
    assert 0.2 < found.pop("score") <= 1
    assert found == {
        "document_id": str(document.id),
        "title": "Animals",
        "position": 0,
        "text": "Elephants are large.",
    }
    delete_document(user=bob, document_id=document.id)
    assert api(bob).get(SEARCH, {"q": "large elephants"}).json() == {"results": []}


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({}, "q"),
        ({"q": " "}, "q"),
        ({"q": "x" * 1001}, "q"),
        ({"q": "a\x00"}, "q"),
        ({"q": "x", "limit": 0}, "limit"),
        ({"q": "x", "limit": 51}, "limit"),
        ({"q": "x", "limit": "many"}, "limit"),
    ],
)
def test_a_search_that_is_not_valid(api, bob, query, field):
    assert list(assert_problem(api(bob).get(SEARCH, query), 400)["errors"]) == [field]


def test_a_search_while_milvus_is_away(api, bob, change):
    change(milvus_uri="http://127.0.0.1:1", search_timeout_seconds=1.0)
    assert_problem(api(bob).get(SEARCH, {"q": "elephants"}), 503)
    # All else goes on.
    assert post(api(bob), b"Elephants").status_code == 201
