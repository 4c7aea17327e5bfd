"""The catalog: names, versions, routing, and generated code that is current."""

import subprocess
import sys
from pathlib import Path

import pytest

from events_outbox import register_event
from events_outbox.catalog import check_event_type, event_type_for, event_types, topic_for, topics
from events_outbox.exceptions import DuplicateRegistration, InvalidEventType
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "name", ["conversation.created", "conversation.message.sent", "llm.api_key.leaked", "a.b.c.read"]
)
def test_names_of_facts_are_accepted(name):
    check_event_type(name)


@pytest.mark.parametrize(
    "name",
    [
        "created",
        "conversation.create",
        "Conversation.created",
        "conversation..created",
        ".created",
        "conversation.created ",
        "conversation.creating",
        "",
        "conversation.message send",
        "x." + "y" * 130 + "ed",
        None,
    ],
)
def test_other_names_are_refused(name):
    with pytest.raises(InvalidEventType, match="past-tense verb"):
        check_event_type(name)


def test_a_type_is_registered_once_and_versions_look_like_v1():
    with pytest.raises(DuplicateRegistration):
        register_event("conversation.created", ConversationCreatedPayload)
    with pytest.raises(InvalidEventType, match="v1, v2"):
        register_event("conversation.created", ConversationCreatedPayload, version="1")


def test_the_specifications_event_types_are_there():
    names = {entry.name for entry in event_types()}
    assert {"conversation.created", "conversation.message.sent", "document.uploaded"} <= names
    assert {"identity.user.registered", "notification.created"} <= names
    assert event_type_for("conversation.created", "v1").payload is ConversationCreatedPayload


@pytest.mark.parametrize(
    ("name", "topic"),
    [
        ("conversation.message.sent", "conversation.events"),
        ("document.uploaded", "document.events"),
        ("identity.user.registered", "identity.events"),
        ("notification.created", "default.events"),
        ("conversational.thing.done", "default.events"),
    ],
)
def test_topics_follow_the_domain(name, topic):
    assert topic_for(name) == topic


def test_all_topics():
    assert topics() == ["conversation.events", "default.events", "document.events", "identity.events"]


def test_generated_code_is_current(tmp_path):
    sources = [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("*/proto/*.proto"))]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    subprocess.run([*command, *sources], cwd=ROOT, check=True)
    generated = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*_pb2.py*"))
    assert len(generated) == 2 * len(sources)
    for path in generated:
        assert (tmp_path / path).read_text() == (ROOT / path).read_text(), f"{path} is stale: run `make proto`"
