"""Writes of the knowledge domain."""

from pathlib import PurePath
from uuid import UUID

import psycopg
from django.db import connection, models, transaction
from django.utils import timezone

from events_outbox import emit_event
from events_outbox.conf import outbox_settings
from monitoring.database import timed
from voicehelper.identity.models import User
from voicehelper.proto.document_pb2 import (
    DocumentDeletedPayload,
    DocumentFailedPayload,
    DocumentIndexedPayload,
    DocumentUploadedPayload,
)

from .chunking import chunks
from .conf import knowledge_settings
from .embedding import embed_all, embedder
from .events import DOCUMENT_DELETED, DOCUMENT_FAILED, DOCUMENT_INDEXED, DOCUMENT_UPLOADED
from .extraction import UnreadableDocument, extract, inspect, sniff
from .models import Document
from .vectors import Chunk, vector_store

METADATA = {"source": "knowledge-service"}


class DocumentTooLarge(Exception):
    """The file is larger than DOCUMENT_MAX_BYTES. The text is for people."""


def upload_document(*, user: User, data: bytes, file_name: str, title: str = "", declared_type: str = "") -> Document:
    """Keep a file in the user's tenant and emit document.uploaded; a consumer indexes it.

    `title`: empty takes the file's name. `declared_type`: what the client says the file is; see `extraction.sniff()`.

    Raises DocumentTooLarge, and UnreadableDocument for what is no text or PDF, empty, encrypted or damaged.
    """
    most = knowledge_settings().max_bytes
    if len(data) > most:
        raise DocumentTooLarge(f"The file has {len(data)} bytes; {most} are allowed.")
    content_type = sniff(data, file_name=file_name, declared_type=declared_type)
    page_count = inspect(data, content_type)
    with transaction.atomic():
        document = Document.objects.create(
            tenant_id=user.own_tenant_id,
            user=user,
            title=(title.strip() or PurePath(file_name).stem.strip() or "Untitled")[: Document.TITLE_MAX_CHARS],
            file_name=file_name[-Document.FILE_NAME_MAX_CHARS :],
            content_type=content_type,
            size_bytes=len(data),
            page_count=page_count,
        )
        _keep_content(document.id, data)
        emit_event(
            DOCUMENT_UPLOADED,
            DocumentUploadedPayload(
                document_id=str(document.id),
                title=document.title,
                content_type=document.content_type,
                size_bytes=document.size_bytes,
            ),
            aggregate_id=document.id,
            tenant_id=document.tenant_id,
            user_id=user.id,
            metadata=METADATA,
        )
    return document


_CONTENT_SQL = "INSERT INTO knowledge_documentcontent (document_id, data) VALUES (%s, %b)"


def _keep_content(document_id: UUID, data: bytes) -> None:
    """As bytes: Django's own cursor writes them into the statement, which takes seven times their size in memory."""
    with (
        timed(connection, _CONTENT_SQL),
        connection.wrap_database_errors,
        psycopg.Cursor(connection.connection) as cursor,
    ):
        cursor.execute(_CONTENT_SQL, [document_id, data])


@transaction.atomic
def delete_document(*, user: User, document_id: UUID) -> None:
    """Delete a document of the user's tenant and emit document.deleted; a consumer removes its vectors.

    From here on no search finds it. Waits while its chunks are being written, some seconds at most.
    Raises Document.DoesNotExist when the tenant has no such document.
    """
    document = Document.objects.for_tenant(user.own_tenant_id).select_for_update().get(id=document_id)
    tenant_id = document.tenant_id
    document.delete()
    emit_event(
        DOCUMENT_DELETED,
        DocumentDeletedPayload(document_id=str(document_id)),
        aggregate_id=document_id,
        tenant_id=tenant_id,
        user_id=user.id,
        metadata=METADATA,
    )


def index_document(*, document_id: UUID, again: bool = False) -> None:
    """Make a document findable, and emit document.indexed; or document.failed when its content does not allow it.

    Nothing is done for a document that is not there (any more), and for one that is not in the status uploaded,
    unless `again`. One that becomes again what it was emits nothing: its uploader has been told.

    Raises VectorsUnavailable and EmbedderUnavailable, with nothing changed: try again later. EmbedderTooSlow comes
    after half of BATCH_TIMEOUT_SECONDS, and will come again.
    """
    document = _to_index(document_id, again).select_related("content").first()
    if document is None:
        return
    conf, model, store = knowledge_settings(), embedder(), vector_store()
    try:
        text = extract(bytes(document.content.data), document.content_type)
    except UnreadableDocument as error:
        _fail(document_id, again, str(error))
        return
    is_markdown = document.content_type == Document.ContentType.MARKDOWN
    texts = list(
        chunks(text, most_chars=conf.chunk_chars, overlap_chars=conf.chunk_overlap_chars, has_headings=is_markdown)
    )
    # Before what takes long, and may be paid for: it is not done in vain, time and again, while Milvus is away.
    collection = store.prepare(model)
    # With the title, which says what a piece is about that does not say it itself.
    titled = [f"{document.title}\n{text}" for text in texts]
    vectors = embed_all(model, titled, most_seconds=outbox_settings().BATCH_TIMEOUT_SECONDS / 2)
    pieces = [Chunk(position, *piece) for position, piece in enumerate(zip(texts, vectors, strict=True))]
    with transaction.atomic():
        # The slow part is over. While the lock is held the document cannot be deleted, so its deletion's event comes
        # after this writing, whoever handles it; if it is deleted already, nothing is written any more.
        locked = _to_index(document_id, again).select_for_update(no_key=True).first()
        if locked is None:
            return
        is_new = locked.status != Document.Status.INDEXED
        store.replace(collection, tenant_id=locked.tenant_id, document_id=locked.id, chunks=pieces)
        locked.status, locked.error, locked.indexed_at = Document.Status.INDEXED, "", timezone.now()
        locked.chunk_count, locked.collection = len(pieces), collection
        locked.save(update_fields=["status", "error", "indexed_at", "chunk_count", "collection", "updated_at"])
        if is_new:
            emit_event(
                DOCUMENT_INDEXED,
                DocumentIndexedPayload(document_id=str(locked.id), chunk_count=len(pieces), collection=collection),
                aggregate_id=locked.id,
                tenant_id=locked.tenant_id,
                user_id=locked.user_id,
                metadata=METADATA,
            )


@transaction.atomic
def _fail(document_id: UUID, again: bool, error: str) -> None:
    document = _to_index(document_id, again).select_for_update(no_key=True).first()
    if document is None:
        return
    before = document.status
    if before == Document.Status.INDEXED:  # what is found of it would be of a document that has failed
        vector_store().remove(document_id)
        document.chunk_count, document.collection = 0, ""
    document.status, document.error, document.indexed_at = Document.Status.FAILED, error, None
    document.save(update_fields=["status", "error", "indexed_at", "chunk_count", "collection", "updated_at"])
    if before != Document.Status.FAILED:
        emit_event(
            DOCUMENT_FAILED,
            DocumentFailedPayload(document_id=str(document.id), title=document.title, error=error),
            aggregate_id=document.id,
            tenant_id=document.tenant_id,
            user_id=document.user_id,
            metadata=METADATA,
        )


def _to_index(document_id: UUID, again: bool) -> models.QuerySet[Document]:
    documents = Document.objects.filter(id=document_id)
    return documents if again else documents.filter(status=Document.Status.UPLOADED)


def remove_vectors(*, document_id: UUID) -> None:
    """Remove what the index holds of a document. Raises VectorsUnavailable: try again later."""
    vector_store().remove(document_id)
