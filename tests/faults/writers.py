"""The writers as a process: `python -m tests.faults.writers LEDGER`, with commands on its standard input.

The ledger is a file that only grows, one JSON list a line: ["?", event...] before a commit, ["+", event...] after it.
A commit that has no second line is in doubt. ["halted"] answers a `halt`.
"""

import json
import sys
import threading
from contextlib import ExitStack, suppress

import django

BURSTS = ("plain", "plain", "first_write", "early_xid", "two", "savepoint", "rollback", "burst")
MANNER = {"ways": BURSTS, "long_seconds": None, "survive": True}
CHUNK = 1000


def main(path):
    django.setup()
    from django.db import connection, transaction

    from tests.outbox_writers import CONNECTION_LOST, Ledger, emit_numbered, writers

    class FileLedger(Ledger):
        def __init__(self):
            super().__init__()
            self._file = open(path, "a", buffering=1)  # noqa: SIM115

        def note(self, *line):
            with self.lock:
                self._file.write(json.dumps(line) + "\n")

        def announce(self, written):
            self.note("?", *written)

        def confirm(self, written):
            self.note("+", *(event.event_id for event in written))

    def one_big_transaction(serial, count, size):
        """`count` events of `size` bytes and more, of ten aggregates that nobody else writes to, in one transaction."""
        written = []
        with transaction.atomic():
            for start in range(0, count, CHUNK):
                numbers = range(start, min(start + CHUNK, count))
                written += emit_numbered([(f"big-{serial}-{number % 10}", number) for number in numbers], size)
            ledger.announce(written)
        ledger.confirm(written)

    def big(serial, count, size):
        try:
            with suppress(*CONNECTION_LOST):  # a fault may end it: then it is in doubt, or never was
                one_big_transaction(serial, count, size)
        finally:
            connection.close()

    ledger = FileLedger()
    with ExitStack() as running:
        for serial, line in enumerate(sys.stdin):
            match line.split():
                case ["go", seed, count, pause]:
                    # One transaction stays open for the whole run.
                    running.enter_context(writers(ledger, seed, count=int(count), pause_seconds=float(pause), **MANNER))
                case ["big", count, size]:
                    thread = threading.Thread(target=big, args=[f"{seed}-{serial}", int(count), int(size)])
                    running.callback(thread.join)
                    thread.start()
                case ["halt"]:
                    running.close()
                    ledger.note("halted")


if __name__ == "__main__":
    main(sys.argv[1])
