"""The knowledge domain: documents, and the search in them."""

from django.apps import AppConfig


class KnowledgeConfig(AppConfig):
    name = "voicehelper.knowledge"

    def ready(self) -> None:
        from . import checks  # noqa: F401  (registers the system check)
