import json
import sys
from argparse import SUPPRESS
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import Error

from events_outbox.conf import outbox_settings
from events_outbox.consumer import ConsumerProcess, ConsumerStopped
from events_outbox.handlers import Consumer, consumer_named, consumers
from events_outbox.heartbeats import Heartbeats, Kind, Vitals
from events_outbox.management.arguments import positive
from events_outbox.management.process import Together, run_until_signalled
from events_outbox.pauses import paused
from events_outbox.workers import Parent, WorkerFailed, Workers
from monitoring.worker import Worker


class Command(BaseCommand):
    help = (
        "Run consumers: handle their events, each effectively once. Several in one process have a thread each; "
        "processes of the same consumer, here or elsewhere, share its partitions."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        known = ", ".join(consumer.name for consumer in consumers()) or "none registered"
        parser.add_argument("names", nargs="*", metavar="NAME", help=f"the consumers' names ({known})")
        parser.add_argument("--list", action="store_true", help="show consumers and their handlers; needs no Kafka")
        parser.add_argument("--json", action="store_true", help="with --list: a JSON array")
        parser.add_argument(
            "--workers", type=positive, metavar="N", help="run N processes; one that dies is started again"
        )
        parser.add_argument(
            "--until-idle", type=float, metavar="SECONDS", help="return when nothing came for so many seconds"
        )
        parser.add_argument("--batch-size", type=int, help="events a transaction (default: the consumer's)")
        parser.add_argument("--metrics-port", type=int, default=0, help="serve /metrics and /livez here (default: off)")
        # What --workers adds for its processes: the descriptor of their socket.
        parser.add_argument("--supervised-by", type=int, help=SUPPRESS)

    def handle(self, **options: Any) -> None:
        chosen = _consumers(options["names"])
        if options["list"]:
            self._list(chosen or consumers(), as_json=options["json"])
        elif options["json"]:
            raise CommandError("--json goes with --list")
        elif not chosen:
            raise CommandError("name the consumers to run, or --list them")
        elif options["supervised_by"] is not None:
            _work(chosen, options)
        elif options["workers"] is not None:
            self._supervise(chosen, options)
        else:
            with Worker(_role(chosen), options["metrics_port"], loops=_names(chosen)) as worker:
                _run(chosen, worker, options)

    def _supervise(self, chosen: Sequence[Consumer], options: dict[str, Any]) -> None:
        """Run workers, which run `_work()`."""
        if sys.argv[1:2] != ["consume"]:
            raise CommandError("--workers starts its own command line again: it must be that of `consume`")
        for consumer in chosen:
            partitions = len(consumer.topics) * outbox_settings().TOPIC_PARTITIONS
            if options["workers"] > partitions:
                warning = f"{consumer.name} has {partitions} partitions: workers beyond that have nothing to do"
                self.stderr.write(self.style.WARNING(warning))
        with Worker(_role(chosen), options["metrics_port"]) as worker:
            may_end = options["until_idle"] is not None
            workers = Workers(options["workers"], _names(chosen), worker, may_end=may_end)
            try:
                run_until_signalled(workers.run, workers.stop)
            except WorkerFailed as error:
                raise CommandError(str(error)) from error

    def _list(self, listed: Sequence[Consumer], *, as_json: bool) -> None:
        pauses = _pauses()
        if as_json:
            self.stdout.write(json.dumps([_as_dict(consumer, pauses) for consumer in listed]))
            return
        for consumer in listed:
            self.stdout.write(consumer.name)
            for name, value in _lines(consumer, pauses):
                self.stdout.write(f"  {name:12}{value}")


@dataclass
class _Loop:
    """A consumer's process whose errors name it."""

    process: ConsumerProcess
    until_idle_seconds: float | None

    def run(self) -> None:
        name = self.process.consumer.name
        try:
            self.process.run(until_idle_seconds=self.until_idle_seconds)
        except ConsumerStopped as error:
            raise CommandError(f"{name} stopped, as on_failure says: {error}") from error
        except ImproperlyConfigured as error:
            raise CommandError(f"{name}: {error}") from error

    def stop(self) -> None:
        self.process.stop()


def _run(chosen: Sequence[Consumer], listener: Worker | Parent, options: dict[str, Any]) -> None:
    """Run the consumers side by side; `listener` hears of their ticks and of their end, and a parent is obeyed."""
    loops = {}
    for consumer in chosen:
        process = ConsumerProcess(
            consumer,
            batch_size=options["batch_size"],
            on_tick=partial(listener.tick, consumer.name),
            vitals=Vitals(Kind.CONSUMER, consumer.name, options["metrics_port"]),
        )
        loops[consumer.name] = _Loop(process, options["until_idle"])
    together = Together(loops, listener.done)
    if isinstance(listener, Parent):
        listener.obey(together.stop)
    with Heartbeats([loop.process.vitals for loop in loops.values()]):
        run_until_signalled(together.run, together.stop)


def _work(chosen: Sequence[Consumer], options: dict[str, Any]) -> None:
    """Be one of the workers that a parent process keeps going."""
    with Parent(options["supervised_by"]) as parent, Worker(_role(chosen), 0):
        try:
            _run(chosen, parent, options)
        except CommandError as error:
            parent.failed(str(error))
            raise


def _consumers(names: Sequence[str]) -> list[Consumer]:
    for name in names:
        if names.count(name) > 1:
            raise CommandError(f"{name} is named twice; --workers runs it in several processes")
    try:
        return [consumer_named(name) for name in names]
    except LookupError as error:
        raise CommandError(str(error)) from None


def _names(chosen: Sequence[Consumer]) -> list[str]:
    return [consumer.name for consumer in chosen]


def _role(chosen: Sequence[Consumer]) -> str:
    return "+".join(_names(chosen))


def _pauses() -> dict[str, str] | None:
    try:
        return paused()
    except Error:  # what is registered can be told without a database
        return None


def _as_dict(consumer: Consumer, pauses: dict[str, str] | None) -> dict[str, Any]:
    """`paused`: None where it is not known."""
    return {
        "name": consumer.name,
        "group_id": consumer.group_id,
        "topics": consumer.topics,
        "on_failure": consumer.on_failure,
        "paused": None if pauses is None else consumer.name in pauses,
        "handlers": [
            {"event_type": event_type, "version": version, "is_batch": handler.is_batch, "function": handler.name}
            for event_type, version, handler in consumer.handlers
        ],
    }


def _lines(consumer: Consumer, pauses: dict[str, str] | None) -> list[tuple[str, str]]:
    handlers = [
        (f"{event_type} {version or ''}".rstrip(), "batch" if handler.is_batch else "single", handler.name)
        for event_type, version, handler in consumer.handlers
    ]
    width = max((len(handled) for handled, _, _ in handlers), default=0)
    return [
        ("group", consumer.group_id),
        ("topics", ", ".join(consumer.topics)),
        ("on failure", consumer.on_failure),
        ("paused", "unknown" if pauses is None else pauses.get(consumer.name, "no")),
        *(("handles", f"{handled:{width}}  {how:6}  {function}") for handled, how, function in handlers),
    ]
