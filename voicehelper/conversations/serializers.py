"""Shapes of the conversation API. Text fields refuse NUL characters and unpaired surrogates by themselves."""

from typing import Any

from rest_framework import serializers

from .models import Conversation, Message


class NewConversation(serializers.Serializer[Any]):
    title = serializers.CharField(max_length=Conversation.TITLE_MAX_CHARS)
    mode = serializers.ChoiceField(choices=Conversation.Mode.choices, default=Conversation.Mode.CHAT)


class NewMessage(serializers.Serializer[Any]):
    conversation_id = serializers.UUIDField()
    content = serializers.CharField(max_length=Message.CONTENT_MAX_CHARS, trim_whitespace=False)
    role = serializers.ChoiceField(choices=Message.Role.choices, default=Message.Role.USER)
    # Of a message that was spoken: `content` is its transcript.
    duration_ms = serializers.IntegerField(min_value=1, max_value=Message.DURATION_MAX_MS, required=False)


class ConversationSerializer(serializers.ModelSerializer[Conversation]):
    user_id = serializers.UUIDField(read_only=True)

    class Meta:
        model = Conversation
        fields = [
            *("id", "title", "mode", "status", "user_id", "message_count", "created_at", "updated_at", "ended_at"),
            "failure_reason",
        ]
        read_only_fields = fields


class ReplyEvent(serializers.Serializer[Any]):
    """One server-sent event of a reply: `replies.EventStream` says what comes, and when."""

    event = serializers.ChoiceField(choices=["token", "restart", "message", "error"])
    data = serializers.CharField(  # type: ignore[assignment]  # no attribute: a field
        help_text='JSON: `{"text": ...}` of a token, the Message that is stored, the Problem of an error.'
    )


class MessageSerializer(serializers.ModelSerializer[Message]):
    conversation_id = serializers.UUIDField(read_only=True)
    user_id = serializers.UUIDField(read_only=True)

    class Meta:
        model = Message
        fields = [
            *("id", "conversation_id", "user_id", "position", "role", "content", "duration_ms", "created_at"),
            *("model", "input_tokens", "output_tokens", "cost_dollars", "latency_seconds"),
        ]
        read_only_fields = fields
