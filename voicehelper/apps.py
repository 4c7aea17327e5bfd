from django.apps import AppConfig


class VoiceHelperConfig(AppConfig):
    name = "voicehelper"

    def ready(self) -> None:
        from . import checks  # noqa: F401  (registers the system checks)
