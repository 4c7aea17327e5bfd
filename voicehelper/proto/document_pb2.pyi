from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class DocumentUploadedPayload(_message.Message):
    __slots__ = ("document_id", "title", "content_type", "size_bytes")
    DOCUMENT_ID_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    document_id: str
    title: str
    content_type: str
    size_bytes: int
    def __init__(self, document_id: _Optional[str] = ..., title: _Optional[str] = ..., content_type: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class DocumentIndexedPayload(_message.Message):
    __slots__ = ("document_id", "chunk_count", "collection")
    DOCUMENT_ID_FIELD_NUMBER: _ClassVar[int]
    CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    document_id: str
    chunk_count: int
    collection: str
    def __init__(self, document_id: _Optional[str] = ..., chunk_count: _Optional[int] = ..., collection: _Optional[str] = ...) -> None: ...

class DocumentFailedPayload(_message.Message):
    __slots__ = ("document_id", "title", "error")
    DOCUMENT_ID_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    document_id: str
    title: str
    error: str
    def __init__(self, document_id: _Optional[str] = ..., title: _Optional[str] = ..., error: _Optional[str] = ...) -> None: ...

class DocumentDeletedPayload(_message.Message):
    __slots__ = ("document_id",)
    DOCUMENT_ID_FIELD_NUMBER: _ClassVar[int]
    document_id: str
    def __init__(self, document_id: _Optional[str] = ...) -> None: ...
