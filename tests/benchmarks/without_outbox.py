"""The product without its outbox, to compare with: settings, and the app that leaves the events out."""

from django.apps import AppConfig

from voicehelper.settings import *  # noqa: F403
from voicehelper.settings import INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "tests.benchmarks.without_outbox.WithoutOutbox"]


class WithoutOutbox(AppConfig):
    name = "tests.benchmarks.without_outbox"

    def ready(self) -> None:
        from voicehelper.conversations import services

        services.emit_event = lambda *arguments, **fields: None  # type: ignore[assignment]
