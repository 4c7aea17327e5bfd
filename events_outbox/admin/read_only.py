"""What all pages have in common: rows to look at, what an operator may do, the question why."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.db import models
from django.db.models import Q, QuerySet
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse

from events_outbox.handlers import consumers

from .keyset import BoundedList

if TYPE_CHECKING:
    ModelAdmin = admin.ModelAdmin[Any]
else:
    from unfold.admin import ModelAdmin  # the theme's; it has no types

AT_ONCE = 500
"""Django takes at most a thousand fields of a form, and a person reads fewer."""


class ReadOnlyAdmin(BoundedList, ModelAdmin):
    """Rows can be looked at; the declared actions are for those who may change the model."""

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


class EventIdAdmin(ReadOnlyAdmin):
    """Rows are found by an event id, in a table whose index begins with the consumer."""

    exact_search = ("event_id",)
    search_help_text = "an event id, whole"

    def exact_conditions(self, term: str) -> list[Q]:
        names = [consumer.name for consumer in consumers()]
        return [condition & Q(consumer__in=names) for condition in super().exact_conditions(term)]
