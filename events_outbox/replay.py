"""Publishing again what the relay has published already, in order, with the same ids.

What is published again lies before the relay's cursor, so its first copy is in the topic already: whoever drops
copies by event id sees the same order as before. That is why a replay needs no lock and can run beside a relay.
Only `unhandled`, made for a broker that has lost those first copies, keeps relays from leading meanwhile: a newer
event must not reach a consumer before the older ones of its key.
"""

import contextlib
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Self
from uuid import UUID

import psycopg
from django.core.exceptions import EmptyResultSet
from django.db.models import Exists, OuterRef, Q

from .conf import outbox_settings
from .exceptions import LeadershipLost
from .handlers import consumers
from .leader import LOCK_KEY, Parked, open_session
from .models import OutboxEvent, OutboxEventQuerySet, ProcessedEvent, RelayCursor
from .operators import note_action
from .publisher import Publisher
from .window import Row, read_page

APPLICATION_NAME = "replay_outbox"
STOP_GRACE_SECONDS = 2.0
LOCK_SECONDS = 1.0
NOTED_IDS = 500
"""Values of one option that the audit trail keeps."""
CLOCK_SLACK = timedelta(hours=1)
"""How far `created_at` may fall behind the order of ids: a clock that was set, a statement that ran long."""


class ReplayStopped(Exception):
    """The replay was asked to stop before its end. `Replay.published` and `Replay.last_id` say where it stood."""


class ReplayRefused(Exception):
    """The broker refused an event for good. No later event of its key was published again."""

    def __init__(self, parked: Parked) -> None:
        super().__init__(f"event {parked.event_id} of {parked.aggregate_id} was refused: {parked.error}")
        self.event_id = parked.event_id


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which published events to publish again: those that meet every condition given. An empty one takes all.

    `since` is inclusive, `until` exclusive, both are about `created_at`. `event_types` may hold patterns such as
    "conversation.*". `unhandled`: some registered consumer handles the type and has no processed mark of the event.
    `after_id`: only later ones, to go on after a replay that was stopped.

    Aggregate and event ids are found by index, times by bisecting the ids. Any other condition is looked up in every
    event of the time range: give one where the outbox is large.
    """

    since: datetime | None = None
    until: datetime | None = None
    event_types: Sequence[str] = ()
    aggregate_ids: Sequence[str] = ()
    tenant_ids: Sequence[str] = ()
    event_ids: Sequence[UUID] = ()
    unhandled: bool = False
    after_id: int = 0

    def events(self, cursor: RelayCursor) -> OutboxEventQuerySet:
        """The selected events. Undeliverable and discarded ones were never published, so there is no "again"."""
        events: OutboxEventQuerySet = OutboxEvent.objects.past(cursor).filter(
            id__gt=self.after_id, undeliverable__isnull=True
        )
        if self.since is not None:
            events = events.filter(created_at__gte=self.since)
        if self.until is not None:
            events = events.filter(created_at__lt=self.until)
        if self.event_types:
            events = events.filter(of_types(self.event_types))
        if self.aggregate_ids:
            events = events.filter(aggregate_id__in=self.aggregate_ids)
        if self.tenant_ids:
            events = events.filter(tenant_id__in=self.tenant_ids)
        if self.event_ids:
            events = events.filter(event_id__in=self.event_ids)
        if self.unhandled:
            events = events.filter(_unhandled())
        return events

    def options(self) -> dict[str, Any]:
        """What chooses events, as far as it is given: the options of `replay_outbox`, with their values."""
        options = {
            "--since": self.since,
            "--until": self.until,
            "--event-type": self.event_types,
            "--aggregate-id": self.aggregate_ids,
            "--tenant-id": self.tenant_ids,
            "--event-id": self.event_ids,
            "--unhandled": self.unhandled,
        }
        return {option: value for option, value in options.items() if value}

    def command(self, after_id: int = 0) -> str:
        """The command that publishes these events again. Times are absolute there: an age means another time later."""
        arguments = []
        for option, value in self.options().items():
            for one in value if isinstance(value, list | tuple) else [value]:
                text = one.isoformat() if isinstance(one, datetime) else str(one)
                arguments.append(option if one is True else f"{option}={shlex.quote(text)}")
        chosen = " ".join(arguments or ["--all"])
        return f"python manage.py replay_outbox {chosen}" + (f" --after-id {after_id}" if after_id else "")


def of_types(event_types: Sequence[str]) -> Q:
    """The condition that an event is of one of these types or patterns ("conversation.*", "*")."""
    condition = Q(pk__in=[])
    for event_type in event_types:
        if event_type.endswith("*"):
            condition |= Q(event_type__startswith=event_type.removesuffix("*"))
        else:
            condition |= Q(event_type=event_type)
    return condition


def _unhandled() -> Q:
    wanted = Q(pk__in=[])
    for consumer in consumers():
        mark = ProcessedEvent.objects.filter(consumer=consumer.name, event_id=OuterRef("event_id"))
        wanted |= of_types(consumer.event_types) & ~Q(Exists(mark))
    keep_days = outbox_settings().PROCESSED_KEEP_DAYS
    if keep_days is not None:
        # The marks of older events are pruned: nothing tells whether they were handled.
        wanted &= Q(created_at__gte=datetime.now(UTC) - timedelta(days=keep_days))
    return wanted


class Replay:
    """One replay, on a database session of its own. Entering it selects and counts, `publish()` publishes.

        with Replay(Selection(aggregate_ids=["c1"])) as replay:
            print(replay.total)
            replay.publish()

    `total`: how many events are selected; `outer_ids`: the first and the last of them. `published`: how many are
    published again so far; `last_id`: the last of those. `events_per_second`: a limit, or None for none.
    `on_progress()` is called after each batch, `on_wait(what for)` every half second while the broker is slow or away.

    The ids are selected once and kept by the server (a cursor WITH HOLD), so a replay of millions costs no memory
    here and holds no transaction open.

    Entering raises LeadershipLost when `unhandled` is asked for and a relay leads, and ReplayStopped.
    """

    def __init__(
        self,
        selection: Selection,
        *,
        batch_size: int | None = None,
        events_per_second: int | None = None,
        on_progress: Callable[[], None] = lambda: None,
        on_wait: Callable[[str], None] = lambda what_for: None,
    ) -> None:
        self._selection = selection
        self._batch_size = batch_size or outbox_settings().BATCH_SIZE
        if events_per_second is not None:
            # At least four batches a second, so that the limit holds in the small too.
            self._batch_size = min(self._batch_size, max(1, events_per_second // 4))
        self._events_per_second = events_per_second
        self._on_progress = on_progress
        self._on_wait = on_wait
        # A plain flag: an Event's lock can be held by the very wait that a signal handler interrupts.
        self._stopping = False
        self._gives_up_at = float("inf")
        self._session: psycopg.Connection[Any] | None = None
        self.total = 0
        self.outer_ids: tuple[int, int] | None = None
        self.published = 0
        self.last_id = selection.after_id

    def stop(self) -> None:
        """Ask it to stop; safe in a signal handler. The batch in flight is finished or abandoned."""
        self._gives_up_at = time.monotonic() + STOP_GRACE_SECONDS
        self._stopping = True
        if self._session is not None:
            with contextlib.suppress(psycopg.Error):  # the session is gone
                self._session.cancel()  # the selection of a large outbox may take its time

    def __enter__(self) -> Self:
        self._session = open_session()
        try:
            self._set("application_name", APPLICATION_NAME)  # not to be taken for a relay that stands by
            self._set("idle_session_timeout", "0")  # somebody may be thinking about the count
            if self._selection.unhandled:
                self._keep_relays_from_leading()
            self._select()
        except BaseException:
            self._session.close()
            raise
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._session is not None:
            self._session.close()

    def publish(self) -> None:
        """Publish the selected events again, in id order. A broker that is away is waited for.

        Raises ReplayStopped after `stop()`, ReplayRefused when the broker refuses an event, ProducerBroken when the
        Kafka client fails, psycopg.OperationalError when the database session is lost.
        """
        if self._selection.unhandled:
            # From here on the session is used all the time; frozen, it must not hold the lead for ever.
            self._set("idle_session_timeout", f"{outbox_settings().LEADER_SESSION_TIMEOUT_SECONDS}s")
        publisher = Publisher(self._waiting)
        started = time.monotonic()
        try:
            for rows in self._pages():
                refused = publisher.publish(rows, set())
                if refused:
                    self._stand_before(refused, rows)
                    raise ReplayRefused(refused[0])
                self.published += len(rows)
                self.last_id = rows[-1][0]
                self._on_progress()
                if self._events_per_second is not None:
                    self._pause_until(started + self.published / self._events_per_second)
        except psycopg.errors.QueryCanceled:
            raise ReplayStopped from None
        finally:
            publisher.close()

    def note(self, *, by: str, reason: str = "") -> None:
        """Write what was published again, and what had been asked for, into the audit trail."""
        chosen = {
            option.removeprefix("--"): [str(one) for one in value[:NOTED_IDS]]
            if isinstance(value, list | tuple)
            else str(value)
            for option, value in self._selection.options().items()
        }
        note_action(
            "events.replayed",
            consumer="",
            subject=f"{self.published} events",
            by=by,
            reason=reason,
            published=self.published,
            selected=self.total,
            first_id=self.outer_ids[0] if self.outer_ids else None,
            last_id=self.last_id,
            filter=chosen,
        )

    def _select(self) -> None:
        """Declare the cursor over the selected ids, and count them."""
        cursor = RelayCursor.read()
        events = self._selection.events(cursor)
        if self._selection.since is not None:
            events = events.filter(id__gte=self._first_id_from(self._selection.since - CLOCK_SLACK))
        if self._selection.until is not None:
            events = events.filter(id__lt=self._first_id_from(self._selection.until + CLOCK_SLACK))
        try:
            statement, parameters = events.order_by("id").values_list("id").query.sql_with_params()
        except EmptyResultSet:  # no consumer handles anything
            statement, parameters = "SELECT 0 WHERE false", ()
        self._ask(f"DECLARE replay SCROLL CURSOR WITH HOLD FOR {statement}", parameters)
        if outer := self._ask("FETCH FIRST FROM replay") + self._ask("FETCH LAST FROM replay"):
            self.outer_ids = outer[0][0], outer[1][0]
        self._ask("MOVE ABSOLUTE 0 IN replay")
        self.total = self._execute("MOVE FORWARD ALL IN replay").rowcount
        self._ask("MOVE ABSOLUTE 0 IN replay")

    def _first_id_from(self, moment: datetime) -> int:
        """An id that all events from `moment` on have reached, as far as ids follow time. Some 25 index look-ups."""
        ((low, high),) = self._ask(
            "SELECT coalesce(min(id), 1), coalesce(max(id), 0) + 1 FROM events_outbox_outboxevent"
        )
        while low < high:
            middle = (low + high) // 2
            found = self._ask(
                "SELECT id, created_at FROM events_outbox_outboxevent WHERE id >= %s ORDER BY id LIMIT 1", [middle]
            )
            if found and found[0][1] < moment:
                low = found[0][0] + 1
            else:
                high = middle
        return int(low)

    def _keep_relays_from_leading(self) -> None:
        # The server ends the session of a relay that has just stopped a moment later.
        deadline = time.monotonic() + LOCK_SECONDS
        while self._ask("SELECT pg_try_advisory_lock(%s)", [LOCK_KEY]) != [(True,)]:
            if time.monotonic() > deadline:
                raise LeadershipLost("a relay leads: stop it first")
            time.sleep(0.05)

    def _pages(self) -> Iterator[list[Row]]:
        """Yield the rows of the selection in batches; those that were pruned since are left out."""
        ids: list[int] = []
        while ids := ids + [row[0] for row in self._ask(f"FETCH {self._batch_size - len(ids)} FROM replay")]:
            rows = read_page(self._live_session(), ids)
            if rows:
                yield rows
            ids = [id_ for id_ in ids if rows and id_ > rows[-1][0]]

    def _stand_before(self, refused: Sequence[Parked], rows: Sequence[Row]) -> None:
        """Count what of the batch went out, and stand on the event before the first one that was refused."""
        self.published += len(rows) - len(refused)
        self.last_id = max((row[0] for row in rows if row[0] < refused[0].event_id), default=self.last_id)

    def _waiting(self, what_for: str) -> None:
        if self._stopping and time.monotonic() > self._gives_up_at:
            raise ReplayStopped
        self._on_wait(what_for)
        if self._selection.unhandled:
            self._live_session().execute("SELECT")  # without the lock a relay may lead: raises when it is gone

    def _pause_until(self, moment: float) -> None:
        while (remaining := moment - time.monotonic()) > 0:
            if self._stopping:
                raise ReplayStopped
            time.sleep(min(remaining, 0.2))

    def _set(self, name: str, value: str) -> None:
        self._ask("SELECT set_config(%s, %s, false)", [name, value])

    def _ask(self, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        answer = self._execute(statement, parameters)
        return answer.fetchall() if answer.description else []

    def _execute(self, statement: str, parameters: Sequence[Any] = ()) -> psycopg.Cursor[Any]:
        """Execute on the session, with the parameters put in here: a cursor's declaration takes no others.

        Raises ReplayStopped when asked to stop.
        """
        if self._stopping:
            raise ReplayStopped
        try:
            return psycopg.ClientCursor(self._live_session()).execute(statement.encode(), parameters or None)
        except psycopg.errors.QueryCanceled:
            raise ReplayStopped from None

    def _live_session(self) -> psycopg.Connection[Any]:
        if self._session is None:
            raise RuntimeError("enter the replay first: `with Replay(...) as replay:`")
        return self._session
