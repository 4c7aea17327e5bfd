"""Starts logging, request tracing and the observation of queries with Django."""

from django.apps import AppConfig


class MonitoringConfig(AppConfig):
    name = "monitoring"

    def ready(self) -> None:
        # Imported here: they read settings.
        from monitoring import database
        from monitoring.logging import configure_logging
        from monitoring.tracing import instrument_requests

        configure_logging()
        instrument_requests()
        database.install()
