"""Workers: the relays and consumers that run, or did so lately, and what each says of itself."""

from datetime import datetime, timedelta
from typing import Any

from django.contrib import admin
from django.core.paginator import Paginator
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils import timezone

from events_outbox.handlers import consumers
from events_outbox.models import Worker, is_alive
from events_outbox.status import readable_seconds

from .filters import ChoiceFilter
from .read_only import ReadOnlyAdmin
from .texts import exact_time

ERROR_CHARACTERS = 120
"""Of the last error, in the list."""


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
    paginator = Paginator  # type: ignore[misc]
    list_display = (
        "name",
        "kind",
        "process",
        "shown_state",
        "since",
        "seen",
        "events_total",
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
        "events_total",
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
        """In words, whatever colour a theme may add."""
        if worker.is_alive or worker.stopped_at is not None:
            return str(worker.state)
        return f"not seen for {readable_seconds(_seconds(worker.read_at - worker.seen_at))}; {worker.state} then"

    @admin.display(description="since", ordering="state_since")
    def since(self, worker: Worker) -> str:
        return _moment(worker.state_since)

    @admin.display(description="last seen", ordering="seen_at")
    def seen(self, worker: Any) -> str:
        return f"{readable_seconds(_seconds(worker.read_at - worker.seen_at))} ago"

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
        text = " ".join(worker.last_error.split())
        short = text if len(text) <= ERROR_CHARACTERS else f"{text[:ERROR_CHARACTERS]}..."
        return f"{readable_seconds(_seconds(worker.read_at - worker.last_error_at))} ago: {short}"

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


def _seconds(age: timedelta) -> float:
    return float(max(age.total_seconds(), 0.0))


def _moment(moment: datetime) -> str:
    return timezone.localtime(moment).isoformat(sep=" ", timespec="seconds")
