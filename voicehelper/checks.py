"""System checks of the project: services that must be named, and what production must not use."""

from collections.abc import Sequence
from typing import Any

from django.apps import AppConfig
from django.conf import settings
from django.core.checks import CheckMessage, Error, register


@register("voicehelper")
def check_database_is_named(app_configs: Sequence[AppConfig] | None, **_: Any) -> list[CheckMessage]:
    if settings.SERVICES.database_url:
        return []
    return [
        Error(
            "no database is named",
            hint="run `make up` in another terminal, or set DATABASE_URL=postgresql://user:password@host:5432/name",
            id="voicehelper.E001",
        )
    ]


@register("voicehelper")
def check_broker_is_not_embedded(app_configs: Sequence[AppConfig] | None, **_: Any) -> list[CheckMessage]:
    if settings.IS_DEV or not settings.SERVICES.kafka_is_embedded:
        return []
    return [
        Error(
            f"the embedded broker keeps nothing and is refused with VOICEHELPER_ENV={settings.ENVIRONMENT}",
            hint="set KAFKA_BOOTSTRAP_SERVERS to a real Kafka",
            id="voicehelper.E002",
        )
    ]
