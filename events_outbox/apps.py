from django.apps import AppConfig
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
