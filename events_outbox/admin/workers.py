"""Workers: relays, consumers and others that run, or did so lately, and what each says of itself."""

from datetime import datetime
from typing import Any

from django.contrib import admin
from django.core.paginator import Paginator
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils import timezone

from events_outbox.handlers import consumers
from events_outbox.heartbeats import State
from events_outbox.models import Worker, is_alive
from events_outbox.status import readable_seconds

from .cells import one_line
from .filters import ChoiceFilter
from .read_only import ReadOnlyAdmin
from .texts import exact_time

"""Of the last error, in the list."""
COLOURS = ("success", "info", "warning", "danger", "default")


class LifeFilter(admin.SimpleListFilter):
    title, parameter_name = "life", "alive"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("yes", "alive"), ("no", "stopped or not seen")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(is_alive=self.value() == "yes") if self.value() in ("yes", "no") else queryset


class KindFilter(ChoiceFilter):
    title = parameter_name = field = "kind"
    choices_of = staticmethod(lambda: list(Worker.Kind.values))


class NameFilter(ChoiceFilter):
    title = parameter_name = field = "name"
    choices_of = staticmethod(lambda: ["relay", *(consumer.name for consumer in consumers())])


@admin.register(Worker)
class WorkerAdmin(ReadOnlyAdmin):
    """Few rows: those that are older than a day are pruned."""

    tenant_field = None
    paginator = Paginator  # type: ignore[assignment]
    list_display = (
        "name",
        "kind",
        "process",
        "coloured_state",
        "since",
        "seen",
        "events",
        "rate",
        "partitions",
        "shown_error",
    )
    list_filter = (LifeFilter, KindFilter, NameFilter)
    fields = (
        "kind",
        "name",
        "process",
        "shown_state",
        "since",
        "started",
        "seen",
        "stopped",
        "events",
        "rate",
        "assigned",
        "metrics_port",
        "failed",
        "whole_error",
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return super().get_queryset(request).with_life()  # type: ignore[no-any-return, attr-defined]

    def get_ordering(self, request: HttpRequest) -> tuple[Any, ...]:
        return (is_alive().desc(), "-kind", "name", "-started_at")

    @admin.display(description="host:pid", ordering="host")
    def process(self, worker: Worker) -> str:
        return f"{worker.host}:{worker.pid}"

    @admin.display(description="state", ordering="state")
    def shown_state(self, worker: Any) -> str:
        unseen = _unseen(worker)
        return f"{unseen}; {worker.state} then" if unseen else str(worker.state)

    @admin.display(description="state", ordering="state")
    def coloured_state(self, worker: Any) -> tuple[str, str]:
        """The theme takes a colour and the words, which say it alone."""
        return _colour(worker), _unseen(worker) or worker.state

    coloured_state.label = {colour: colour for colour in COLOURS}  # type: ignore[attr-defined]

    @admin.display(description="since", ordering="state_since")
    def since(self, worker: Any) -> str:
        return f"{_age(worker, worker.state_since)} ago"

    @admin.display(description="events", ordering="events_total")
    def events(self, worker: Worker) -> str:
        return f"{worker.events_total:,}"

    @admin.display(description="last seen", ordering="seen_at")
    def seen(self, worker: Any) -> str:
        return f"{_age(worker, worker.seen_at)} ago"

    @admin.display(description="events/s", ordering="events_per_second")
    def rate(self, worker: Any) -> str:
        return f"{worker.events_per_second:,.1f}" if worker.is_alive else "-"

    @admin.display(description="partitions")
    def partitions(self, worker: Worker) -> str:
        return str(len(worker.assignment)) if worker.kind == Worker.Kind.CONSUMER else "-"

    @admin.display(description="last error", ordering="last_error_at")
    def shown_error(self, worker: Any) -> str:
        if worker.last_error_at is None:
            return "-"
        return one_line(f"{_age(worker, worker.last_error_at)} ago: {' '.join(worker.last_error.split())}")

    @admin.display(description="started")
    def started(self, worker: Worker) -> str:
        return _moment(worker.started_at)

    @admin.display(description="stopped")
    def stopped(self, worker: Worker) -> str:
        return "-" if worker.stopped_at is None else _moment(worker.stopped_at)

    @admin.display(description="partitions")
    def assigned(self, worker: Worker) -> str:
        return ", ".join(worker.assignment) or "-"

    @admin.display(description="last error at")
    def failed(self, worker: Worker) -> str:
        return "-" if worker.last_error_at is None else exact_time(worker.last_error_at)

    @admin.display(description="last error")
    def whole_error(self, worker: Worker) -> str:
        return worker.last_error or "-"


def _age(worker: Any, moment: datetime) -> str:
    """How long ago it was, by the database's clock."""
    return readable_seconds(max((worker.read_at - moment).total_seconds(), 0.0))


def _unseen(worker: Any) -> str:
    """In words, that it was not heard of for too long; empty when it was, or has stopped in order."""
    if worker.is_alive or worker.stopped_at is not None:
        return ""
    return f"not seen for {_age(worker, worker.seen_at)}"


def _colour(worker: Any) -> str:
    if worker.stopped_at is not None:
        return "default"
    if not worker.is_alive or worker.state in (State.HANGS, State.WAITS_FOR_KAFKA, State.WAITS_FOR_DATABASE):
        return "danger"
    if worker.state in (State.LEADS, State.WORKS):
        return "success"
    return "warning" if worker.state == State.PAUSED else "info"


def _moment(moment: datetime) -> str:
    return timezone.localtime(moment).isoformat(sep=" ", timespec="seconds")
