"""Conversations and their messages."""

from uuid import UUID

from django.conf import settings
from django.db import models
from uuid_utils.compat import uuid7


class ConversationQuerySet(models.QuerySet["Conversation"]):
    def for_tenant(self, tenant_id: UUID) -> "ConversationQuerySet":
        """What the users of a tenant may see."""
        return self.filter(tenant_id=tenant_id)


class Conversation(models.Model):
    """A thread of messages that a user opened. Everybody in the tenant may read it and write to it."""

    class Mode(models.TextChoices):
        CHAT = "chat"
        AGENT = "agent"
        WORKFLOW = "workflow"
        VOICE = "voice"

    TITLE_MAX_CHARS = 200

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    # No index of its own: the one below begins with it.
    tenant = models.ForeignKey("identity.Tenant", on_delete=models.PROTECT, related_name="+", db_index=False)
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+")
    title = models.CharField(max_length=TITLE_MAX_CHARS)
    mode = models.CharField(max_length=20, choices=Mode.choices, default=Mode.CHAT)
    message_count = models.PositiveIntegerField(default=0)
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    objects = ConversationQuerySet.as_manager()

    class Meta:
        ordering = ["-id"]
        indexes = [models.Index(fields=["tenant", "-id"], name="conversation_newest_first")]

    def __str__(self) -> str:
        return self.title


class Message(models.Model):
    """One message. `position` counts from 1 within the conversation, without gaps."""

    class Role(models.TextChoices):
        USER = "user"
        ASSISTANT = "assistant"
        SYSTEM = "system"

    CONTENT_MAX_CHARS = 32_000

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    # No index of its own: the constraint below begins with it.
    conversation = models.ForeignKey(Conversation, on_delete=models.PROTECT, related_name="messages", db_index=False)
    tenant = models.ForeignKey("identity.Tenant", on_delete=models.PROTECT, related_name="+", db_index=False)
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+")
    position = models.PositiveIntegerField()
    role = models.CharField(max_length=20, choices=Role.choices, default=Role.USER)
    content = models.TextField()
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["conversation", "position"]
        constraints = [models.UniqueConstraint(fields=["conversation", "position"], name="message_position")]

    def __str__(self) -> str:
        return f"{self.role} {self.position}"
