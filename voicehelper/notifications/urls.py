from django.urls import path

from .views import NotificationReadView, NotificationsView

urlpatterns = [
    path("notifications", NotificationsView.as_view()),
    path("notifications/<uuid:pk>/read", NotificationReadView.as_view()),
]
