from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class NotificationCreatedPayload(_message.Message):
    __slots__ = ("notification_id", "recipient_id", "kind", "subject")
    NOTIFICATION_ID_FIELD_NUMBER: _ClassVar[int]
    RECIPIENT_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    notification_id: str
    recipient_id: str
    kind: str
    subject: str
    def __init__(self, notification_id: _Optional[str] = ..., recipient_id: _Optional[str] = ..., kind: _Optional[str] = ..., subject: _Optional[str] = ...) -> None: ...

class NotificationSentPayload(_message.Message):
    __slots__ = ("notification_id", "recipient_id", "channel", "kind", "attempts")
    NOTIFICATION_ID_FIELD_NUMBER: _ClassVar[int]
    RECIPIENT_ID_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    notification_id: str
    recipient_id: str
    channel: str
    kind: str
    attempts: int
    def __init__(self, notification_id: _Optional[str] = ..., recipient_id: _Optional[str] = ..., channel: _Optional[str] = ..., kind: _Optional[str] = ..., attempts: _Optional[int] = ...) -> None: ...

class NotificationFailedPayload(_message.Message):
    __slots__ = ("notification_id", "recipient_id", "channel", "kind", "attempts", "error")
    NOTIFICATION_ID_FIELD_NUMBER: _ClassVar[int]
    RECIPIENT_ID_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    notification_id: str
    recipient_id: str
    channel: str
    kind: str
    attempts: int
    error: str
    def __init__(self, notification_id: _Optional[str] = ..., recipient_id: _Optional[str] = ..., channel: _Optional[str] = ..., kind: _Optional[str] = ..., attempts: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...
