from typing import Any

from django.apps import AppConfig
from django.apps import apps as global_apps
from django.db import connections, router
from django.db.models.signals import post_migrate
from django.utils.module_loading import autodiscover_modules


class EventsOutboxConfig(AppConfig):
    name = "events_outbox"
    verbose_name = "Events"

    def ready(self) -> None:
        from . import checks  # noqa: F401  (registers the system checks)
        from .status import register_status_metrics

        autodiscover_modules("events")
        autodiscover_modules("event_handlers")
        register_status_metrics()
        post_migrate.connect(_make_cursor, sender=self)


def _make_cursor(using: str, apps: Any = global_apps, **_: Any) -> None:
    """A new outbox begins with a cursor: one that is missing later on was lost, and is not taken for a beginning."""
    try:
        cursor = apps.get_model("events_outbox", "RelayCursor").objects.using(using)
        events = apps.get_model("events_outbox", "OutboxEvent").objects.using(using)
    except LookupError:
        return  # migrated backwards
    if not router.allow_migrate_model(using, cursor.model):
        return  # of a database that has other things in it
    if connections[using].vendor == "postgresql" and not cursor.exists() and not events.exists():
        cursor.create()
