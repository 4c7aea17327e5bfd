"""What the lists have in common: read-only rows, bounded counts, filters, the question why."""

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.core.paginator import Paginator
from django.db import models
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.utils import timezone
from django.utils.functional import cached_property
from django.utils.html import format_html

from events_outbox.catalog import event_types, topics
from events_outbox.decoding import decoded
from events_outbox.handlers import consumers

PAGED_ROWS = 10_000
AT_ONCE = 500
"""Django takes at most a thousand fields of a form, and a person reads fewer."""


class BoundedPaginator(Paginator):  # type: ignore[type-arg]
    """Pages through the first PAGED_ROWS rows; further rows are found by filter and search."""

    @cached_property
    def count(self) -> int:
        rows: QuerySet[Any] = self.object_list  # type: ignore[assignment]
        return rows.order_by()[:PAGED_ROWS].count()


class ReadOnlyAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """Rows can be looked at; the declared actions are for those who may change the model."""

    paginator = BoundedPaginator
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER  # they count the table once for each choice
    list_per_page = 50

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_operate_permission(self, request: HttpRequest) -> bool:
        """Whether the user may run this model's actions: Django's "change" permission of the model."""
        return bool(request.user.has_perm(f"{self.opts.app_label}.change_{self.opts.model_name}"))

    def log(self, request: HttpRequest, obj: models.Model, text: str) -> None:
        user_id = str(request.user.pk)
        LogEntry.objects.log_actions(user_id, [obj], CHANGE, change_message=text, single_object=True)

    def few(self, request: HttpRequest, queryset: QuerySet[Any], command: str) -> list[Any] | None:
        """The chosen rows, the oldest first; None, and a hint at the command, when they are too many for a page."""
        chosen = list(queryset.order_by("id")[: AT_ONCE + 1])
        if len(chosen) <= AT_ONCE:
            return chosen
        self.message_user(request, f"select at most {AT_ONCE}, or use `manage.py {command}`", messages.ERROR)
        return None

    def ask_why(
        self,
        request: HttpRequest,
        *,
        introduction: str,
        waiting: str,
        columns: Sequence[str],
        rows: Iterable[tuple[int, Sequence[object]]],
    ) -> HttpResponse:
        """The page that asks for the reason of a discard; it shows the rows, each by its id and its cells."""
        context = {
            **self.admin_site.each_context(request),
            "title": f"Discard {self.opts.verbose_name_plural}",
            "opts": self.opts,
            "introduction": introduction,
            "waiting": waiting,
            "columns": columns,
            "rows": list(rows),
            "reason_is_missing": "confirmed" in request.POST,
        }
        return TemplateResponse(request, "admin/events_outbox/discard.html", context)


class ChoiceFilter(admin.SimpleListFilter):
    """A filter whose choices are known beforehand, so that no DISTINCT has to read the table."""

    field = ""
    choices_of: Callable[[], list[str]] = staticmethod(list)

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(value, value) for value in type(self).choices_of()]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(**{self.field: self.value()}) if self.value() else queryset


class EventTypeFilter(ChoiceFilter):
    title, parameter_name, field = "event type", "event_type", "event_type"
    choices_of = staticmethod(lambda: sorted({entry.name for entry in event_types()}))


class TopicFilter(ChoiceFilter):
    title = parameter_name = field = "topic"
    choices_of = staticmethod(topics)


class ConsumerFilter(ChoiceFilter):
    title = parameter_name = field = "consumer"
    choices_of = staticmethod(lambda: [consumer.name for consumer in consumers()])


class TenantFilter(admin.SimpleListFilter):
    """A text box: there are too many tenants for a list of links."""

    title, parameter_name = "tenant", "tenant_id"
    template = "admin/events_outbox/text_filter.html"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        self.other_parameters = [(name, value) for name, value in request.GET.items() if name != "tenant_id"]
        return [("", "")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(tenant_id=self.value()) if self.value() else queryset


class EventIdAdmin(ReadOnlyAdmin):
    """Rows are found by an event id, in a table whose index begins with the consumer."""

    search_fields = ("event_id",)
    search_help_text = "an event id, whole"

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        if not search_term.strip():
            return queryset, False
        try:
            event_id = UUID(search_term.strip())
        except ValueError:
            return queryset.none(), False
        names = [consumer.name for consumer in consumers()]
        return queryset.filter(event_id=event_id, consumer__in=names), False


def readable(value: bytes | memoryview | None) -> str:
    """A BaseEvent's bytes as JSON, or as hex when they are none."""
    return format_html("<pre>{}</pre>", decoded(value))


def exact_time(moment: datetime) -> str:
    """A time to the millisecond, with its offset from UTC."""
    return timezone.localtime(moment).isoformat(sep=" ", timespec="milliseconds")
