"""`python -m voicehelper.devstack up`: see `supervisor.py`."""

import argparse
import sys

from voicehelper.devstack import DevstackError
from voicehelper.devstack.supervisor import up


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m voicehelper.devstack")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("up", help="start PostgreSQL, a Kafka broker, the web server, relay and consumers")
    command.add_argument("--kafka", choices=["embedded", "apache"], default="embedded", help="which broker to start")
    options = parser.parse_args()
    try:
        up(options.kafka)
    except DevstackError as error:
        sys.stderr.write(f"\nmake up: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
