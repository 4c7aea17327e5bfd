from django.apps import AppConfig


class NotificationsConfig(AppConfig):
    name = "voicehelper.notifications"
