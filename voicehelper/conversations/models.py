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
    """A thread of messages that a user opened. Everybody in the tenant may read it, write to it and end it.

    It is active until it ends, once, as completed or failed; `ended_at` is None so long. `failure_reason` is empty when
    a person ended it. While the assistant replies, `reply_id` names that reply until `reply_until`: one that has not
    been prolonged by then is dead.
    """

    class Mode(models.TextChoices):
        CHAT = "chat"
        AGENT = "agent"
        WORKFLOW = "workflow"
        VOICE = "voice"

    class Status(models.TextChoices):
        ACTIVE = "active"
        COMPLETED = "completed"
        FAILED = "failed"

    TITLE_MAX_CHARS = 200

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    # No index of its own: the one below begins with it.
    tenant = models.ForeignKey("identity.Tenant", on_delete=models.PROTECT, related_name="+", db_index=False)
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+")
    title = models.CharField(max_length=TITLE_MAX_CHARS)
    mode = models.CharField(max_length=20, choices=Mode.choices, default=Mode.CHAT)
    # Also by the database, for the version before this one, which may still be running when it is migrated.
    status = models.CharField(max_length=20, choices=Status.choices, default=Status.ACTIVE, db_default=Status.ACTIVE)
    message_count = models.PositiveIntegerField(default=0)
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)
    ended_at = models.DateTimeField(null=True, blank=True)
    failure_reason = models.CharField(max_length=50, blank=True, default="", db_default="")
    reply_id = models.UUIDField(null=True, blank=True)
    reply_until = models.DateTimeField(null=True, blank=True)

    objects = ConversationQuerySet.as_manager()

    class Meta:
        ordering = ["-id"]
        indexes = [
            models.Index(fields=["tenant", "-id"], name="conversation_newest_first"),
            # All that success_rate.py reads: it need not look at the rows.
            models.Index(
                fields=["ended_at", "tenant", "mode", "status"],
                condition=models.Q(ended_at__isnull=False),
                name="conversation_ended",
            ),
        ]
        constraints = [
            models.CheckConstraint(
                condition=models.Q(status="active", ended_at__isnull=True)
                | models.Q(status__in=["completed", "failed"], ended_at__isnull=False),
                name="conversation_ended_at_its_end",
            ),
        ]

    def __str__(self) -> str:
        return self.title


class Message(models.Model):
    """One message. `position` counts from 1 within the conversation, without gaps.

    One that was spoken has a `duration_ms`, and its content is the transcript. A reply of the assistant `answers` a
    message, once, and says what it took: `cost_dollars` is None where the model has no price, `latency_seconds` is from
    the question to the end of the reply. All of these are None, or empty, for other messages.
    """

    class Role(models.TextChoices):
        USER = "user"
        ASSISTANT = "assistant"
        SYSTEM = "system"

    CONTENT_MAX_CHARS = 32_000
    DURATION_MAX_MS = 3_600_000

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    # No index of its own: the constraint below begins with it.
    conversation = models.ForeignKey(Conversation, on_delete=models.PROTECT, related_name="messages", db_index=False)
    tenant = models.ForeignKey("identity.Tenant", on_delete=models.PROTECT, related_name="+", db_index=False)
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+")
    position = models.PositiveIntegerField()
    role = models.CharField(max_length=20, choices=Role.choices, default=Role.USER)
    content = models.TextField()
    created_at = models.DateTimeField(auto_now_add=True)
    duration_ms = models.PositiveIntegerField(null=True, blank=True)
    # No index of its own: the constraint below is one, of the replies alone.
    answers = models.ForeignKey(
        "self", on_delete=models.PROTECT, null=True, blank=True, related_name="replies", db_index=False
    )
    model = models.CharField(max_length=100, blank=True, default="", db_default="")
    input_tokens = models.PositiveIntegerField(null=True, blank=True)
    output_tokens = models.PositiveIntegerField(null=True, blank=True)
    cost_dollars = models.FloatField(null=True, blank=True)
    latency_seconds = models.FloatField(null=True, blank=True)

    class Meta:
        ordering = ["conversation", "position"]
        constraints = [
            models.UniqueConstraint(fields=["conversation", "position"], name="message_position"),
            models.UniqueConstraint(
                fields=["answers"], condition=models.Q(answers__isnull=False), name="message_answered_once"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.role} {self.position}"
