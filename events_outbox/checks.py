"""System checks of the package: each with an id and a hint."""

from collections.abc import Sequence
from typing import Any

from django.apps import AppConfig
from django.core.checks import CheckMessage, Error, Warning, register
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, connections

from .conf import outbox_settings


@register("events_outbox")
def check_database_is_postgresql(app_configs: Sequence[AppConfig] | None, **_: Any) -> list[CheckMessage]:
    vendor = connections[DEFAULT_DB_ALIAS].vendor
    if vendor == "postgresql":
        return []
    return [
        Error(
            f"the outbox needs PostgreSQL, but the default database is {vendor}",
            hint="the relay reads by PostgreSQL's transaction snapshots; set DATABASE_URL=postgresql://...",
            id="events_outbox.E001",
        )
    ]


@register("events_outbox")
def check_settings(app_configs: Sequence[AppConfig] | None, **_: Any) -> list[CheckMessage]:
    try:
        conf = outbox_settings()
    except ImproperlyConfigured as error:
        return [Error(str(error), hint="see README, Settings", id="events_outbox.E002")]
    if conf.ACKS == "1":
        return [
            Warning(
                'EVENTS_OUTBOX["ACKS"] is "1": an event that the broker acknowledged is lost when that broker dies '
                "before it was replicated, and retries can duplicate it in the topic",
                hint='use "all" unless the specification\'s WaitForLocal is what you want',
                id="events_outbox.W001",
            )
        ]
    return []
