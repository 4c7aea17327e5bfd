"""Conversations and messages in the admin, to look at."""

from django.contrib import admin

from events_outbox.admin import ReadOnlyAdmin
from events_outbox.admin.cells import moment, short_id
from events_outbox.admin.filters import FieldChoiceFilter

from .models import Conversation, Message


class ModeFilter(FieldChoiceFilter):
    title = parameter_name = field = "mode"


class StatusFilter(FieldChoiceFilter):
    title = parameter_name = field = "status"


class RoleFilter(FieldChoiceFilter):
    title = parameter_name = field = "role"


@admin.register(Conversation)
class ConversationAdmin(ReadOnlyAdmin):
    list_display = ["title", "tenant", "user", "mode", "status", "message_count", "created"]
    list_filter = [ModeFilter, StatusFilter]
    list_select_related = ["tenant", "user"]
    time_field = "created_at"
    exact_search = ["id", "user__username"]
    search_fields = ["title", "=tenant__name"]
    search_help_text = "an id or user name, whole; a part of a title"

    @admin.display(description="created")
    def created(self, conversation: Conversation) -> str:
        return moment(conversation.created_at)


@admin.register(Message)
class MessageAdmin(ReadOnlyAdmin):
    payload_fields = ["content"]
    list_display = ["created", "short", "conversation", "tenant", "user", "role"]
    list_filter = [RoleFilter]
    list_select_related = ["conversation", "tenant", "user"]
    list_defer = ["content"]
    time_field = "created_at"
    exact_search = ["id", "conversation__id", "user__username"]
    search_help_text = "an id, conversation id or user name, whole"
    # By key: the model's own order would sort the whole table by conversation.
    ordering = ["-id"]

    @admin.display(description="created")
    def created(self, message: Message) -> str:
        return moment(message.created_at)

    @admin.display(description="id")
    def short(self, message: Message) -> str:
        return short_id(message.pk)
