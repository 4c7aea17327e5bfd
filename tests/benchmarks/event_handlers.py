"""The consumer that the bench runs as it is deployed, `manage.py consume bench-live`."""

import os
import time

from django.db import transaction

from events_outbox import Consumer, Event
from tests.benchmarks.consuming import EFFECTS_FILE, upsert_batch

live = Consumer("bench-live", group_id="bench-live")


@live.handles("conversation.*")
def upsert_and_tell(event: Event) -> None:
    """One upsert; when it has committed, a line with the event's id and the time."""
    upsert_batch([event])
    transaction.on_commit(lambda: tell_committed(str(event.event_id)))


def tell_committed(event_id: str) -> None:
    global _file
    if _file is None:
        _file = open(os.environ[EFFECTS_FILE], "a", buffering=1)  # noqa: SIM115  (until the process ends)
    _file.write(f"{event_id} {time.time()}\n")


_file = None
