"""The leader's database session: the lock, the cursor that only its holder moves, and the parked events.

Everything here runs on one dedicated session. The lock lives and dies with it, so a relay that has lost the lock
has lost the means to move the cursor too.
"""

import contextlib
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from django.db import DEFAULT_DB_ALIAS, connections

from .conf import outbox_settings
from .exceptions import LeadershipLost
from .fields import NOTHING_SEEN, PgSnapshot
from .pooling import require_own_session
from .rate import Rate
from .recovery import rebuild_cursor
from .window import PAGE_COLUMNS, PAGE_MAX_BYTES, read_bytes, take_snapshot

logger = logging.getLogger(__name__)

SESSION_LOST = (
    psycopg.OperationalError,
    psycopg.InterfaceError,
    # Ended by the server while frozen in the midst of a transaction: an internal error to the driver.
    psycopg.errors.IdleInTransactionSessionTimeout,
)
LOCK_KEY = 0x6F7574626F78  # "outbox"; advisory locks are per database
APPLICATION_NAME = "relay_outbox"
_CURSOR = "events_outbox_relaycursor"
_UNDELIVERABLE = "events_outbox_undeliverableevent"
_OUTBOX = "events_outbox_outboxevent"
# Who has paused the relay, and why; null: nobody.
_PAUSE = "(SELECT paused_by || ': ' || reason FROM events_outbox_relaypause)"


@dataclass(frozen=True)
class Parked:
    """An event to park: why, in one word and in a sentence."""

    event_id: int
    topic: str
    aggregate_id: str
    reason: str
    error: str


def session_parameters(application_name: str) -> dict[str, Any]:
    """Return what psycopg needs for a session beside Django's, in autocommit mode, in whatever thread."""
    parameters = connections[DEFAULT_DB_ALIAS].get_connection_params()
    for django_only in ("cursor_factory", "context", "pool"):
        parameters.pop(django_only, None)
    # The keepalives of this side: a database whose host is lost must not hang the relay for many minutes.
    keepalives = {"keepalives_idle": 3, "keepalives_interval": 1, "keepalives_count": 3, "tcp_user_timeout": 10_000}
    return {
        **parameters,
        "autocommit": True,
        "application_name": application_name,
        "connect_timeout": 5,
        **keepalives,
    }


def open_session(application_name: str = APPLICATION_NAME) -> psycopg.Connection[Any]:
    """Open the relay's own session, in autocommit mode. By its `application_name` it counts as a relay, or not.

    It ends by itself, and with it the lock, when the relay is frozen (no statement for the session timeout) or its
    host is lost (keepalives). Raises psycopg.OperationalError when the database is away, ImproperlyConfigured when a
    pooler in between does not leave us a session of our own.
    """
    parameters = session_parameters(application_name)
    session = psycopg.connect(**parameters)
    require_own_session(session, lambda: psycopg.connect(**parameters))
    read_bytes(session)
    timeout_seconds = outbox_settings().LEADER_SESSION_TIMEOUT_SECONDS
    for name, value in (
        ("idle_session_timeout", f"{timeout_seconds}s"),
        ("idle_in_transaction_session_timeout", f"{timeout_seconds}s"),
        ("tcp_keepalives_idle", "3"),
        ("tcp_keepalives_interval", "1"),
        ("tcp_keepalives_count", "3"),
        # The window of a long outage may take its time; a role's own limit is meant for requests.
        ("statement_timeout", "0"),
        # A cursor is read to its end here; the default plans for its first tenth.
        ("cursor_tuple_fraction", "1"),
    ):
        session.execute("SELECT set_config(%s, %s, false)", [name, value])
    # A relay that dies while the server works for it frees the lock then, and not when that work is done. Not every
    # system can tell.
    with contextlib.suppress(psycopg.errors.InvalidParameterValue):
        session.execute("SET client_connection_check_interval = '1s'")
    return session


class Leader:
    """The state that the lock protects. Every method raises LeadershipLost when the session is gone."""

    def __init__(self, session: psycopg.Connection[Any]) -> None:
        self.session = session
        self.published = NOTHING_SEEN
        self.window: PgSnapshot | None = None
        self.window_last_id = 0
        self.parked_keys: set[tuple[str, str]] = set()
        self.last_error = ""
        self.paused: str | None = None
        """Who has paused the relay, and why, as of the last save; None: nobody."""
        self._place = "(0,0)"  # of the cursor's row in its table
        self._discarded: tuple[Any, ...] = ()
        self._server_process = 0
        self._rate = Rate()

    def try_lead(self) -> bool:
        """Take the lock if it is free, and load the cursor. False: another relay leads.

        Can take long after a restore. Raises CursorLost when the cursor is to be rebuilt and the broker is away.
        """
        ((leads, self._server_process),) = self.session.execute(
            "SELECT pg_try_advisory_lock(%s), pg_backend_pid()", [LOCK_KEY]
        ).fetchall()
        if not leads:
            self._end_frozen_leader()
            return False
        self._load()
        return True

    def _end_frozen_leader(self) -> None:
        """End the leader's session when the server has been waiting for the leader to take an answer.

        No timeout of the server covers that one; idle sessions end by themselves.
        """
        self.session.execute(
            """SELECT pg_terminate_backend(a.pid) FROM pg_stat_activity a JOIN pg_locks l ON l.pid = a.pid
                WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
                  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                  AND (l.classid::bigint << 32) + l.objid::bigint = %s
                  AND a.wait_event = 'ClientWrite' AND a.query_start < now() - make_interval(secs => %s)""",
            [LOCK_KEY, outbox_settings().LEADER_SESSION_TIMEOUT_SECONDS],
        )

    def _load(self) -> None:
        execute = self.session.execute
        cluster: int
        ((cluster, now),) = execute(
            "SELECT system_identifier, pg_current_snapshot()::text FROM pg_control_system()"
        ).fetchall()
        query = f"""SELECT published::text, "window"::text, window_last_id, system_identifier FROM {_CURSOR}"""
        rows = execute(query).fetchall()
        if not rows:
            rebuild_cursor(self.session, "the cursor's row is missing")
            rows = execute(query).fetchall()
        published, window, self.window_last_id, cursors_cluster = rows[0]
        self.published = PgSnapshot.parse(published)
        self.window = PgSnapshot.parse(window) if window else None
        if cursors_cluster not in (None, cluster):
            self._rebase(cluster)
        elif max(self.published.xmax, self.window.xmax if self.window else 0) > PgSnapshot.parse(now).xmax:
            # It would take every event to come for published, until the transaction ids have caught up with it.
            rebuild_cursor(self.session, "the cursor points into the future")
            ((published,),) = execute(f"SELECT published::text FROM {_CURSOR}").fetchall()
            self.advance(PgSnapshot.parse(published), None)
        ((self.paused,),) = execute(
            f"""UPDATE {_CURSOR} SET leader = %s, leader_since = now(), heartbeat_at = now(), system_identifier = %s
                RETURNING {_PAUSE}""",
            [f"{socket.gethostname()}:{os.getpid()}", cluster],
        ).fetchall()
        self.load_parked_keys()

    def load_parked_keys(self) -> None:
        rows = self.session.execute(
            f"SELECT DISTINCT topic::text, aggregate_id::text FROM {_UNDELIVERABLE} WHERE discarded_at IS NULL"
        )
        self.parked_keys = {(topic, aggregate_id) for topic, aggregate_id in rows}

    def _rebase(self, cluster: int) -> None:
        """Carry the cursor over to another cluster, after a restore or pg_upgrade.

        The rows' transaction ids may mean nothing there, but "visible in the old snapshot" is arithmetic and still
        true of every row that was there when the cursor was last written. Unpublished rows get a transaction id of
        this cluster, published ones the frozen one.

        Rows written in this cluster since the cursor's row was written in it (by the restore, or before pg_upgrade)
        are unpublished whatever the arithmetic says. They are those whose transaction id is not below that of the
        cursor's row, nor above that of their own row, which in a savepoint is higher. A restored row can be taken
        for one of them by chance: it is published once more.
        """
        start = take_snapshot(self.session)  # before the update: what the update stamps must not be seen by it
        window = str(self.window) if self.window else None
        with self.session.transaction():
            stamped = self.session.execute(
                f"""WITH now AS (SELECT pg_current_xact_id()::text::numeric AS xid),
                    -- A row's xmin has 32 bits: the 64-bit id is the latest one with those bits.
                    cursor AS (SELECT xid - mod(xid - c.xmin::text::numeric + 4294967296, 4294967296) AS xid
                                 FROM {_CURSOR} c, now)
                    UPDATE {_OUTBOX} o SET transaction_id = CASE
                        WHEN transaction_id::text::numeric
                             BETWEEN cursor.xid
                                 AND now.xid - mod(now.xid - o.xmin::text::numeric + 4294967296, 4294967296)
                        THEN pg_current_xact_id()
                        WHEN pg_visible_in_snapshot(transaction_id, %(published)s::pg_snapshot) THEN '2'::xid8
                        WHEN %(window)s::text IS NOT NULL AND id <= %(last_id)s
                             AND pg_visible_in_snapshot(transaction_id, %(window)s::pg_snapshot) THEN '2'::xid8
                        ELSE pg_current_xact_id() END
                      FROM cursor, now""",
                {"published": str(self.published), "window": window, "last_id": self.window_last_id},
            )
            self.advance(start, None)
            self._save()
            self.session.execute(f"UPDATE {_CURSOR} SET system_identifier = %s", [cluster])
        logger.warning("cursor carried over to this database cluster", extra={"events": stamped.rowcount})

    def advance(self, hi: PgSnapshot, last_id: int | None) -> None:
        """Stand behind event `last_id` of the window up to `hi`; None: behind the whole window."""
        if last_id is None:
            self.published, self.window, self.window_last_id = hi, None, 0
        else:
            self.window, self.window_last_id = hi, last_id

    def save(self, parked: Sequence[Parked] = (), published: int = 0) -> None:
        """Write the cursor and a heartbeat, and park events, in one transaction; and hear whether to pause.

        `published`: events since the last save, for the rate.
        """
        self._rate.count(published)
        try:
            if not parked:
                self._save()
                return
            with self.session.transaction():
                self.session.cursor().executemany(
                    f"""INSERT INTO {_UNDELIVERABLE} (event_id, topic, aggregate_id, reason, error,
                               discarded_by, discard_reason)
                        VALUES (%s, %s, %s, %s, %s, '', '') ON CONFLICT (event_id) DO NOTHING""",
                    [(p.event_id, p.topic, p.aggregate_id, p.reason, p.error) for p in parked],
                )
                self._save()
        except SESSION_LOST as error:
            raise LeadershipLost(str(error)) from error

    def _save(self) -> None:
        values = [
            str(self.published),
            str(self.window) if self.window else None,
            self.window_last_id,
            self.last_error,
            self._rate.per_second(),
            self._server_process,
        ]
        # By the row's place: while a long transaction keeps its dead versions alive, a search by id goes through
        # all of them, and each save would take longer than the one before.
        for place in (f"ctid = '{self._place}'", "id = 1"):
            row = self.session.execute(
                f"""UPDATE {_CURSOR} SET published = %s, "window" = %s, window_last_id = %s,
                           heartbeat_at = now(), last_error = %s, events_per_second = %s
                     WHERE {place} AND pg_backend_pid() = %s RETURNING ctid::text, {_PAUSE}""",
                values,
            ).fetchone()
            if row:
                self._place, self.paused = row
                return
        raise LeadershipLost("the cursor's row is gone, or a pooler has given this session's lock to another one")

    def take_up_operators_work(self) -> bool:
        """Take up what operators redrive and discard. Return whether there are events to redrive.

        A request extends to what was parked behind it since: a key is redriven whole or not at all. What was parked
        behind a discarded event, because this relay had not heard of that yet, is redriven too.
        """
        (discarded,) = self.session.execute(
            f"SELECT count(*), max(discarded_at) FROM {_UNDELIVERABLE} WHERE discarded_at IS NOT NULL"
        ).fetchall()
        if discarded != self._discarded:
            self._discarded = discarded
            self.session.execute(
                f"""UPDATE {_UNDELIVERABLE} u SET redrive_requested_at = now()
                     WHERE redrive_requested_at IS NULL AND discarded_at IS NULL AND reason = 'behind'
                       AND NOT EXISTS (SELECT FROM {_UNDELIVERABLE} r
                                        WHERE (r.topic, r.aggregate_id) = (u.topic, u.aggregate_id)
                                          AND r.discarded_at IS NULL AND r.reason <> 'behind')"""
            )
            self.load_parked_keys()
        ((requested,),) = self.session.execute(
            f"""SELECT EXISTS (SELECT FROM {_UNDELIVERABLE}
                               WHERE redrive_requested_at IS NOT NULL AND discarded_at IS NULL)"""
        ).fetchall()
        if requested:
            self.session.execute(
                f"""UPDATE {_UNDELIVERABLE} u SET redrive_requested_at = now()
                     WHERE redrive_requested_at IS NULL AND discarded_at IS NULL
                       AND (topic, aggregate_id) IN (SELECT topic, aggregate_id FROM {_UNDELIVERABLE}
                                                      WHERE redrive_requested_at IS NOT NULL)"""
            )
        return bool(requested)

    def redrive_requests(self, limit: int) -> list[tuple[Any, ...]]:
        """Return parked events that an operator wants published, as rows of a page, in the order of parking.

        At least one; fewer than `limit` when their values exceed PAGE_MAX_BYTES.
        """
        return self.session.execute(
            f"""SELECT {PAGE_COLUMNS}
                  FROM (SELECT e.*, u.id AS place,
                               sum(octet_length(e.value)) OVER (ORDER BY u.id) - octet_length(e.value) AS bytes_before
                          FROM (SELECT id, event_id FROM {_UNDELIVERABLE}
                                 WHERE redrive_requested_at IS NOT NULL AND discarded_at IS NULL
                                 ORDER BY id LIMIT %s) u JOIN {_OUTBOX} e ON e.id = u.event_id) e
                 WHERE bytes_before < %s ORDER BY place""",
            [limit, PAGE_MAX_BYTES],
            binary=True,
        ).fetchall()

    def close_redrive(self, delivered_ids: Sequence[int], refused: Sequence[Parked]) -> None:
        """Forget what a redrive delivered; keep what was refused again parked, with its new error."""
        with self.session.transaction():
            self.session.execute(f"DELETE FROM {_UNDELIVERABLE} WHERE event_id = ANY(%s)", [list(delivered_ids)])
            self.session.cursor().executemany(
                f"UPDATE {_UNDELIVERABLE} SET reason = %s, error = %s WHERE event_id = %s",
                [(p.reason, p.error, p.event_id) for p in refused],
            )
            # The rest of a key that was refused waits behind it again.
            self.session.cursor().executemany(
                f"""UPDATE {_UNDELIVERABLE} SET redrive_requested_at = NULL
                     WHERE topic = %s AND aggregate_id = %s""",
                list({(p.topic, p.aggregate_id) for p in refused}),
            )
        self.load_parked_keys()
