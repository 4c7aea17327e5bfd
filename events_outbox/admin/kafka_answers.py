"""What Kafka lately told of an event, for a few seconds: pages that refresh themselves ask for it again and again."""

import threading
import time
from collections import OrderedDict

from events_outbox.life_line import KafkaKnows, ask_kafka
from events_outbox.models import OutboxEvent
from events_outbox.record_search import RecordSearch

KEPT_SECONDS = 2.0
KEPT_WITHOUT_ANSWER_SECONDS = 10.0
"""While Kafka is away each question takes its whole time: it is not asked as often."""
STALE_SECONDS = 30.0
KEPT_EVENTS = 200
AT_ONCE = 4
"""Each search has clients and threads of its own: a process makes so many at the same time."""

_kept: "OrderedDict[tuple[int, bool], tuple[float, KafkaKnows]]" = OrderedDict()
_lock = threading.Lock()
_searches = threading.BoundedSemaphore(AT_ONCE)


def lately(event: OutboxEvent, *, is_published: bool) -> KafkaKnows:
    """Return what Kafka tells of the event, not from before it was published.

    At most a few seconds old; up to STALE_SECONDS more while too many others are being looked for.
    """
    key = event.pk, is_published
    with _lock:
        until, answer = _kept.get(key, (0.0, None))
    if answer is not None and time.monotonic() < until:
        return answer
    if not _searches.acquire(blocking=False):
        if answer is not None and time.monotonic() < until + STALE_SECONDS:
            return answer
        return KafkaKnows(RecordSearch(not_known="others are being looked for, it is asked again"))
    try:
        answer = ask_kafka(event)
    finally:
        _searches.release()
    seconds = KEPT_WITHOUT_ANSWER_SECONDS if answer.search.not_known else KEPT_SECONDS
    with _lock:
        _kept[key] = (time.monotonic() + seconds, answer)
        _kept.move_to_end(key)
        while len(_kept) > KEPT_EVENTS:
            _kept.popitem(last=False)
    return answer


def forget() -> None:
    """Ask anew from now on, for every event."""
    with _lock:
        _kept.clear()
