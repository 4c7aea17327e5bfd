"""The consumer `knowledge`: from an upload to what is found, and what comes in between."""

import threading
import uuid

import pytest
from django.core.management import CommandError, call_command
from django.db import connection

from events_outbox.handlers import consumer_named
from events_outbox.models import DeadLetter
from events_outbox.testing import handle_now, make_event
from voicehelper.knowledge.models import Document, DocumentContent
from voicehelper.knowledge.search import search
from voicehelper.knowledge.services import delete_document, index_document
from voicehelper.knowledge.vectors import VectorsUnavailable, vector_store
from voicehelper.proto.document_pb2 import DocumentUploadedPayload

from .conftest import bring_back, eventually
from .files import encrypted, pdf, pdf_of


def found(user, query: str = "elephants") -> list[uuid.UUID]:
    return [one.document_id for one in search(tenant_id=user.own_tenant_id, query=query)]


def test_it_has_retries_that_outlast_a_restart_and_takes_one_event_at_a_time():
    consumer = consumer_named("knowledge")
    assert (consumer.group_id, consumer.batch_size, consumer.topics) == ("knowledge-service", 1, ["document.events"])
    assert 60 < sum(consumer.retry.delays_seconds()) < 120


def test_an_uploaded_document_is_found(upload, bob, emitted):
    document = upload(bob, "Elephants are large.", title="Animals")
    assert found(bob) == []
    handle_now("knowledge", raise_errors=True)

    document.refresh_from_db()
    assert (document.status, document.error, document.chunk_count) == ("indexed", "", 1)
    assert document.indexed_at is not None
    [one] = search(tenant_id=bob.own_tenant_id, query="How large is an elephant?")
    assert (one.document_id, one.title, one.text, one.position) == (document.id, "Animals", "Elephants are large.", 0)
    [cause], [event] = emitted("document.uploaded"), emitted("document.indexed")
    assert (event.payload.document_id, event.payload.chunk_count) == (str(document.id), 1)
    assert event.payload.collection == document.collection
    assert (event.aggregate_id, event.tenant_id, event.user_id) == (str(document.id), str(bob.tenant_id), str(bob.id))
    assert (event.causation_id, event.correlation_id) == (str(cause.event_id), cause.correlation_id)


def test_a_pdf_is_found_by_what_is_in_it(upload, bob):
    document = upload(bob, pdf("Elephants are large", "Mice are small"), file_name="Animals.pdf")
    handle_now("knowledge", raise_errors=True)
    document.refresh_from_db()
    assert (document.status, document.page_count) == ("indexed", 2)
    assert found(bob, "mice") == [document.id]


def test_a_long_document_is_cut_as_the_settings_say(upload, bob, change, emitted):
    change(chunk_chars=100, chunk_overlap_chars=20)
    document = upload(bob, "Elephants are large animals. " * 40)
    handle_now("knowledge", raise_errors=True)
    document.refresh_from_db()
    assert document.chunk_count > 10
    assert emitted("document.indexed")[0].payload.chunk_count == document.chunk_count
    assert all(len(one.text) <= 100 for one in search(tenant_id=bob.own_tenant_id, query="elephants", limit=50))


def test_a_document_that_cannot_be_indexed_says_why_and_is_not_tried_again(upload, bob, emitted):
    document = upload(bob, pdf_of([b"0 0 m 10 10 l S"]), file_name="scan.pdf")
    handled = handle_now("knowledge")

    assert handled.dead_letters == []
    document.refresh_from_db()
    assert document.status == "failed"
    assert "OCR" in document.error and "Error" not in document.error
    [event] = emitted("document.failed")
    assert (event.payload.document_id, event.payload.title, event.payload.error) == (
        *(str(document.id), "scan", document.error),
    )
    assert (event.tenant_id, event.user_id) == (str(bob.tenant_id), str(bob.id))
    assert emitted("document.indexed") == []


def test_limits_that_changed_since_the_upload_make_it_fail(upload, bob, change):
    document = upload(bob, pdf("One", "Two"), file_name="two.pdf")
    change(max_pages=1)
    handle_now("knowledge")
    document.refresh_from_db()
    assert (document.status, document.error) == ("failed", "The PDF has 2 pages; 1 are allowed.")


def test_an_event_that_comes_twice_indexes_once(upload, bob, emitted):
    document = upload(bob)
    [event] = emitted("document.uploaded")
    handle_now("knowledge", events=[event, event], raise_errors=True)
    # As after its processed mark was pruned.
    again = make_event("document.uploaded", event.payload, aggregate_id=event.aggregate_id, tenant_id=event.tenant_id)
    handle_now("knowledge", events=[again], raise_errors=True)
    assert len(emitted("document.indexed")) == 1
    assert found(bob) == [document.id]


def test_a_deleted_document_is_gone_with_its_vectors(upload, bob, emitted):
    document = upload(bob)
    kept = upload(bob, "Mice are small, elephants are not.")
    handle_now("knowledge", raise_errors=True)
    assert set(found(bob)) == {document.id, kept.id}

    delete_document(user=bob, document_id=document.id)
    assert found(bob) == [kept.id]  # at once
    assert not Document.objects.filter(id=document.id).exists()
    assert not DocumentContent.objects.filter(document_id=document.id).exists()
    handle_now("knowledge", raise_errors=True)
    assert chunks_of(document) == 0 and chunks_of(kept) == 1
    [event] = emitted("document.deleted")
    assert (event.aggregate_id, event.payload.document_id) == (str(document.id),) * 2


def chunks_of(document: Document) -> int:
    """How many Milvus itself has."""
    store = vector_store()
    client = store._connected(20)
    count = 0
    for name in client.list_collections():
        if name.startswith(store._prefix):
            client.load_collection(name)
            rows = client.query(name, filter=f'document_id == "{document.id}"', output_fields=["id"], limit=1000)
            count += len(rows)
    return count


def test_one_that_is_deleted_before_it_is_indexed_is_never_written(upload, bob, emitted):
    document = upload(bob)
    delete_document(user=bob, document_id=document.id)
    handle_now("knowledge", raise_errors=True)
    # And a replay of the upload, however late.
    [event] = emitted("document.uploaded")
    replayed = make_event("document.uploaded", event.payload, aggregate_id=event.aggregate_id)
    handle_now("knowledge", events=[replayed], raise_errors=True)
    assert chunks_of(document) == 0
    assert emitted("document.indexed", "document.failed") == []


def test_while_milvus_is_away_nothing_is_lost(upload, bob, milvus, endpoint):
    document = upload(bob)
    milvus.kill()
    vector_store().close()
    [letter] = handle_now("knowledge").dead_letters
    assert endpoint.requests == []  # nine times in vain, and paid for
    assert (letter.reason, letter.attempts) == ("failed", 9)
    assert "VectorsUnavailable" in letter.error
    document.refresh_from_db()
    assert (document.status, document.error) == ("uploaded", "")

    bring_back(milvus)
    replay = make_event("document.uploaded", DocumentUploadedPayload(document_id=str(document.id)))
    handle_now("knowledge", events=[replay], raise_errors=True)
    assert found(bob) == [document.id]


def test_while_the_embedder_is_away_nothing_is_lost(upload, bob, endpoint):
    document = upload(bob)
    endpoint.fails_with = 503
    [letter] = handle_now("knowledge").dead_letters
    assert "EmbedderUnavailable" in letter.error and "Elephants" not in letter.error + letter.traceback
    document.refresh_from_db()
    assert document.status == "uploaded"
    endpoint.fails_with = None
    index_document(document_id=document.id)
    assert found(bob) == [document.id]


def test_one_that_takes_too_long_holds_nobody_up(upload, bob, endpoint, change, settings, capsys):
    change(chunk_chars=100, chunk_overlap_chars=0)
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "BATCH_TIMEOUT_SECONDS": 1}
    document = upload(bob, "Elephants are large animals. " * 100)
    short = upload(bob, "Elephants are large.")
    endpoint.seconds = 0.3
    [letter] = handle_now("knowledge").dead_letters
    assert (letter.reason, letter.attempts) == ("permanent", 1)
    assert "chunks took more than 0.5 seconds" in letter.error
    document.refresh_from_db()
    assert document.status == "uploaded"
    assert found(bob) == [short.id]
    with pytest.raises(CommandError, match="1 left out"):
        call_command("index_documents")
    captured = capsys.readouterr()
    assert captured.out == "1 documents\n" and str(document.id) in captured.err


def test_each_embedder_has_a_collection_and_documents_are_indexed_anew(upload, bob, endpoint, change, capsys):
    document = upload(bob)
    handle_now("knowledge", raise_errors=True)
    document.refresh_from_db()
    assert document.collection.endswith("_small_model_32")

    change(embedding_base_url="", embedding_model="", embedding_dimension=64)
    assert found(bob) == []
    call_command("index_documents", tenant_id=bob.own_tenant_id)
    assert capsys.readouterr().out == "1 documents\n"
    assert found(bob) == [document.id]
    document.refresh_from_db()
    assert document.collection.endswith("_hashed_ngrams_1_64")
    # Of both collections.
    delete_document(user=bob, document_id=document.id)
    handle_now("knowledge", raise_errors=True)
    assert chunks_of(document) == 0


def test_to_index_anew_stops_where_milvus_does(upload, bob, change):
    document = upload(bob)
    change(milvus_uri="http://127.0.0.1:1")
    with pytest.raises(CommandError, match=f"stopped at document {document.id}, after 0"):
        call_command("index_documents")


def test_one_that_failed_can_be_indexed_anew(upload, bob, change):
    document = upload(bob, pdf("Elephants", "Mice"), file_name="two.pdf")
    change(max_pages=1)
    handle_now("knowledge", raise_errors=True)
    change(max_pages=2)
    call_command("index_documents", status="failed", verbosity=0)
    document.refresh_from_db()
    assert (document.status, document.error) == ("indexed", "")
    assert found(bob) == [document.id]


def test_to_index_anew_tells_nobody_again(upload, bob, change, emitted):
    document = upload(bob)
    scan = upload(bob, pdf_of([b"0 0 m 10 10 l S"]), file_name="scan.pdf")
    two = upload(bob, pdf("Elephants", "Mice"), file_name="two.pdf")
    handle_now("knowledge", raise_errors=True)
    call_command("index_documents", verbosity=0)
    assert len(emitted("document.indexed")) == 2 and len(emitted("document.failed")) == 1
    assert set(found(bob)) == {document.id, two.id}
    # What does not succeed any more is not found any more, and that is news.
    change(max_pages=1)
    for _ in range(2):
        call_command("index_documents", verbosity=0)
    assert [event.payload.document_id for event in emitted("document.failed")] == [str(scan.id), str(two.id)]
    two.refresh_from_db()
    assert (two.status, two.chunk_count, two.collection) == ("failed", 0, "")
    assert found(bob) == [document.id] and chunks_of(two) == 0


def test_an_event_without_a_proper_id_is_kept_without_a_retry(milvus, db):
    event = make_event("document.uploaded", DocumentUploadedPayload(document_id="nonsense"))
    [letter] = handle_now("knowledge", events=[event]).dead_letters
    assert (letter.reason, letter.attempts) == ("permanent", 1)


@pytest.mark.django_db(transaction=True)
class TestAtTheSameTime:
    """With connections of their own."""

    @staticmethod
    def in_thread(work) -> threading.Thread:
        def run() -> None:
            try:
                work()
            finally:
                connection.close()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def test_a_deletion_while_it_is_embedded_does_not_wait_and_wins(self, upload, bob, endpoint, emitted):
        document = upload(bob)
        endpoint.gate.clear()
        indexing = self.in_thread(lambda: index_document(document_id=document.id))
        eventually(lambda: endpoint.requests, "the embedder is asked")
        delete_document(user=bob, document_id=document.id)
        endpoint.gate.set()
        indexing.join(30)
        assert chunks_of(document) == 0
        assert emitted("document.indexed") == []

    def test_a_deletion_while_it_is_written_comes_after_it(self, upload, bob, milvus, endpoint, emitted):
        document = upload(bob)
        endpoint.gate.clear()
        indexing = self.in_thread(lambda: index_document(document_id=document.id))
        eventually(lambda: endpoint.requests, "the embedder is asked")
        milvus.pause()
        endpoint.gate.set()
        with connection.cursor() as cursor:
            row = "SELECT 1 FROM knowledge_document WHERE id = %s FOR UPDATE SKIP LOCKED"

            def is_locked() -> bool:
                cursor.execute(row, [document.id])
                return cursor.fetchone() is None

            eventually(is_locked, "the row is locked")
        deletion = self.in_thread(lambda: delete_document(user=bob, document_id=document.id))
        deletion.join(0.3)
        assert deletion.is_alive()
        milvus.resume()
        indexing.join(30)
        deletion.join(30)
        assert [event.event_type for event in emitted("document.indexed", "document.deleted")] == [
            "document.indexed",
            "document.deleted",
        ]
        handle_now("knowledge", raise_errors=True)
        assert chunks_of(document) == 0
        assert not DeadLetter.objects.exists()


def test_unavailable_leaves_the_document_as_it_was(upload, bob, change):
    document = upload(bob)
    change(milvus_uri="http://127.0.0.1:1")
    with pytest.raises(VectorsUnavailable):
        index_document(document_id=document.id)
    document.refresh_from_db()
    assert document.status == "uploaded"


def test_one_with_a_password_never_comes_so_far(bob, upload):
    from voicehelper.knowledge.extraction import UnreadableDocument

    with pytest.raises(UnreadableDocument):
        upload(bob, encrypted(pdf("Secret"), "tiger"))
    assert not Document.objects.exists()
