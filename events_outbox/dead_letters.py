"""Dead letters: keep, find what is parked, replay, discard."""

import base64
import logging
import traceback
from collections.abc import Callable, Iterable

from django.db import transaction
from django.utils import timezone

from .handlers import Consumer, call_handler, consumer_named
from .models import DeadLetter
from .records import Delivery, Record

logger = logging.getLogger(__name__)


class ReplayRefused(Exception):
    """A dead letter that cannot be replayed now; the text says why and what to do."""


def keep(
    consumer_name: str,
    delivery: Delivery,
    reason: DeadLetter.Reason,
    error: str,
    *,
    traceback_text: str = "",
    attempts: int = 1,
) -> None:
    """Keep a record as a dead letter, in the current transaction, beside its processed mark."""
    record = delivery.record
    letter = DeadLetter(
        consumer=consumer_name,
        event_id=delivery.event_id,
        event_type=_storable(delivery.event_type)[:128],
        tenant_id=_storable(delivery.tenant_id)[:255],
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        key=record.key,
        value=record.value,
        headers=[[_storable(name), base64.b64encode(value or b"").decode()] for name, value in record.headers],
        reason=reason,
        error=_storable(error),
        traceback=_storable(traceback_text),
        attempts=attempts,
    )
    changing = [f.name for f in DeadLetter._meta.fields if f.name not in ("id", "consumer", "event_id", "created_at")]
    # An event whose processed mark was pruned can come back and fail again.
    DeadLetter.objects.bulk_create(
        [letter], update_conflicts=True, unique_fields=["consumer", "event_id"], update_fields=changing
    )


def parked_keys(consumer: Consumer, deliveries: Iterable[Delivery]) -> set[tuple[str, bytes | None]]:
    """Of the deliveries' (topic, key), those with an open dead letter; none unless on_failure="park_key"."""
    if consumer.on_failure != "park_key":
        return set()
    keys = {(d.record.topic, d.record.key) for d in deliveries if d.record.key is not None}
    if not keys:
        return set()
    letters = DeadLetter.objects.open().filter(
        consumer=consumer.name, topic__in={topic for topic, _ in keys}, key__in=[key for _, key in keys]
    )
    parked: set[tuple[str, bytes | None]] = {
        (letter.topic, bytes(letter.key or b"")) for letter in letters.only("topic", "key")
    }
    return parked & keys


def release(consumer: Consumer, should_stop: Callable[[], bool]) -> int:
    return 0


def replay(letter_id: int) -> None:
    """Handle a dead letter's event again, in one transaction with closing the letter.

    Raises ReplayRefused when it is closed already, when it is no event that this code can read, when no handler
    takes it, or when an earlier letter of its key is open and the consumer parks keys. An error of the handler is
    noted in the letter, which stays open, and raised.
    """
    try:
        with transaction.atomic():
            letter = _lock_open(letter_id)
            _replay(letter)
            _close(letter, DeadLetter.Resolution.REPLAYED)
    except ReplayRefused:
        raise
    except Exception as error:
        with transaction.atomic():
            letter = _lock_open(letter_id)
            letter.attempts += 1
            letter.error = _storable(f"{type(error).__name__}: {error}")
            letter.traceback = _storable("".join(traceback.format_exception(error)))
            letter.save(update_fields=["attempts", "error", "traceback"])
        raise


def discard(letter_id: int) -> None:
    """Close a dead letter without handling it. Raises ReplayRefused when it is closed already."""
    with transaction.atomic():
        _close(_lock_open(letter_id), DeadLetter.Resolution.DISCARDED)


def _replay(letter: DeadLetter) -> None:
    consumer = consumer_named(letter.consumer)
    earlier = DeadLetter.objects.open().filter(
        consumer=letter.consumer, topic=letter.topic, key=letter.key, id__lt=letter.pk
    )
    if consumer.on_failure == "park_key" and letter.key is not None and (first := earlier.order_by("id").first()):
        raise ReplayRefused(f"dead letter {first.pk} of the same key comes first: replay or discard it")
    record = Record(
        topic=letter.topic,
        partition=letter.partition,
        offset=letter.offset,
        key=None if letter.key is None else bytes(letter.key),
        value=None if letter.value is None else bytes(letter.value),
        headers=[(name, base64.b64decode(value)) for name, value in letter.headers],
    )
    event = record.event(record.envelope())
    handler = consumer.handler_for(event.event_type)
    if handler is None:
        raise ReplayRefused(f"consumer {consumer.name} has no handler of {event.event_type}: discard the letter")
    call_handler(consumer.name, handler, [event])


def _lock_open(letter_id: int) -> DeadLetter:
    letter: DeadLetter | None = DeadLetter.objects.select_for_update().filter(pk=letter_id).first()
    if letter is None or letter.resolution:
        raise ReplayRefused(f"dead letter {letter_id} is {letter.resolution if letter else 'gone'} already")
    return letter


def _close(letter: DeadLetter, resolution: DeadLetter.Resolution) -> None:
    letter.resolution = resolution
    letter.resolved_at = timezone.now()
    letter.save(update_fields=["resolution", "resolved_at"])
    logger.info("dead letter closed", extra={"dead_letter": letter.pk, "resolution": str(resolution)})


def _storable(text: str) -> str:
    """Text that PostgreSQL can hold: without NUL characters and unpaired surrogates."""
    return text.replace("\x00", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
