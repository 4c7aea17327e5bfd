"""Dead letters: kept, failed again, closed; and the keys that they park. `letter_actions.py` does something about them.

    an event that fails                              an event behind it (park_key only)
            |                                                       |
            v                             nothing before it         v
          open  <---------  fails again  ---  released  <---------  open, "behind"
            |                                     |
    replay  +---> replayed                        +---> replayed
            +---> discarded

With on_failure="park_key" an open letter parks its key: later events become letters too ("behind"), until all of them
are handled, in order. Whoever closes a letter, or parks an event behind one, holds the lock of the key to the end of
the transaction. So nothing is parked behind a letter that is being closed, where nothing would release it, and
nothing is handled before what is being parked.
"""

import base64
import hashlib
import logging
import time
from collections.abc import Collection, Iterable, Sequence

from django.db import connection
from django.utils import timezone

from .handlers import Consumer
from .models import DeadLetter, DeadLetterQuerySet
from .records import Delivery

logger = logging.getLogger(__name__)

CONSUMER = "consumer"
"""Who failed on a letter or closed it, when it was no operator."""


def keep(
    consumer_name: str,
    delivery: Delivery,
    reason: DeadLetter.Reason,
    error: str,
    *,
    traceback_text: str = "",
    attempts: int = 0,
) -> None:
    """Keep a record as a dead letter, in the current transaction, beside its processed mark.

    `attempts`: how often its handler has failed. An event whose mark was pruned can come back and fail again: its
    letter is open again then, with its history.
    """
    record = delivery.record
    place = {
        "event_type": _storable(delivery.event_type)[:128],
        "tenant_id": _storable(delivery.tenant_id)[:255],
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "key": record.key,
        "value": record.value,
        "headers": [[_storable(name), base64.b64encode(value or b"").decode()] for name, value in record.headers],
    }
    # The mark, just inserted, keeps everybody else from keeping the same event.
    known = DeadLetter.objects.select_for_update().filter(consumer=consumer_name, event_id=delivery.event_id).first()
    if known is None:
        letter = DeadLetter(consumer=consumer_name, event_id=delivery.event_id, **place)
        _set_failure(letter, reason, error, traceback_text, attempts, CONSUMER)
        letter.save(force_insert=True)
    elif reason != DeadLetter.Reason.BEHIND or known.resolution:
        for name, value in place.items():
            setattr(known, name, value)
        known.resolution, known.resolved_at = DeadLetter.Resolution.OPEN, None
        known.resolved_by = known.resolution_reason = ""
        fail_again(known, reason, error, traceback_text=traceback_text, attempts=attempts, by=CONSUMER)
        free_next(known)  # its id is an old one, so it may stand before those it is parked behind


def fail_again(
    letter: DeadLetter, reason: DeadLetter.Reason, error: str, *, traceback_text: str, attempts: int, by: str
) -> None:
    """Write a failure into a letter that is there, and what its failure was before into its history."""
    before = {
        "at": letter.failed_at.isoformat(),
        "by": letter.failed_by,
        "reason": letter.reason,
        "attempts": letter.attempts,
        "error": letter.error,
        "traceback": letter.traceback,
    }
    letter.history = [*letter.history, before]
    letter.failed_at, letter.released_at = timezone.now(), None
    _set_failure(letter, reason, error, traceback_text, attempts, by)
    letter.save()


def _set_failure(
    letter: DeadLetter, reason: DeadLetter.Reason, error: str, traceback_text: str, attempts: int, by: str
) -> None:
    letter.reason = reason
    letter.error = _storable(error)
    letter.traceback = _storable(traceback_text)
    letter.attempts += attempts
    letter.failed_by = by[:150]


def close(letters: Sequence[DeadLetter], resolution: DeadLetter.Resolution, *, by: str, reason: str = "") -> int | None:
    """Close letters of one key, whose lock is held, and release the next one; return its id."""
    for letter in letters:
        letter.resolution, letter.resolved_at = resolution, timezone.now()
        letter.resolved_by, letter.resolution_reason = by[:150], reason
        letter.save(update_fields=["resolution", "resolved_at", "resolved_by", "resolution_reason"])
        logger.info("dead letter closed", extra={"dead_letter": letter.pk, "resolution": str(resolution), "by": by})
    return free_next(letters[0]) if letters else None


def free_next(letter: DeadLetter) -> int | None:
    """Release the first open letter of a key, whose lock is held, if it only waits; return its id."""
    if letter.key is None:
        return None
    first = DeadLetter.objects.open().of_key(letter.consumer, letter.topic, bytes(letter.key)).first()
    if first is None or first.reason != DeadLetter.Reason.BEHIND:
        return None
    if first.released_at is None:
        DeadLetter.objects.filter(pk=first.pk).update(released_at=timezone.now())
    return int(first.pk)


def before(letter: DeadLetter) -> DeadLetterQuerySet:
    """The open letters that stand before this one in its key, in order."""
    of_key = DeadLetter.objects.of_key(letter.consumer, letter.topic, bytes(letter.key or b""))
    found: DeadLetterQuerySet = of_key.open().filter(pk__lt=letter.pk)
    return found if letter.key is not None else found.none()


def parked_keys(consumer: Consumer, deliveries: Iterable[Delivery]) -> set[tuple[str, bytes | None]]:
    """Of the deliveries' (topic, key), those with an open dead letter; none unless on_failure="park_key".

    Their locks are held until the end of the current transaction.
    """
    if consumer.on_failure != "park_key":
        return set()
    keys = {(d.record.topic, d.record.key) for d in deliveries if d.record.key is not None}
    if not keys or not (parked := DeadLetter.objects.parked(consumer.name, keys)):
        return set()
    locks = sorted(_lock_id(consumer.name, topic, key) for topic, key in parked)  # everybody's order: no deadlock
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(lock) FROM unnest(%s::bigint[]) lock", [locks])
    # The last letters of a key may have been closed before we had its lock.
    return set(DeadLetter.objects.parked(consumer.name, parked))


def lock(letter: DeadLetter, ids: Collection[int], wait_seconds: float) -> list[DeadLetter] | None:
    """Those of the letters that are open, in order, locked, with the lock of their key, which is this letter's.

    None: somebody has had it for so long. It is asked for again and again, as a wait inside the database would end in
    an error, and so end the transaction.
    """
    key = letter.event_id.bytes if letter.key is None else bytes(letter.key)
    deadline = time.monotonic() + wait_seconds
    while not _try_lock(_lock_id(letter.consumer, letter.topic, key)):
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.02)
    return list(DeadLetter.objects.open().select_for_update().filter(pk__in=ids).order_by("id"))


def _try_lock(lock_id: int) -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_try_advisory_xact_lock(%s)", [lock_id])
        return bool(cursor.fetchone()[0])


def _lock_id(consumer_name: str, topic: str, key: bytes) -> int:
    """The advisory lock of a consumer's key."""
    digest = hashlib.sha256(b"\0".join([consumer_name.encode(), topic.encode(), key])).digest()
    return int.from_bytes(digest[:8], signed=True)


def _storable(text: str) -> str:
    """Text that PostgreSQL can hold: without NUL characters and unpaired surrogates."""
    return text.replace("\x00", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
