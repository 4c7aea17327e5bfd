from django.apps import AppConfig


class AnalyticsConfig(AppConfig):
    name = "voicehelper.analytics"

    def ready(self) -> None:
        from . import checks  # noqa: F401  (registers the system checks)
