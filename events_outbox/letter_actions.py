"""What is done about dead letters: operators replay or discard them, consumers release what waited behind them.

A letter is handled in a transaction of its own, which also closes it; a failure is noted in another. The processed
mark of its event is there already, from when it was kept: a replay renews it, so that it lives as long as others do.
"""

import base64
import logging
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from django.db import DatabaseError, InternalError, OperationalError, connection, transaction

from monitoring import metrics

from . import dead_letters, pauses
from .conf import outbox_settings
from .dead_letters import CONSUMER
from .exceptions import PermanentEventError
from .handlers import Consumer, Event, Handler, call_handler, consumer_named
from .models import DeadLetter, ProcessedEvent
from .operators import note_action
from .records import Record, UnreadableRecord
from .transactions import in_transaction, is_disturbance

logger = logging.getLogger(__name__)

RELEASE_AT_ONCE = 500
LOCK_SECONDS = 10.0
"""How long a replay or discard waits for a key: a batch of the consumer may be at it."""
DISTURBED_SECONDS = 0.1
_MAX_DISTURBANCES = 5


class ReplayRefused(Exception):
    """A dead letter that cannot be replayed or discarded now; the text says why. The letter is as it was."""


class AlreadyClosed(ReplayRefused):
    """It was replayed or discarded already."""


class NoHandler(ReplayRefused):
    """The consumer has no handler of its event."""


class ReplayFailed(Exception):
    """The event failed again: that is noted in the letter, which stays open."""


class DatabaseAway(OperationalError):
    """No connection can be made, which says nothing about an event."""


@dataclass(frozen=True)
class Outcome:
    """What became of a chosen letter. `error`: why it was not replayed; `waiting`: chosen ones left alone behind it."""

    letter_id: int
    error: str = ""
    waiting: int = 0


def replay(ids: Collection[int], *, by: str, force: bool = False, dry_run: bool = False) -> Iterator[Outcome]:
    """Handle the events of dead letters again, each as `replay_one()` does, and yield what became of them.

    In the order of their ids; for a consumer that parks keys one key after the other, and a letter that fails leaves
    those behind it alone. What a consumer releases meanwhile is not yielded. `dry_run`: everything but the handler.
    """
    for chosen in _in_key_order(ids, only_parking=True):
        for position, letter_id in enumerate(chosen):
            try:
                if dry_run:
                    _rehearse(letter_id, force, chosen)
                else:
                    replay_one(letter_id, by=by, force=force)
            except AlreadyClosed as error:
                if position == 0:
                    yield Outcome(letter_id, str(error))
            except (ReplayRefused, ReplayFailed) as error:
                yield Outcome(letter_id, str(error), waiting=len(chosen) - position - 1)
                break
            else:
                yield Outcome(letter_id)


def replay_one(letter_id: int, *, by: str, force: bool = False) -> None:
    """Handle a dead letter's event again, in one transaction with closing the letter. `by`: the operator.

    Raises ReplayRefused when it is closed already, when no handler takes it, when an earlier letter of its key is
    open and the consumer parks keys, when it was replayed in vain MAX_REPLAYS times (unless `force`), and when the
    database was in the way; ReplayFailed when the event fails again.
    """
    try:
        _handle(letter_id, lambda letter: _check(letter, force), by=by, wait_seconds=LOCK_SECONDS)
    except ReplayRefused:
        raise
    except Exception as error:
        if isinstance(error, DatabaseError) and is_disturbance(error):
            raise ReplayRefused(f"the database was in the way: {_in_words(error)}; try again") from error
        _note_failure(letter_id, error, by=by)
        raise ReplayFailed(_in_words(error)) from error


def discard(ids: Collection[int], *, reason: str, by: str) -> int:
    """Close dead letters without handling them, and return how many; what waited behind them is released.

    `reason` and `by` (the operator, at most 150 characters are kept) stay with the letter. Raises ReplayRefused with
    nothing changed for a missing reason and for ids that are unknown or closed; also for a key that somebody is at
    for long, when letters of other keys may be discarded already.
    """
    if not (reason := reason.strip()):
        raise ReplayRefused("say why: a reason stays with the discarded letter")
    known = dict(DeadLetter.objects.filter(pk__in=ids).values_list("pk", "resolution"))
    if unknown := sorted(set(ids) - set(known)):
        raise ReplayRefused(f"there is no dead letter {_listed(unknown)}")
    if closed := sorted(pk for pk, resolution in known.items() if resolution):
        raise AlreadyClosed(f"replayed or discarded already: {_listed(closed)}")
    count = 0
    for chosen in _in_key_order(ids):
        # All of a key in one transaction: one that is to be discarded must not be released before its turn.
        with transaction.atomic():
            letters = dead_letters.lock(_found(chosen[0]), chosen, LOCK_SECONDS)
            if letters is None:
                raise ReplayRefused(f"the key of dead letter {chosen[0]} is being handled: try again")
            for letter in letters:
                _note_action("dead_letter.discarded", letter, by=by, reason=reason)
            dead_letters.close(letters, DeadLetter.Resolution.DISCARDED, by=by, reason=reason)
        count += len(letters)
    return count


def release(consumer: Consumer, should_stop: Callable[[], bool] = lambda: False) -> int:
    """Handle what waited behind letters that are closed by now, key by key and in order; return how many.

    At most RELEASE_AT_ONCE in a call, none while the consumer is paused. A follower gets the consumer's retries; one
    that fails heads its key from then on. Keys that somebody else is at are left to them. Raises OperationalError
    when the database is away.
    """
    if pauses.is_paused(consumer.name):
        return 0
    count = 0
    for letter_id in list(DeadLetter.objects.released(consumer.name).values_list("pk", flat=True)[:RELEASE_AT_ONCE]):
        following: int | None = letter_id
        while following is not None and count < RELEASE_AT_ONCE and not should_stop():
            try:
                following = _handle_follower(consumer, following, should_stop)
            except (ReplayRefused, ReplayFailed) as error:
                logger.info("release of a key ends", extra={"dead_letter": following, "error": str(error)})
                break
            count += 1
    if count:
        logger.info("parked events released", extra={"consumer": consumer.name, "events": count})
    return count


# -- one letter ------------------------------------------------------------------------------------------------------


def _handle(letter_id: int, check: Callable[[DeadLetter], None], *, by: str, wait_seconds: float) -> int | None:
    """Handle a letter's event and close the letter; return the next one of its key, which is released then.

    A transaction that the database disturbs is repeated. Raises ReplayRefused, UnreadableRecord, DatabaseAway, and
    what `check` and the handler raise.
    """
    disturbances = 0
    while True:
        try:
            connection.ensure_connection()
        except OperationalError as error:
            raise DatabaseAway(str(error).strip()) from error
        try:
            letter = _found(letter_id)
            following = in_transaction(letter.consumer, lambda: _transaction(letter_id, check, by, wait_seconds))
        except (OperationalError, InternalError) as error:
            disturbances += 1
            if not is_disturbance(error) or disturbances == _MAX_DISTURBANCES:
                raise
            if not connection.in_atomic_block:
                connection.close_if_unusable_or_obsolete()
            logger.warning("replay disturbed, repeating it", extra={"dead_letter": letter_id, "error": str(error)})
            time.sleep(DISTURBED_SECONDS * disturbances)
        else:
            metrics.CONSUMER_HANDLED.labels(letter.consumer, letter.event_type).inc()
            return following


def _transaction(letter_id: int, check: Callable[[DeadLetter], None], by: str, wait_seconds: float) -> int | None:
    letter = _locked(letter_id, wait_seconds)
    check(letter)
    handler, event = _event(letter)
    if not ProcessedEvent.objects.renew(letter.consumer, letter.event_id):
        raise ReplayRefused("it is being delivered again just now: look again")
    call_handler(letter.consumer, handler, [event])
    if by != CONSUMER:
        _note_action("dead_letter.replayed", letter, by=by)
    return dead_letters.close([letter], DeadLetter.Resolution.REPLAYED, by=by)


def _handle_follower(consumer: Consumer, letter_id: int, should_stop: Callable[[], bool]) -> int | None:
    """Handle a released letter, with the consumer's retries. Raises as `replay_one()` does, and DatabaseAway."""
    delays, attempts = iter(consumer.retry.delays_seconds()), 0
    while True:
        attempts += 1
        try:
            return _handle(letter_id, _check_is_next, by=CONSUMER, wait_seconds=0)
        except DatabaseAway:
            raise
        except Exception as error:
            if isinstance(error, ReplayRefused) and not isinstance(error, NoHandler):
                raise
            delay_seconds = next(delays, None)
            if delay_seconds is None or isinstance(error, PermanentEventError | UnreadableRecord | NoHandler):
                # Also when the database was disturbed so often: nobody would ever see it otherwise.
                _note_failure(letter_id, error, by=CONSUMER, attempts=attempts)
                raise ReplayFailed(_in_words(error)) from error
            metrics.CONSUMER_RETRIES.labels(consumer.name).inc()
        _wait(delay_seconds, should_stop)


def _note_failure(letter_id: int, error: Exception, *, by: str, attempts: int = 1) -> None:
    reason, text = DeadLetter.Reason.FAILED, _in_words(error)
    if isinstance(error, UnreadableRecord | NoHandler):
        reason, text, attempts = getattr(error, "reason", reason), str(error), 0
    elif isinstance(error, PermanentEventError):
        reason = DeadLetter.Reason.PERMANENT
    logger.error("dead letter failed again", extra={"dead_letter": letter_id, "by": by}, exc_info=error)
    with transaction.atomic():
        letter = DeadLetter.objects.open().select_for_update().filter(pk=letter_id).first()
        if letter is None:
            return  # closed by somebody else since
        letter.replays += by != CONSUMER
        text_of_traceback = "".join(traceback.format_exception(error))
        dead_letters.fail_again(letter, reason, text, traceback_text=text_of_traceback, attempts=attempts, by=by)
        if by != CONSUMER:
            _note_action("dead_letter.replay_failed", letter, by=by, error=letter.error)


def _rehearse(letter_id: int, force: bool, chosen: Collection[int]) -> None:
    """Find out what would keep a letter from being replayed once the chosen ones before it are. Changes nothing."""
    letter = _found(letter_id)
    _refuse_closed(letter)
    _check(letter, force, chosen)
    try:
        _event(letter)
    except UnreadableRecord as error:
        raise ReplayFailed(str(error)) from error


def _check(letter: DeadLetter, force: bool, chosen: Collection[int] = ()) -> None:
    """Refuse a replay out of order or too often."""
    if letter.replays >= outbox_settings().MAX_REPLAYS and not force:
        raise ReplayRefused(f"replayed in vain {letter.replays} times: mend the cause, then force it, or discard it")
    if _parks(letter.consumer) and (first := dead_letters.before(letter).exclude(pk__in=chosen).first()):
        raise ReplayRefused(f"dead letter {first.pk} of the same key comes first: replay or discard it")


def _check_is_next(letter: DeadLetter) -> None:
    if letter.reason != DeadLetter.Reason.BEHIND or dead_letters.before(letter).exists():
        raise ReplayRefused("not the next of its key any more")


def _event(letter: DeadLetter) -> tuple[Handler, Event]:
    """The event as its handler is to see it. Raises UnreadableRecord, NoHandler, and ReplayRefused."""
    try:
        consumer = consumer_named(letter.consumer)
    except LookupError as error:
        raise ReplayRefused(str(error)) from None
    record = Record(
        letter.topic,
        letter.partition,
        letter.offset,
        None if letter.key is None else bytes(letter.key),
        None if letter.value is None else bytes(letter.value),
        [(name, base64.b64decode(value)) for name, value in letter.headers],
    )
    base = record.envelope()
    route = consumer.route(base.event_type, base.event_version)
    if route is None:
        record.event(base)  # of a type that nobody knows: that is the better reason
        raise NoHandler(f"consumer {consumer.name} has no handler of {base.event_type}: discard the letter")
    return route.handler, record.event(base, route.version)


def _locked(letter_id: int, wait_seconds: float) -> DeadLetter:
    """An open letter, with the lock of its key. Raises ReplayRefused."""
    letters = dead_letters.lock(_found(letter_id), [letter_id], wait_seconds)
    if letters is None:
        raise ReplayRefused("its key is being handled just now: try again")
    if not letters:
        _refuse_closed(_found(letter_id))
        raise ReplayRefused("it has just come again: look again")
    return letters[0]


def _found(letter_id: int) -> DeadLetter:
    letter: DeadLetter | None = DeadLetter.objects.filter(pk=letter_id).first()
    if letter is None:
        raise ReplayRefused("there is no such dead letter")
    return letter


def _refuse_closed(letter: DeadLetter) -> None:
    if letter.resolution:
        raise AlreadyClosed(f"{letter.resolution} already")


def _in_key_order(ids: Collection[int], *, only_parking: bool = False) -> list[list[int]]:
    """The ids in order, those of one key together; with `only_parking` only where the consumer parks keys."""
    places = {
        pk: (consumer_name, topic, key if key is None else bytes(key))
        for pk, consumer_name, topic, key in DeadLetter.objects.filter(pk__in=ids).values_list(
            "pk", "consumer", "topic", "key"
        )
    }
    groups: dict[object, list[int]] = {}
    for pk in sorted(set(ids)):
        place = places.get(pk)
        is_alone = place is None or place[2] is None or (only_parking and not _parks(place[0]))
        groups.setdefault(pk if is_alone else place, []).append(pk)
    return list(groups.values())


def _parks(consumer_name: str) -> bool:
    try:
        return consumer_named(consumer_name).on_failure == "park_key"
    except LookupError:
        return False


def _note_action(action: str, letter: DeadLetter, *, by: str, reason: str = "", **detail: str) -> None:
    note_action(
        action,
        consumer=letter.consumer,
        subject=str(letter.pk),
        by=by,
        reason=reason,
        event_id=str(letter.event_id),
        **detail,
    )


def _wait(seconds: float, should_stop: Callable[[], bool]) -> None:
    """Wait before a retry. Raises ReplayRefused when told to stop."""
    deadline = time.monotonic() + seconds
    while (left_seconds := deadline - time.monotonic()) > 0:
        if should_stop():
            raise ReplayRefused("told to stop")
        time.sleep(min(left_seconds, 0.1))


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _listed(ids: Sequence[int]) -> str:
    more = f" and {len(ids) - 10} more" if len(ids) > 10 else ""
    return ", ".join(map(str, ids[:10])) + more
