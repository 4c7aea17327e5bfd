"""System checks of the knowledge domain."""

from collections.abc import Sequence
from typing import Any

from django.apps import AppConfig
from django.conf import settings
from django.core.checks import CheckMessage, Error, register

from .conf import knowledge_settings


@register("knowledge")
def check_milvus_is_shared(app_configs: Sequence[AppConfig] | None, **_: Any) -> list[CheckMessage]:
    """Each process would have an index of its own, and what the consumer writes no web worker would find."""
    if settings.IS_DEV or not knowledge_settings().milvus_uri.endswith(".db"):
        return []
    return [
        Error(
            f"Milvus Lite in a process can be used by that one alone: not with VOICEHELPER_ENV={settings.ENVIRONMENT}",
            hint="set MILVUS_URI to a Milvus server, as in http://milvus:19530",
            id="knowledge.E001",
        )
    ]
