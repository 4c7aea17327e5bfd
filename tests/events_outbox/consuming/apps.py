import os

from django.apps import AppConfig


class ConsumingConfig(AppConfig):
    name = "tests.events_outbox.consuming"

    def ready(self):
        """Tests have no half minute to wait."""
        from events_outbox import workers
        from monitoring import worker

        worker.STALE_AFTER_SECONDS = float(os.environ["TEST_STALE_SECONDS"])
        workers.STOP_SECONDS = float(os.environ["TEST_STOP_SECONDS"])
