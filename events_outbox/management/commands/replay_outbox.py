import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from types import FrameType
from typing import Any
from uuid import UUID

import psycopg
from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError

from events_outbox.exceptions import LeadershipLost
from events_outbox.management.arguments import event_type_pattern, moment, positive
from events_outbox.operators import system_operator
from events_outbox.publisher import ProducerBroken
from events_outbox.replay import Replay, ReplayRefused, ReplayStopped, Selection

SAY_EVERY_SECONDS = 2.0


class Command(BaseCommand):
    help = (
        "Publish events again that the relay has published already, in order, with the same ids, also while a relay "
        "leads. An event must meet every option given; an option given twice takes either value. Aggregate and event "
        "ids are found by index, times by bisection; the other options are looked up in each event of the time range."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        time_help = "ISO 8601, or an age such as 2h or 7d"
        parser.add_argument("--since", type=moment, metavar="TIME", help=f"created then or later: {time_help}")
        parser.add_argument("--until", type=moment, metavar="TIME", help=f"created before: {time_help}")
        for option, kind, text in (
            ("--event-type", event_type_pattern, "a type, or a pattern such as conversation.*"),
            ("--aggregate-id", str, "events of this aggregate"),
            ("--tenant-id", str, "events of this tenant"),
            ("--event-id", UUID, "this event"),
        ):
            parser.add_argument(option, type=kind, action="append", default=[], help=f"{text}; repeatable")
        parser.add_argument(
            "--unhandled",
            action="store_true",
            help="events that some consumer has not handled: for a broker that lost its records; no relay may lead",
        )
        parser.add_argument("--all", action="store_true", help="whatever is kept; needed when no other option chooses")
        parser.add_argument("--after-id", type=int, default=0, metavar="N", help="go on after this id of the outbox")
        parser.add_argument("--rate", type=positive, metavar="N", help="at most so many events a second")
        parser.add_argument("--dry-run", action="store_true", help="show how many there are, and publish nothing")
        parser.add_argument(
            "--no-input", "--noinput", action="store_false", dest="interactive", help="do not ask before publishing"
        )

    def handle(self, **options: Any) -> None:
        selection = _selection(options)
        replay = Replay(
            selection, events_per_second=options["rate"], on_progress=self._progress, on_wait=self._broker_is_away
        )
        self._replay, self._started, self._said_at = replay, time.monotonic(), time.monotonic()
        self._is_asking = False
        with _stopped_by_signals(self._stop) as signals:
            try:
                with replay:
                    self._run(selection, options)
            except ReplayStopped:
                raise CommandError(
                    f"stopped: {self._where(selection)}", returncode=128 + signals[0] if signals else 1
                ) from None
            except ReplayRefused as error:
                raise CommandError(
                    f"{error}. No later event of its key was published again. Mend the cause, or leave that event out "
                    f"with --after-id {error.event_id}; {self._where(selection)}"
                ) from None
            except psycopg.OperationalError as error:
                raise CommandError(f"database session lost ({error}); {self._where(selection)}") from error
            except ProducerBroken as error:
                raise CommandError(f"{error}; {self._where(selection)}") from error
            except (LeadershipLost, ImproperlyConfigured) as error:
                raise CommandError(str(error)) from error

    def _run(self, selection: Selection, options: dict[str, Any]) -> None:
        replay = self._replay
        if len(set(selection.event_ids)) > replay.total:
            self.stderr.write(
                f"{replay.total} of {len(set(selection.event_ids))} event ids can be published again; the others are "
                "not there (any more), not published yet, undeliverable, or left out by another option"
            )
        if replay.outer_ids is None:
            self.stdout.write("0 events to publish again")
            return
        first_id, last_id = replay.outer_ids
        self.stdout.write(f"{replay.total:,} events to publish again, from id {first_id} to {last_id}")
        if options["dry_run"] or not self._is_wanted(options):
            return
        self._started = self._said_at = time.monotonic()
        try:
            replay.publish()
        finally:
            if replay.published:
                with contextlib.suppress(DatabaseError):  # the database is gone, which is said elsewhere
                    replay.note(by=system_operator())
        self.stdout.write(f"published {replay.published:,} events again")

    def _is_wanted(self, options: dict[str, Any]) -> bool:
        """Ask, where there is somebody to ask."""
        if not options["interactive"] or not sys.stdin.isatty():
            return True
        self._is_asking = True
        answer = input("Publish them again? [y/N] ")
        self._is_asking = False
        return answer.strip().lower() in ("y", "yes")

    def _stop(self) -> None:
        self._replay.stop()
        if self._is_asking:  # `input()` would go on waiting
            raise ReplayStopped

    def _progress(self) -> None:
        if self._may_say():
            done, total = self._replay.published, self._replay.total
            per_second = done / (time.monotonic() - self._started)
            self.stdout.write(
                f"{done:,} of {total:,} published again ({done / total:.0%}), {per_second:,.0f}/s, "
                f"up to id {self._replay.last_id}"
            )
            self.stdout.flush()

    def _broker_is_away(self, what_for: str) -> None:
        if self._may_say():
            self.stderr.write(f"waiting for the broker: {what_for}")

    def _may_say(self) -> bool:
        """Whether the last line is long enough ago."""
        if time.monotonic() - self._said_at < SAY_EVERY_SECONDS:
            return False
        self._said_at = time.monotonic()
        return True

    def _where(self, selection: Selection) -> str:
        """Where it stands and how to go on."""
        replay = self._replay
        if not replay.published:
            return "nothing was published again"
        return (
            f"{replay.published:,} of {replay.total:,} were published again. Go on with:\n"
            f"  {selection.command(replay.last_id)}"
        )


def _selection(options: dict[str, Any]) -> Selection:
    plural = {"event_types": "event_type", "aggregate_ids": "aggregate_id", "tenant_ids": "tenant_id"}
    plural["event_ids"] = "event_id"
    selection = Selection(**{f.name: options[plural.get(f.name, f.name)] for f in fields(Selection)})
    chosen = selection.options()
    if not chosen and not options["all"]:
        raise CommandError("say what to publish again: --all, or at least one of the options that choose events")
    if chosen and options["all"]:
        raise CommandError(f"--all contradicts {' '.join(chosen)}")
    if selection.since and selection.until and selection.since >= selection.until:
        raise CommandError("--since must be before --until")
    return selection


@contextmanager
def _stopped_by_signals(stop: Callable[[], None]) -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C call `stop()`, a second one ends the process at once. Yields a list of the first one."""
    received: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, lambda *_: os._exit(128 + number))
        received.append(number)
        stop()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
