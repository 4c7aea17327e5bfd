"""Writes of the conversation domain."""

from uuid import UUID

from django.db import transaction
from django.utils import timezone

from events_outbox import emit_event
from voicehelper.identity.models import User
from voicehelper.proto.conversation_pb2 import (
    ConversationCompletedPayload,
    ConversationCreatedPayload,
    ConversationFailedPayload,
    MessageSentPayload,
)

from .events import CONVERSATION_COMPLETED, CONVERSATION_CREATED, CONVERSATION_FAILED, MESSAGE_SENT
from .models import Conversation, Message

# Names the producer within an event's metadata (specification, publishing example).
METADATA = {"source": "conversation-service"}


class ConversationEnded(Exception):
    """The conversation has ended: it takes no message, and does not end again."""


@transaction.atomic
def create_conversation(*, user: User, title: str, mode: str = Conversation.Mode.CHAT) -> Conversation:
    """Open a conversation in the user's tenant and emit conversation.created."""
    conversation = Conversation.objects.create(tenant_id=user.own_tenant_id, user=user, title=title, mode=mode)
    emit_event(
        CONVERSATION_CREATED,
        ConversationCreatedPayload(
            conversation_id=str(conversation.id), title=conversation.title, mode=conversation.mode
        ),
        aggregate_id=conversation.id,
        tenant_id=conversation.tenant_id,
        user_id=user.id,
        metadata=METADATA,
    )
    return conversation


@transaction.atomic
def send_message(*, user: User, conversation_id: UUID, content: str, role: str = Message.Role.USER) -> Message:
    """Append a message to a conversation of the user's tenant and emit conversation.message.sent.

    Raises Conversation.DoesNotExist when the tenant has no such conversation, ConversationEnded when it has ended.
    """
    conversation = _lock_active(user, conversation_id)
    conversation.message_count += 1
    conversation.save(update_fields=["message_count", "updated_at"])
    message = Message.objects.create(
        conversation=conversation,
        tenant_id=conversation.tenant_id,
        user=user,
        position=conversation.message_count,
        role=role,
        content=content,
    )
    emit_event(
        MESSAGE_SENT,
        MessageSentPayload(
            conversation_id=str(conversation.id),
            message_id=str(message.id),
            role=message.role,
            content=message.content,
            mode=conversation.mode,
            content_length=len(message.content),
        ),
        aggregate_id=conversation.id,
        tenant_id=conversation.tenant_id,
        user_id=user.id,
        metadata=METADATA,
    )
    return message


def complete_conversation(*, user: User, conversation_id: UUID) -> Conversation:
    """End a conversation that has done what it was opened for, and emit conversation.completed.

    Raises Conversation.DoesNotExist when the tenant has no such conversation, ConversationEnded when it has ended.
    """
    return _end(
        user, conversation_id, Conversation.Status.COMPLETED, CONVERSATION_COMPLETED, ConversationCompletedPayload
    )


def fail_conversation(*, user: User, conversation_id: UUID) -> Conversation:
    """End a conversation that has not done what it was opened for, and emit conversation.failed.

    Raises Conversation.DoesNotExist when the tenant has no such conversation, ConversationEnded when it has ended.
    """
    return _end(user, conversation_id, Conversation.Status.FAILED, CONVERSATION_FAILED, ConversationFailedPayload)


@transaction.atomic
def _end(
    user: User,
    conversation_id: UUID,
    status: Conversation.Status,
    event_type: str,
    payload: type[ConversationCompletedPayload | ConversationFailedPayload],
) -> Conversation:
    conversation = _lock_active(user, conversation_id)
    conversation.status, conversation.ended_at = status, timezone.now()
    conversation.save(update_fields=["status", "ended_at", "updated_at"])
    emit_event(
        event_type,
        payload(conversation_id=str(conversation.id), mode=conversation.mode, message_count=conversation.message_count),
        aggregate_id=conversation.id,
        tenant_id=conversation.tenant_id,
        user_id=user.id,
        metadata=METADATA,
    )
    return conversation


def _lock_active(user: User, conversation_id: UUID) -> Conversation:
    # The lock gives what happens in a conversation one order, and comes before the emit so that the events have the
    # same one. NO KEY: the key stays, so rows that refer to the conversation need not wait.
    conversation = (
        Conversation.objects.for_tenant(user.own_tenant_id).select_for_update(no_key=True).get(id=conversation_id)
    )
    if conversation.status != Conversation.Status.ACTIVE:
        raise ConversationEnded(f"conversation {conversation_id} is {conversation.status}")
    return conversation
