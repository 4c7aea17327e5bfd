from django.urls import path

from .views import ConversationMessagesView, ConversationsView, ConversationView, MessagesView

urlpatterns = [
    path("conversations", ConversationsView.as_view()),
    path("conversations/<uuid:pk>", ConversationView.as_view()),
    path("conversations/<uuid:pk>/messages", ConversationMessagesView.as_view()),
    path("messages", MessagesView.as_view()),
]
