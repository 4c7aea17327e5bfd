"""The bytes of an event, for people to read."""

import json
from typing import Any

from google.protobuf.json_format import Error as JSONError
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError

from .proto.base_event_pb2 import BaseEvent


def decoded(value: bytes | memoryview | None, *, instead_of_payload: str = "") -> str:
    """A BaseEvent as JSON with the specification's field names; hex where it cannot be read, and why.

    A payload of a message that this code does not know, or that is damaged, is shown as hex in its event.
    `instead_of_payload`: a sentence that takes the place of the payload's content, and of bytes that are no event.
    """
    raw = bytes(value or b"")
    try:
        base = BaseEvent.FromString(raw)
        payload = _named(base, instead_of_payload) if instead_of_payload else _payload(base)
        fields = {**envelope(base), **({"payload": payload} if base.HasField("payload") else {})}
    except (DecodeError, ValueError, JSONError) as error:
        return f"not decodable: {error}\n{instead_of_payload or raw.hex(' ')}"
    return json.dumps(fields, indent=2, ensure_ascii=False)


def envelope(base: BaseEvent) -> dict[str, Any]:
    """The fields of a BaseEvent that are set, without its payload. Raises ValueError for a timestamp out of range."""
    without = BaseEvent()
    without.CopyFrom(base)
    without.ClearField("payload")
    fields: dict[str, Any] = MessageToDict(without, preserving_proto_field_name=True)
    return fields


def _payload(base: BaseEvent) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = MessageToDict(base.payload, preserving_proto_field_name=True)
    except (TypeError, DecodeError, ValueError, JSONError) as error:
        return {"@type": base.payload.type_url, "not decodable": str(error), "hex": base.payload.value.hex(" ")}
    return fields


def _named(base: BaseEvent, note: str) -> dict[str, Any]:
    return {"@type": base.payload.type_url, "not shown": note, "size_bytes": len(base.payload.value)}
