from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class ConversationCreatedPayload(_message.Message):
    __slots__ = ("conversation_id", "title", "mode")
    CONVERSATION_ID_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    conversation_id: str
    title: str
    mode: str
    def __init__(self, conversation_id: _Optional[str] = ..., title: _Optional[str] = ..., mode: _Optional[str] = ...) -> None: ...

class ConversationCompletedPayload(_message.Message):
    __slots__ = ("conversation_id", "mode", "message_count")
    CONVERSATION_ID_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_COUNT_FIELD_NUMBER: _ClassVar[int]
    conversation_id: str
    mode: str
    message_count: int
    def __init__(self, conversation_id: _Optional[str] = ..., mode: _Optional[str] = ..., message_count: _Optional[int] = ...) -> None: ...

class ConversationFailedPayload(_message.Message):
    __slots__ = ("conversation_id", "mode", "message_count")
    CONVERSATION_ID_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_COUNT_FIELD_NUMBER: _ClassVar[int]
    conversation_id: str
    mode: str
    message_count: int
    def __init__(self, conversation_id: _Optional[str] = ..., mode: _Optional[str] = ..., message_count: _Optional[int] = ...) -> None: ...

class MessageSentPayload(_message.Message):
    __slots__ = ("conversation_id", "message_id", "role", "content", "mode", "content_length")
    CONVERSATION_ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    conversation_id: str
    message_id: str
    role: str
    content: str
    mode: str
    content_length: int
    def __init__(self, conversation_id: _Optional[str] = ..., message_id: _Optional[str] = ..., role: _Optional[str] = ..., content: _Optional[str] = ..., mode: _Optional[str] = ..., content_length: _Optional[int] = ...) -> None: ...
