"""Make database and topics ready before the first process of ours starts: one Django start for all of it."""

import argparse
import io
import os
import sys

import django
from django.core.management import CommandError, call_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--create-topics", action="store_true", help="for a broker that does not come with them")
    parser.add_argument("--replay", action="store_true", help="publish again what some consumer has not handled")
    parser.add_argument("--demo-file", required=True, help="where the demo tenant's logins are written, as JSON")
    options = parser.parse_args()

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "voicehelper.settings")
    django.setup()
    call_command("migrate", interactive=False, verbosity=1)
    if options.create_topics:
        call_command("create_topics")
    demo = io.StringIO()
    call_command("create_demo", json=True, known=options.demo_file, stdout=demo)
    with open(os.open(options.demo_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(demo.getvalue())
    if options.replay:
        try:
            call_command("replay_outbox", unhandled=True, interactive=False)
        except CommandError as error:  # such as an event of a topic that is no more: no reason not to start
            sys.stderr.write(f"not all unhandled events were published again: {error}\n")


if __name__ == "__main__":
    main()
