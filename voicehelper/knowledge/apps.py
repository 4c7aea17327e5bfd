"""The knowledge domain: documents and their index. So far it only declares its event types."""

from django.apps import AppConfig


class KnowledgeConfig(AppConfig):
    name = "voicehelper.knowledge"
