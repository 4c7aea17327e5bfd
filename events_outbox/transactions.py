"""The database transaction that handlers run in, of a consumer's batch and of a replay alike."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from django.db import DatabaseError, InternalError, connection, transaction
from psycopg.pq import TransactionStatus

from monitoring import metrics

logger = logging.getLogger(__name__)

T = TypeVar("T")

# They say nothing about the event, so trying again costs it no retries: serialization failure, deadlock; server
# shutdown, crash and start, session ended; too many connections.
_DISTURBANCES = frozenset({"40001", "40P01", "57P01", "57P02", "57P03", "57P05", "53300"})
_STOOD_STILL = "25P03"  # idle_in_transaction_session_timeout, which psycopg calls an internal error


def in_transaction(consumer_name: str, work: Callable[[], T]) -> T:
    """Run `work` in one transaction and then what it gave to `transaction.on_commit()`, whether those raise or not."""
    is_outermost = not connection.in_atomic_block
    hooks: list[Any] = []
    with transaction.atomic():
        result = work()
        # A handler that swallowed a database error has broken the transaction: its commit would be a silent
        # rollback of the whole batch.
        connection.validate_no_broken_transaction()
        if connection.connection.info.transaction_status == TransactionStatus.INERROR:
            raise DatabaseError("a handler caught a database error outside an atomic() block of its own")
        if is_outermost:
            hooks, connection.run_on_commit = connection.run_on_commit, []
    for _, hook, _ in hooks:
        # All of them: the effects are committed, and Django itself would stop at the first that raises.
        try:
            hook()
        except Exception:
            logger.exception("a function given to on_commit() failed", extra={"consumer": consumer_name})
            metrics.CONSUMER_COMMIT_HOOK_FAILURES.labels(consumer_name).inc()
    return result


def is_disturbance(error: DatabaseError) -> bool:
    """Whether the error speaks of the connection or of other transactions, and not of this one's statements.

    The connection itself cannot be asked: leaving the block, Django has replaced it already.
    """
    state = getattr(error.__cause__, "sqlstate", None)
    if isinstance(error, InternalError):
        return state == _STOOD_STILL
    return state is None or state.startswith("08") or state in _DISTURBANCES
