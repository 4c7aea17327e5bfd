from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from monitoring.healthcheck import Unhealthy, add_arguments, address, check


class Command(BaseCommand):
    help = (
        "Ask a process's health page; exit with 0 when it is well, else with 1 and one line that says why. "
        "`python -m monitoring.healthcheck` does the same without starting Django."
    )
    requires_system_checks = []

    def add_arguments(self, parser: CommandParser) -> None:
        add_arguments(parser)

    def handle(self, **options: Any) -> None:
        try:
            self.stdout.write(check(address(options), options["timeout"]))
        except Unhealthy as error:
            raise CommandError(str(error)) from error
