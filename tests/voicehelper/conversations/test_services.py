from concurrent.futures import ThreadPoolExecutor

import pytest
from django.db import IntegrityError, connection, transaction

from events_outbox.models import OutboxEvent
from voicehelper.conversations.models import Conversation, Message
from voicehelper.conversations.services import (
    ConversationEnded,
    NotSpoken,
    complete_conversation,
    create_conversation,
    fail_conversation,
    send_message,
)

ENDINGS = [("completed", complete_conversation), ("failed", fail_conversation)]


def test_create_conversation_emits_the_fact(bob, emitted):
    conversation = create_conversation(user=bob, title="Roadmap", mode="agent")

    [event] = emitted("conversation.created")
    assert event.topic == "conversation.events"
    assert event.aggregate_id == event.payload.conversation_id == str(conversation.id)
    assert (event.tenant_id, event.user_id) == (str(bob.tenant_id), str(bob.id))
    assert (event.payload.title, event.payload.mode) == ("Roadmap", "agent")
    assert event.metadata == {"source": "conversation-service"}


def test_send_message_emits_the_fact(alice, bob, emitted):
    conversation = create_conversation(user=bob, title="Roadmap", mode="voice")
    updated_before = conversation.updated_at
    message = send_message(user=alice, conversation_id=conversation.id, content="Grüße 👋", role="assistant")

    [event] = emitted("conversation.message.sent")
    assert event.aggregate_id == event.payload.conversation_id == str(conversation.id)
    assert (event.tenant_id, event.user_id) == (str(alice.tenant_id), str(alice.id))
    assert event.payload.message_id == str(message.id)
    assert (event.payload.role, event.payload.mode) == ("assistant", "voice")
    assert (event.payload.content, event.payload.content_length) == ("Grüße 👋", 7)
    assert (event.payload.model, event.payload.output_tokens, event.payload.cost_dollars) == ("", 0, 0)
    conversation.refresh_from_db()
    assert conversation.message_count == message.position == 1
    assert conversation.updated_at > updated_before


def test_a_spoken_message(bob):
    conversation = create_conversation(user=bob, title="Roadmap", mode="voice")
    spoken = send_message(user=bob, conversation_id=conversation.id, content="Hello", duration_ms=1_250)
    typed = send_message(user=bob, conversation_id=conversation.id, content="Hello")
    assert (spoken.duration_ms, typed.duration_ms) == (1_250, None)
    chat = create_conversation(user=bob, title="Roadmap")
    with pytest.raises(NotSpoken, match="chat, not voice"):
        send_message(user=bob, conversation_id=chat.id, content="Hello", duration_ms=1_250)
    chat.refresh_from_db()
    assert (chat.message_count, chat.messages.count()) == (0, 0)


def test_a_rolled_back_write_emits_nothing(bob):
    conversation = create_conversation(user=bob, title="Roadmap")
    events_before = OutboxEvent.objects.count()

    with pytest.raises(RuntimeError), transaction.atomic():
        create_conversation(user=bob, title="Never")
        send_message(user=bob, conversation_id=conversation.id, content="Never")
        assert OutboxEvent.objects.count() == events_before + 2
        raise RuntimeError

    assert OutboxEvent.objects.count() == events_before
    assert Conversation.objects.get().message_count == 0
    assert not Message.objects.exists()


def test_a_failing_emit_takes_the_write_with_it(bob, settings):
    conversation = create_conversation(user=bob, title="Roadmap")
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "MAX_EVENT_BYTES": 1_000}

    with pytest.raises(ValueError, match="MAX_EVENT_BYTES"):
        send_message(user=bob, conversation_id=conversation.id, content="x" * 1_000)

    assert Conversation.objects.get().message_count == 0
    assert not Message.objects.exists()


def test_a_conversation_of_another_tenant_does_not_exist(bob, charlie, emitted):
    conversation = create_conversation(user=bob, title="Roadmap")

    with pytest.raises(Conversation.DoesNotExist):
        send_message(user=charlie, conversation_id=conversation.id, content="Let me in")

    assert not Message.objects.exists()
    assert emitted("conversation.message.sent") == []


@pytest.mark.django_db(transaction=True)
def test_concurrent_messages_are_counted_and_ordered_exactly(alice, bob, emitted):
    conversation = create_conversation(user=bob, title="Roadmap")

    def send(number: int) -> None:
        try:
            send_message(user=(alice, bob)[number % 2], conversation_id=conversation.id, content=str(number))
        finally:
            connection.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(send, range(80)))

    conversation.refresh_from_db()
    assert conversation.message_count == 80
    messages = list(conversation.messages.order_by("position"))
    assert [message.position for message in messages] == list(range(1, 81))
    # The events are in the order of the messages: the emit came under the lock.
    in_events = [event.payload.message_id for event in emitted("conversation.message.sent")]
    assert in_events == [str(message.id) for message in messages]


@pytest.mark.parametrize(("status", "end"), ENDINGS)
def test_ending_a_conversation_emits_the_fact(alice, bob, emitted, status, end):
    conversation = create_conversation(user=bob, title="Roadmap", mode="voice")
    send_message(user=bob, conversation_id=conversation.id, content="Hi")
    updated_before = conversation.updated_at
    ended = end(user=alice, conversation_id=conversation.id)

    conversation.refresh_from_db()
    assert (conversation.status, conversation.ended_at) == (status, ended.ended_at)
    assert conversation.updated_at > updated_before
    [event] = emitted(f"conversation.{status}")
    assert event.aggregate_id == event.payload.conversation_id == str(conversation.id)
    assert (event.tenant_id, event.user_id) == (str(alice.tenant_id), str(alice.id))
    assert (event.payload.mode, event.payload.message_count) == ("voice", 1)
    lasted = conversation.ended_at - conversation.created_at
    assert event.payload.duration_seconds == pytest.approx(lasted.total_seconds()) and lasted.total_seconds() > 0
    # A person has ended it, and need not say why.
    assert getattr(event.payload, "reason", "") == conversation.failure_reason == ""
    assert event.metadata == {"source": "conversation-service"}


@pytest.mark.parametrize(("status", "end"), ENDINGS)
def test_a_conversation_that_has_ended_takes_nothing_more(bob, emitted, status, end):
    conversation = create_conversation(user=bob, title="Roadmap")
    end(user=bob, conversation_id=conversation.id)
    events_before = OutboxEvent.objects.count()

    for _, again in ENDINGS:
        with pytest.raises(ConversationEnded, match=status):
            again(user=bob, conversation_id=conversation.id)
    with pytest.raises(ConversationEnded):
        send_message(user=bob, conversation_id=conversation.id, content="One more thing")

    conversation.refresh_from_db()
    assert (conversation.status, conversation.message_count) == (status, 0)
    assert OutboxEvent.objects.count() == events_before


@pytest.mark.parametrize(("status", "end"), ENDINGS)
def test_a_conversation_of_another_tenant_cannot_be_ended(bob, charlie, status, end):
    conversation = create_conversation(user=bob, title="Roadmap")
    with pytest.raises(Conversation.DoesNotExist):
        end(user=charlie, conversation_id=conversation.id)
    conversation.refresh_from_db()
    assert (conversation.status, conversation.ended_at) == ("active", None)


@pytest.mark.parametrize("fields", [{"status": "failed"}, {"ended_at": "2026-03-01T00:00:00Z"}, {"status": "lost"}])
def test_the_database_knows_when_a_conversation_has_ended(bob, fields):
    conversation = create_conversation(user=bob, title="Roadmap")
    with pytest.raises(IntegrityError), transaction.atomic():
        Conversation.objects.filter(id=conversation.id).update(**fields)


@pytest.mark.django_db(transaction=True)
def test_of_several_who_end_a_conversation_at_once_one_does(alice, bob, emitted):
    conversation = create_conversation(user=bob, title="Roadmap")

    def end(number: int) -> bool:
        try:
            ENDINGS[number % 2][1](user=(alice, bob)[number % 2], conversation_id=conversation.id)
        except ConversationEnded:
            return False
        else:
            return True
        finally:
            connection.close()

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(end, range(16))) == 1

    conversation.refresh_from_db()
    assert [len(emitted(f"conversation.{status}")) for status, _ in ENDINGS] == [
        conversation.status == status for status, _ in ENDINGS
    ]
