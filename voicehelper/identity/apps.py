from django.apps import AppConfig


class IdentityConfig(AppConfig):
    name = "voicehelper.identity"

    def ready(self) -> None:
        from . import schema  # noqa: F401  (it registers itself)
