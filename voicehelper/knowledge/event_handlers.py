"""The consumer `knowledge`: makes documents findable, and removes those that are deleted from the index.

What it writes to Milvus is outside the transaction, and idempotent: chunks have ids of their own, and a document that
was deleted meanwhile is not written. While Milvus or the embedder is away an event is tried again for a minute and a
half; then it becomes a dead letter, for an operator to replay, and after six of ten the consumer pauses. One that
takes too long is one at once: it would hold up all others as long again, until the group gives it to another member.
"""

from uuid import UUID

from events_outbox import Consumer, Event, FailureGuard, PermanentEventError, RetryPolicy
from voicehelper.proto.document_pb2 import DocumentDeletedPayload, DocumentUploadedPayload

from .embedding import EmbedderTooSlow
from .events import DOCUMENT_DELETED, DOCUMENT_UPLOADED
from .services import index_document, remove_vectors

knowledge = Consumer(
    "knowledge",
    group_id="knowledge-service",
    # Each takes its time, and what one has locked is free when it is done.
    batch_size=1,
    retry=RetryPolicy(max_retries=8, initial_delay_seconds=0.5, jitter=0.2),
    guard=FailureGuard(max_failed_share=0.5, window_events=10),
)


@knowledge.handles(DOCUMENT_UPLOADED)
def index(event: Event[DocumentUploadedPayload]) -> None:
    try:
        index_document(document_id=_document_id(event.payload.document_id))
    except EmbedderTooSlow as error:
        raise PermanentEventError(str(error)) from error


@knowledge.handles(DOCUMENT_DELETED)
def remove(event: Event[DocumentDeletedPayload]) -> None:
    remove_vectors(document_id=_document_id(event.payload.document_id))


def _document_id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError as error:
        raise PermanentEventError(f"document_id {text!r} is not a UUID") from error
