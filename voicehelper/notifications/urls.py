from django.urls import path

from .views import (
    NotificationPreferencesView,
    NotificationReadView,
    NotificationsView,
    WebhookDeliveriesView,
    WebhookSecretView,
    WebhooksView,
    WebhookTestView,
    WebhookView,
)

urlpatterns = [
    path("notifications", NotificationsView.as_view()),
    path("notifications/<uuid:pk>/read", NotificationReadView.as_view()),
    path("notification-preferences", NotificationPreferencesView.as_view()),
    path("webhooks", WebhooksView.as_view()),
    path("webhooks/<uuid:pk>", WebhookView.as_view()),
    path("webhooks/<uuid:pk>/test", WebhookTestView.as_view()),
    path("webhooks/<uuid:pk>/rotate-secret", WebhookSecretView.as_view()),
    path("webhooks/<uuid:pk>/deliveries", WebhookDeliveriesView.as_view()),
]
