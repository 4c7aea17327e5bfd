from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class BudgetExceededPayload(_message.Message):
    __slots__ = ("day", "measure", "value", "average", "limit")
    DAY_FIELD_NUMBER: _ClassVar[int]
    MEASURE_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    AVERAGE_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    day: str
    measure: str
    value: float
    average: float
    limit: float
    def __init__(self, day: _Optional[str] = ..., measure: _Optional[str] = ..., value: _Optional[float] = ..., average: _Optional[float] = ..., limit: _Optional[float] = ...) -> None: ...
