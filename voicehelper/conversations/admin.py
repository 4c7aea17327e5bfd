"""Conversations and messages in the admin, to look at."""

from django.contrib import admin

from events_outbox.admin import ReadOnlyAdmin

from .models import Conversation, Message


@admin.register(Conversation)
class ConversationAdmin(ReadOnlyAdmin):
    list_display = ["title", "tenant", "user", "mode", "status", "message_count", "created_at"]
    list_filter = ["mode", "status"]
    list_select_related = ["tenant", "user"]
    search_fields = ["=id", "title", "=tenant__name", "=user__username"]


@admin.register(Message)
class MessageAdmin(ReadOnlyAdmin):
    list_display = ["id", "conversation", "tenant", "user", "role", "created_at"]
    list_filter = ["role"]
    list_select_related = ["conversation", "tenant", "user"]
    search_fields = ["=id", "=conversation__id", "=user__username"]
    # By key: the model's own order would sort the whole table by conversation.
    ordering = ["-id"]
