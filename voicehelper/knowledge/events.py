"""Event types of the document domain. The aggregate is the document."""

from events_outbox import register_event
from voicehelper.proto.document_pb2 import (
    DocumentDeletedPayload,
    DocumentFailedPayload,
    DocumentIndexedPayload,
    DocumentUploadedPayload,
)

DOCUMENT_UPLOADED = register_event("document.uploaded", DocumentUploadedPayload)
DOCUMENT_INDEXED = register_event("document.indexed", DocumentIndexedPayload)
DOCUMENT_FAILED = register_event("document.failed", DocumentFailedPayload)
DOCUMENT_DELETED = register_event("document.deleted", DocumentDeletedPayload)
