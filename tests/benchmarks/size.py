"""How many bytes realistic conversation traffic takes on the broker's disk, against JSON."""

import json

from google.protobuf.json_format import MessageToDict

from events_outbox.proto.base_event_pb2 import BaseEvent
from tests.benchmarks.bench import Bench
from tests.benchmarks.report import Row, number


def run(bench: Bench) -> list[Row]:
    count = bench.scale.traffic_events
    with bench.database() as outbox:
        outbox.place("all")
        outbox.seed(count)
        before, bytes_before = bench.ends(), bench.log_bytes()
        outbox.drain("all")
        disk_bytes = bench.log_bytes() - bytes_before
        values = [record.value() for record in bench.records_since(before)]
    as_json = sum(map(json_bytes, values))
    as_protobuf = sum(map(len, values))
    return [
        Row(
            measure="Protobuf+Snappy bytes on the broker's disk / JSON uncompressed, on realistic conversation traffic",
            value=disk_bytes / as_json,
            unit="x",
            must="<= 0.5",
            baseline=f"the same events as JSON (payload inline, no spaces, without key and headers), "
            f"{number(as_json / count)} bytes an event",
            detail=f"{count:,} events from emit_events() through the relay; log segments with keys, headers and batch "
            f"overhead {number(disk_bytes / count)} bytes an event, the Protobuf values alone, uncompressed, "
            f"{number(as_protobuf / count)}; text of single words by their frequency in English prose",
        )
    ]


def as_dict(value: bytes) -> dict:
    """The event as a service that speaks JSON would write it: all eleven fields, the payload inline."""
    from events_outbox.catalog import event_type_for

    base = BaseEvent.FromString(value)
    payload = event_type_for(base.event_type, base.event_version).payload()
    base.payload.Unpack(payload)
    plain = {
        field.name: getattr(base, field.name) for field in base.DESCRIPTOR.fields if field.type == field.TYPE_STRING
    }
    return plain | {
        "timestamp": base.timestamp.ToJsonString(),
        "payload": MessageToDict(payload, preserving_proto_field_name=True),
        "metadata": dict(base.metadata),
    }


def json_bytes(value: bytes) -> int:
    return len(json.dumps(as_dict(value), ensure_ascii=False, separators=(",", ":")).encode())
