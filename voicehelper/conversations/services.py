"""Writes of the conversation domain."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from django.db import transaction
from django.db.models import Q
from django.utils import timezone
from uuid_utils.compat import uuid7

from events_outbox import emit_event
from voicehelper.assistant.orchestrator import HISTORY_MAX_MESSAGES, Answer
from voicehelper.assistant.providers import Turn
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


REPLY_LEASE = timedelta(seconds=30)
"""A reply that is not prolonged for so long is dead: its process was killed. Another one may begin."""


class ConversationEnded(Exception):
    """The conversation has ended: it takes no message, and does not end again."""


class NotSpoken(ValueError):
    """A message is said to be spoken, but its conversation is not in the mode voice."""


class NothingToAnswer(Exception):
    """The conversation has no message of a user that is not answered."""


class ReplyInProgress(Exception):
    """The assistant is replying in the conversation already."""


class ReplyLost(Exception):
    """The reply has been given up for dead: it was not prolonged in time."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A reply that has begun. `turns`: the last that was said in the conversation, and the question at last.

    `earlier_messages`: how many the conversation has before the question.
    """

    id: UUID
    conversation_id: UUID
    tenant_id: UUID
    mode: str
    question_id: UUID
    turns: list[Turn]
    earlier_messages: int


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
def send_message(
    *,
    user: User,
    conversation_id: UUID,
    content: str,
    role: str = Message.Role.USER,
    duration_ms: int | None = None,
) -> Message:
    """Append a message to a conversation of the user's tenant and emit conversation.message.sent.

    `duration_ms`: of a message that was spoken, whose content is the transcript. Raises Conversation.DoesNotExist when
    the tenant has no such conversation, ConversationEnded when it has ended, NotSpoken for a duration outside of the
    mode voice.
    """
    conversation = _lock_active(user, conversation_id)
    if duration_ms is not None and conversation.mode != Conversation.Mode.VOICE:
        raise NotSpoken(f"the mode of conversation {conversation_id} is {conversation.mode}, not voice")
    return _append(conversation, user, role=role, content=content, duration_ms=duration_ms)


def _append(conversation: Conversation, user: User, **fields: Any) -> Message:
    """Append a message to a conversation that is locked."""
    conversation.message_count += 1
    conversation.save(update_fields=["message_count", "reply_id", "reply_until", "updated_at"])
    message = Message.objects.create(
        conversation=conversation,
        tenant_id=conversation.tenant_id,
        user=user,
        position=conversation.message_count,
        **fields,
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
            model=message.model,
            input_tokens=message.input_tokens or 0,
            output_tokens=message.output_tokens or 0,
            cost_dollars=message.cost_dollars or 0,
            latency_seconds=message.latency_seconds or 0,
        ),
        aggregate_id=conversation.id,
        tenant_id=conversation.tenant_id,
        user_id=user.id,
        metadata=METADATA,
    )
    return message


@transaction.atomic
def begin_reply(*, user: User, conversation_id: UUID) -> Reply:
    """Begin the assistant's reply to the last message of a user; finish, fail or abandon it afterwards.

    Raises Conversation.DoesNotExist when the tenant has no such conversation, ConversationEnded when it has ended,
    ReplyInProgress, NothingToAnswer.
    """
    conversation = _lock_active(user, conversation_id)
    now = timezone.now()
    if conversation.reply_until is not None and conversation.reply_until > now:
        raise ReplyInProgress
    question = conversation.messages.filter(role=Message.Role.USER).order_by("-position").first()
    if question is None:
        raise NothingToAnswer
    # A reply to an earlier message may come after the question; an answer that somebody has written himself names none.
    later = conversation.messages.filter(role=Message.Role.ASSISTANT, position__gt=question.position)
    if later.filter(Q(answers=None) | Q(answers=question)).exists():
        raise NothingToAnswer
    others = conversation.messages.exclude(id=question.id).order_by("-position")[:HISTORY_MAX_MESSAGES]
    conversation.reply_id, conversation.reply_until = uuid7(), now + REPLY_LEASE
    conversation.save(update_fields=["reply_id", "reply_until"])
    return Reply(
        id=conversation.reply_id,
        conversation_id=conversation.id,
        tenant_id=conversation.tenant_id,
        mode=conversation.mode,
        question_id=question.id,
        turns=[Turn(message.role, message.content) for message in [*reversed(others), question]],
        earlier_messages=conversation.message_count - 1,
    )


def prolong_reply(*, reply: Reply) -> None:
    """Say that a reply still goes on, for REPLY_LEASE from now.

    Raises ConversationEnded when somebody has ended the conversation, ReplyLost when the reply was given up for dead.
    """
    conversations = Conversation.objects.filter(id=reply.conversation_id, reply_id=reply.id)
    if not conversations.update(reply_until=timezone.now() + REPLY_LEASE):
        _raise_if_ended(Conversation.objects.get(id=reply.conversation_id))
        raise ReplyLost


@transaction.atomic
def finish_reply(*, user: User, reply: Reply, answer: Answer) -> Message:
    """Append a reply to its conversation and emit conversation.message.sent.

    Raises ConversationEnded, ReplyLost as `prolong_reply()` does: then nothing is appended.
    """
    conversation = _lock_replying(user, reply)
    conversation.reply_id = conversation.reply_until = None
    return _append(
        conversation,
        user,
        role=Message.Role.ASSISTANT,
        content=answer.content,
        answers_id=reply.question_id,
        model=answer.model,
        input_tokens=answer.input_tokens,
        output_tokens=answer.output_tokens,
        cost_dollars=answer.cost_dollars,
        latency_seconds=answer.latency_seconds,
    )


@transaction.atomic
def fail_reply(*, user: User, reply: Reply, reason: str) -> Conversation:
    """End a conversation in which the assistant cannot reply, and emit conversation.failed with the reason.

    Raises ConversationEnded, ReplyLost as `prolong_reply()` does: then nothing is changed.
    """
    conversation = _lock_replying(user, reply)
    return _end(conversation, user, Conversation.Status.FAILED, reason)


def abandon_reply(*, reply: Reply) -> None:
    """Let another reply begin, now: nobody waits for this one any more."""
    conversations = Conversation.objects.filter(id=reply.conversation_id, reply_id=reply.id)
    conversations.update(reply_id=None, reply_until=None)


@transaction.atomic
def complete_conversation(*, user: User, conversation_id: UUID) -> Conversation:
    """End a conversation that has done what it was opened for, and emit conversation.completed.

    Raises Conversation.DoesNotExist when the tenant has no such conversation, ConversationEnded when it has ended.
    """
    return _end(_lock_active(user, conversation_id), user, Conversation.Status.COMPLETED)


@transaction.atomic
def fail_conversation(*, user: User, conversation_id: UUID) -> Conversation:
    """End a conversation that has not done what it was opened for, and emit conversation.failed.

    Raises Conversation.DoesNotExist when the tenant has no such conversation, ConversationEnded when it has ended.
    """
    return _end(_lock_active(user, conversation_id), user, Conversation.Status.FAILED)


def _end(conversation: Conversation, user: User, status: Conversation.Status, reason: str = "") -> Conversation:
    """End a conversation that is locked. `reason`: why it failed, empty when a person says so."""
    ended_at: datetime = timezone.now()
    conversation.status, conversation.ended_at, conversation.failure_reason = status, ended_at, reason
    conversation.reply_id = conversation.reply_until = None
    conversation.save(update_fields=["status", "ended_at", "failure_reason", "reply_id", "reply_until", "updated_at"])
    payload: ConversationCompletedPayload | ConversationFailedPayload
    if status is Conversation.Status.COMPLETED:
        event_type, payload = CONVERSATION_COMPLETED, ConversationCompletedPayload()
    else:
        event_type, payload = CONVERSATION_FAILED, ConversationFailedPayload(reason=reason)
    payload.conversation_id, payload.mode = str(conversation.id), conversation.mode
    payload.message_count = conversation.message_count
    payload.duration_seconds = (ended_at - conversation.created_at).total_seconds()
    emit_event(
        event_type,
        payload,
        aggregate_id=conversation.id,
        tenant_id=conversation.tenant_id,
        user_id=user.id,
        metadata=METADATA,
    )
    return conversation


def _lock_replying(user: User, reply: Reply) -> Conversation:
    conversation = _lock_active(user, reply.conversation_id)
    if conversation.reply_id != reply.id:
        raise ReplyLost
    return conversation


def _lock_active(user: User, conversation_id: UUID) -> Conversation:
    # The lock gives what happens in a conversation one order, and comes before the emit so that the events have the
    # same one. NO KEY: the key stays, so rows that refer to the conversation need not wait.
    conversation = (
        Conversation.objects.for_tenant(user.own_tenant_id).select_for_update(no_key=True).get(id=conversation_id)
    )
    _raise_if_ended(conversation)
    return conversation


def _raise_if_ended(conversation: Conversation) -> None:
    if conversation.status != Conversation.Status.ACTIVE:
        raise ConversationEnded(f"conversation {conversation.id} is {conversation.status}")
