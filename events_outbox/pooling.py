"""Whether a connection pooler stands between us and PostgreSQL, and whether it leaves us a session of our own.

The relay's lock, its settings and its cursor over a window live in one session of the server. A pooler in transaction
mode (pgbouncer's pool_mode=transaction) gives each transaction to whatever session is free, so they would be lost,
or in somebody else's hands, without an error. A pooler in session mode is as good as none.
"""

import queue
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import psycopg
from django.core.exceptions import ImproperlyConfigured

Session = psycopg.Connection[Any]

PROBES = 20
PROBE_SECONDS = 3.0
"""How long a second connection is waited for: a pool that is used up may never give one."""
HINT = "connect directly, or through a pool in session mode; web workers may keep a DATABASE_URL of their own"


def require_own_session(session: Session, open_another: Callable[[], Session]) -> None:
    """Raise ImproperlyConfigured, and close the session, when a pooler shares it with others: see `is_shared()`."""
    if is_shared(session, open_another):
        session.close()
        raise ImproperlyConfigured(
            f"a connection pooler gives each transaction another database session, and the relay needs one of its own; "
            f"{HINT}"
        )


def is_pooled(session: Session) -> bool:
    """Whether a pooler is in between: the server process that works for us is not the one named at the start."""
    return session.info.backend_pid != _server_process(session)


def is_shared(session: Session, open_another: Callable[[], Session]) -> bool:
    """Whether a pooler in between gives our transactions to whatever session is free. `session` is in autocommit mode.

    It shows when another server process works for us than before, or when ours works for a second connection too. A
    quiet pool gives out the session that came back last, so the second connection gets ours; a busy or rotating one
    gives us others. Many looks make it all but certain; what is found is never wrong. A connection without a pooler
    costs one query.
    """
    if not is_pooled(session):
        return False
    other = _opened_in_time(open_another)
    if other is None:
        return False
    try:
        return _changes_or_is_ours(session, other)
    except psycopg.errors.ProtocolViolation:  # a transaction is refused: pool_mode=statement
        return True
    finally:
        other.close()


def _changes_or_is_ours(session: Session, other: Session) -> bool:
    ours = _server_process(session)
    for _ in range(PROBES):
        if _server_process(session) != ours:
            return True
        with other.transaction():  # so that it keeps the session it got
            if _server_process(other) == ours or _server_process(session) != ours:
                return True
    return False


def _server_process(session: Session) -> int:
    ((pid,),) = session.execute("SELECT pg_backend_pid()").fetchall()
    return int(pid)


def _opened_in_time(open_another: Callable[[], Session]) -> Session | None:
    """Another connection, once it has a server process; None when none is to be had in time."""
    opened: queue.Queue[Session | None] = queue.Queue()
    given_up = threading.Event()

    def open_it() -> None:
        try:
            with ExitStack() as unless_wanted:
                other = open_another()
                unless_wanted.callback(other.close)
                other.autocommit = True
                _server_process(other)
                if not given_up.is_set():
                    unless_wanted.pop_all()
                    opened.put(other)
        except psycopg.Error:
            opened.put(None)

    threading.Thread(target=open_it, name="second connection", daemon=True).start()
    try:
        return opened.get(timeout=PROBE_SECONDS)
    except queue.Empty:
        given_up.set()
        return None
