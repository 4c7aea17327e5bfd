from django.apps import AppConfig


class NotificationsConfig(AppConfig):
    name = "voicehelper.notifications"

    def ready(self) -> None:
        from monitoring.metrics import register_collector

        from .backlog import BacklogCollector

        register_collector(BacklogCollector())
