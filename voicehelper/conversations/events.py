"""Event types of the conversation domain. The aggregate is the conversation."""

from events_outbox import register_event
from voicehelper.proto.conversation_pb2 import (
    ConversationCompletedPayload,
    ConversationCreatedPayload,
    ConversationFailedPayload,
    MessageSentPayload,
)

CONVERSATION_CREATED = register_event("conversation.created", ConversationCreatedPayload)
CONVERSATION_COMPLETED = register_event("conversation.completed", ConversationCompletedPayload)
CONVERSATION_FAILED = register_event("conversation.failed", ConversationFailedPayload)
MESSAGE_SENT = register_event("conversation.message.sent", MessageSentPayload)
