from django.apps import AppConfig


class ConversationsConfig(AppConfig):
    name = "voicehelper.conversations"

    def ready(self) -> None:
        from monitoring.metrics import register_collector

        from .success_rate import SuccessRateCollector

        register_collector(SuccessRateCollector())
