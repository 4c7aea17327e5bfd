"""The bytes of an event, for people to read."""

import json

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError

from .proto.base_event_pb2 import BaseEvent


def decoded(value: bytes | memoryview | None) -> str:
    """A BaseEvent as JSON with the specification's field names; hex where it cannot be read, and why.

    A payload of a message that this code does not know, or that is damaged, is shown as hex in its event.
    """
    raw = bytes(value or b"")
    try:
        base = BaseEvent.FromString(raw)
        fields = _fields(base)
    except (DecodeError, ValueError) as error:
        return f"not decodable: {error}\n{raw.hex(' ')}"
    return json.dumps(fields, indent=2, ensure_ascii=False)


def _fields(base: BaseEvent) -> dict[str, object]:
    try:
        return MessageToDict(base, preserving_proto_field_name=True)
    except (TypeError, DecodeError) as error:
        payload = {"@type": base.payload.type_url, "not decodable": str(error), "hex": base.payload.value.hex(" ")}
        envelope = BaseEvent()
        envelope.CopyFrom(base)
        envelope.ClearField("payload")
        return {**MessageToDict(envelope, preserving_proto_field_name=True), "payload": payload}
