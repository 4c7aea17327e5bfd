from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError

from events_outbox.conf import outbox_settings
from events_outbox.kafka import KafkaException, create_topics


class Command(BaseCommand):
    help = "Create the topics that events are routed to, where they do not exist."

    def handle(self, **options: Any) -> None:
        if outbox_settings().KAFKA_IS_EMBEDDED:
            self.stdout.write("the embedded broker makes its topics itself")
            return
        try:
            created = create_topics()
        except KafkaException as error:
            raise CommandError(f"the broker did not create the topics: {error.args[0].str()}") from None
        except (ValueError, ImproperlyConfigured) as error:
            raise CommandError(str(error)) from None
        self.stdout.write(f"created {', '.join(created)}" if created else "all topics exist")
