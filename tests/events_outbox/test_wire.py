"""What lies in Kafka, read by programs that are not ours: kcat, protoc, and the broker's own files."""

import struct
import subprocess
from pathlib import Path

import grpc_tools
import pytest
from django.db import transaction

from events_outbox import NewEvent, emit_event, emit_events
from events_outbox.models import OutboxEvent
from events_outbox.proto.base_event_pb2 import BaseEvent
from events_outbox.relay import Relay
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload, MessageSentPayload

pytestmark = pytest.mark.django_db(transaction=True)

ROOT = Path(__file__).resolve().parents[2]
SNAPPY = 2  # Kafka protocol, record batch attributes, bits 0-2


@pytest.fixture
def published(topic_reader):
    """Emit and publish one message event; return its row and where it lies."""
    with transaction.atomic():
        row = emit_event(
            "conversation.message.sent",
            MessageSentPayload(conversation_id="c1", message_id="m1", role="user", content="hello Kafka", mode="chat"),
            aggregate_id="c1",
            tenant_id="t1",
            user_id="u1",
            metadata={"source": "conversation-service"},
            correlation_id="corr-1",
        )
    Relay().run(until_empty=True)
    (message,) = topic_reader.read(1)
    return row, message.partition(), message.offset()


def kcat(kafka, partition, offset, template):
    command = ["kcat", "-C", "-b", kafka.bootstrap_servers, "-t", "conversation.events", "-p", str(partition)]
    command += ["-o", str(offset), "-c", "1", "-e", "-q", "-f", template]
    return subprocess.run(command, capture_output=True, check=True, timeout=30).stdout


@pytest.mark.needs_tool("kcat")
def test_kcat_reads_topic_key_headers_and_the_rows_bytes(kafka, published):
    row, partition, offset = published
    assert kcat(kafka, partition, offset, "%t|%k|%S") == f"conversation.events|c1|{len(row.value)}".encode()
    headers = kcat(kafka, partition, offset, "%h").decode().split(",")
    assert headers == [
        "event_type=conversation.message.sent",
        "tenant_id=t1",
        "correlation_id=corr-1",
        f"event_id={row.event_id}",
        "event_version=v1",
        "content-type=application/x-protobuf; messageType=voicehelper.events.v1.BaseEvent",
    ]
    assert kcat(kafka, partition, offset, "%s") == bytes(row.value)


def protoc_decode(message, source, data):
    command = ["protoc", "-I.", f"-I{Path(grpc_tools.__file__).parent / '_proto'}", f"--decode={message}", source]
    return subprocess.run(command, cwd=ROOT, input=data, capture_output=True, check=True).stdout.decode()


@pytest.mark.needs_tool("kcat")
@pytest.mark.needs_tool("protoc")
def test_protoc_decodes_it_with_the_committed_proto_files(kafka, published):
    row, partition, offset = published
    value = kcat(kafka, partition, offset, "%s")
    text = protoc_decode("voicehelper.events.v1.BaseEvent", "events_outbox/proto/base_event.proto", value)
    for line in (
        f'event_id: "{row.event_id}"',
        'event_type: "conversation.message.sent"',
        'event_version: "v1"',
        'aggregate_id: "c1"',
        'tenant_id: "t1"',
        'user_id: "u1"',
        'correlation_id: "corr-1"',
        'type_url: "type.googleapis.com/voicehelper.conversation.v1.MessageSentPayload"',
    ):
        assert line in text
    payload = BaseEvent.FromString(value).payload.value
    text = protoc_decode(
        "voicehelper.conversation.v1.MessageSentPayload", "voicehelper/proto/conversation.proto", payload
    )
    assert 'content: "hello Kafka"' in text and 'mode: "chat"' in text


@pytest.mark.apache_kafka
def test_batches_are_snappy_in_the_brokers_files(kafka, topic_reader):
    with transaction.atomic():
        emit_events(
            NewEvent(
                event_type="conversation.created",
                payload=ConversationCreatedPayload(title="a title that is much like the others"),
                aggregate_id="one-key",
                tenant_id="t1",
            )
            for _ in range(200)
        )
    Relay().run(until_empty=True)
    messages = topic_reader.read(200)
    first = min(message.offset() for message in messages)
    codecs = codecs_of_batches(kafka.data_dir, "conversation.events", messages[0].partition(), first)
    assert codecs and set(codecs) == {SNAPPY}
    assert OutboxEvent.objects.count() == 200


def codecs_of_batches(data_dir, topic, partition, from_offset):
    """The compression codecs of a partition's record batches, by the record batch format (magic 2)."""
    codecs = []
    for segment in sorted((data_dir / "log" / f"{topic}-{partition}").glob("*.log")):
        data, position = segment.read_bytes(), 0
        while position + 61 <= len(data):
            base_offset, length, _epoch, magic, _crc, attributes, _last_delta = struct.unpack_from(
                ">qiibihi", data, position
            )
            if length <= 0:
                break  # preallocated space
            assert magic == 2
            if base_offset >= from_offset:
                codecs.append(attributes & 0b111)
            position += 12 + length
    return codecs
