"""Event types of the conversation domain. The aggregate is the conversation."""

from events_outbox import register_event
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload, MessageSentPayload

CONVERSATION_CREATED = register_event("conversation.created", ConversationCreatedPayload)
MESSAGE_SENT = register_event("conversation.message.sent", MessageSentPayload)
