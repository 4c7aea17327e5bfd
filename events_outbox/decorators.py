"""Parts that a handler is put together from: `retrying`, `logged` (specification, RetryHandler and LoggingHandler).

Each stands over a function, a class of handler objects or such an object, in any order:

    @billing.handles("order.placed")
    @logged
    @retrying(RetryPolicy(max_retries=2))
    def charge(event): ...

The handler keeps its name, in metrics too.
"""

import logging
import time
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, TypeVar, cast

from django.db import connection, transaction

from .exceptions import PermanentEventError
from .handlers import Event
from .policies import RetryPolicy

logger = logging.getLogger(__name__)

Decorated = TypeVar("Decorated")
Function = Callable[..., None]
_METHODS = ("handle", "handle_batch")


def retrying(policy: RetryPolicy | None = None) -> Callable[[Decorated], Decorated]:
    """Try a handler again when it fails: the decorator. None is the specification's 100, 200 and 400 ms.

    Each attempt has a savepoint, so one that fails leaves no effect, and a statement that failed does not spoil the
    next attempt. The waits are inside of the event's transaction and hold what it has locked: keep them short, and
    leave long ones to the consumer's `retry`. That one counts on its own: each of its attempts has all of these, so
    give the consumer `RetryPolicy(max_retries=0)` where these are to be all.

    A PermanentEventError is not tried again, nor anything once the database connection is gone. The last error is
    raised as it is, with a note of the attempts.
    """
    chosen = policy or RetryPolicy()

    def wrap(function: Function) -> Function:
        @wraps(function)
        def attempts(*args: Any) -> None:
            for number, delay_seconds in enumerate([*chosen.delays_seconds(), None], start=1):
                try:
                    with transaction.atomic():
                        function(*args)
                        # Leaving the block would be a silent rollback where the function swallowed a database error.
                        connection.validate_no_broken_transaction()
                    return
                except PermanentEventError:
                    raise
                except Exception as error:
                    # Without its connection the event's transaction is lost, and with it the mark "processed".
                    is_lost = connection.in_atomic_block and connection.needs_rollback
                    if delay_seconds is None or is_lost:
                        error.add_note(f"failed after {number - 1} retries")
                        raise
                    logger.warning(
                        "handler failed, trying again",
                        extra={
                            **_subject(function, args[-1]),
                            "attempt": number,
                            "delay_seconds": delay_seconds,
                            "error": f"{type(error).__name__}: {error}",
                        },
                    )
                time.sleep(delay_seconds)

        return attempts

    return lambda handler: _decorate(handler, wrap)


def logged(handler: Decorated) -> Decorated:
    """Log each call of a handler when it ends, with its duration in ms and, if it failed, its error: the decorator.

    A failure is a warning: whether the event is given up is for the consumer to say.
    """

    def wrap(function: Function) -> Function:
        @wraps(function)
        def call(*args: Any) -> None:
            subject = _subject(function, args[-1])
            logger.debug("handling event", extra=subject)
            started = time.perf_counter()
            try:
                function(*args)
            except Exception as error:
                failure = {"duration_ms": _ms_since(started), "error": f"{type(error).__name__}: {error}"}
                logger.warning("event failed", extra={**subject, **failure})
                raise
            logger.info("event handled", extra={**subject, "duration_ms": _ms_since(started)})

        return call

    return _decorate(handler, wrap)


class _Wrapped:
    """A handler object whose method goes through a decorator."""

    def __init__(self, inner: Any, wrap: Callable[[Function], Function]) -> None:
        self.supported_event_types: Callable[[], Iterable[str]] = inner.supported_event_types
        for name in _methods_of(inner):
            setattr(self, name, wrap(getattr(inner, name)))


def _decorate(handler: Decorated, wrap: Callable[[Function], Function]) -> Decorated:
    if isinstance(handler, type):
        if not _methods_of(handler):
            raise TypeError(f"{handler!r} has neither handle() nor handle_batch()")
        for name in _methods_of(handler):
            setattr(handler, name, wrap(getattr(handler, name)))
        return handler
    if _methods_of(handler):
        return cast(Decorated, _Wrapped(handler, wrap))
    if not callable(handler):
        raise TypeError(f"{handler!r} is neither a function of events nor a handler object")
    return cast(Decorated, wrap(handler))


def _methods_of(handler: object) -> list[str]:
    return [name for name in _METHODS if callable(getattr(handler, name, None))]


def _subject(function: Function, given: Event[Any] | list[Event[Any]]) -> dict[str, Any]:
    name = f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    if isinstance(given, Event):
        return {
            "handler": name,
            "event_type": given.event_type,
            "event_id": str(given.event_id),
            "aggregate_id": given.aggregate_id,
        }
    return {"handler": name, "events": len(given)}


def _ms_since(started: float) -> float:
    return round((time.perf_counter() - started) * 1000, 3)
