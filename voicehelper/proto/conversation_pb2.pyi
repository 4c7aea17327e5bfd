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
    __slots__ = ("conversation_id", "mode", "message_count", "duration_seconds")
    CONVERSATION_ID_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_COUNT_FIELD_NUMBER: _ClassVar[int]
    DURATION_SECONDS_FIELD_NUMBER: _ClassVar[int]
    conversation_id: str
    mode: str
    message_count: int
    duration_seconds: float
    def __init__(self, conversation_id: _Optional[str] = ..., mode: _Optional[str] = ..., message_count: _Optional[int] = ..., duration_seconds: _Optional[float] = ...) -> None: ...

class ConversationFailedPayload(_message.Message):
    __slots__ = ("conversation_id", "mode", "message_count", "duration_seconds", "reason")
    CONVERSATION_ID_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_COUNT_FIELD_NUMBER: _ClassVar[int]
    DURATION_SECONDS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    conversation_id: str
    mode: str
    message_count: int
    duration_seconds: float
    reason: str
    def __init__(self, conversation_id: _Optional[str] = ..., mode: _Optional[str] = ..., message_count: _Optional[int] = ..., duration_seconds: _Optional[float] = ..., reason: _Optional[str] = ...) -> None: ...

class MessageSentPayload(_message.Message):
    __slots__ = ("conversation_id", "message_id", "role", "content", "mode", "content_length", "model", "input_tokens", "output_tokens", "cost_dollars", "latency_seconds")
    CONVERSATION_ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COST_DOLLARS_FIELD_NUMBER: _ClassVar[int]
    LATENCY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    conversation_id: str
    message_id: str
    role: str
    content: str
    mode: str
    content_length: int
    model: str
    input_tokens: int
    output_tokens: int
    cost_dollars: float
    latency_seconds: float
    def __init__(self, conversation_id: _Optional[str] = ..., message_id: _Optional[str] = ..., role: _Optional[str] = ..., content: _Optional[str] = ..., mode: _Optional[str] = ..., content_length: _Optional[int] = ..., model: _Optional[str] = ..., input_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., cost_dollars: _Optional[float] = ..., latency_seconds: _Optional[float] = ...) -> None: ...
