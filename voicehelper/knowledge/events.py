"""Event types of the document domain. The aggregate is the document.

They are the contract with consumers; no service here emits them yet.
"""

from events_outbox import register_event
from voicehelper.proto.document_pb2 import (
    DocumentDeletedPayload,
    DocumentIndexedPayload,
    DocumentUploadedPayload,
)

DOCUMENT_UPLOADED = register_event("document.uploaded", DocumentUploadedPayload)
DOCUMENT_INDEXED = register_event("document.indexed", DocumentIndexedPayload)
DOCUMENT_DELETED = register_event("document.deleted", DocumentDeletedPayload)
