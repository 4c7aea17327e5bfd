from django.urls import path

from .views import (
    CompleteConversationView,
    ConversationMessagesView,
    ConversationsView,
    ConversationView,
    FailConversationView,
    MessagesView,
    RepliesView,
)

urlpatterns = [
    path("conversations", ConversationsView.as_view()),
    path("conversations/<uuid:pk>", ConversationView.as_view()),
    path("conversations/<uuid:pk>/complete", CompleteConversationView.as_view()),
    path("conversations/<uuid:pk>/fail", FailConversationView.as_view()),
    path("conversations/<uuid:pk>/messages", ConversationMessagesView.as_view()),
    path("conversations/<uuid:pk>/replies", RepliesView.as_view()),
    path("messages", MessagesView.as_view()),
]
