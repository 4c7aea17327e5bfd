"""What all pages have in common: rows to look at, what an operator may do, the question why."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.db import models
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.utils.module_loading import import_string

from events_outbox.conf import outbox_settings
from events_outbox.handlers import consumers

from .keyset import BoundedList

if TYPE_CHECKING:
    DjangoModelAdmin = admin.ModelAdmin[Any]
    ModelAdmin = admin.ModelAdmin[Any]
else:
    from unfold.admin import ModelAdmin  # the theme's; it has no types

    DjangoModelAdmin = admin.ModelAdmin

AT_ONCE = 500
"""Django takes at most a thousand fields of a form, and a person reads fewer."""


def tenant_of(request: HttpRequest) -> str | None:
    """The only tenant whose rows the user may see; None: the user sees all. EVENTS_OUTBOX["ADMIN_TENANT"] decides."""
    path = outbox_settings().ADMIN_TENANT
    if path is None:
        return None
    tenant: str | None = import_string(path)(request.user)
    return tenant


class TenantConfined(DjangoModelAdmin):
    """The staff of a tenant sees the tenant's own rows, and of a model without tenants nothing at all.

    Lists, pages, searches, histories and actions all read from `get_queryset()`, so this is the one gate.
    """

    tenant_field: str | None = "tenant_id"
    """Where a row says whose it is; None: the model knows no tenants."""

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        rows: QuerySet[Any] = super().get_queryset(request)
        tenant = tenant_of(request)
        if tenant is None:
            return rows
        return rows.none() if self.tenant_field is None else rows.filter(**{self.tenant_field: tenant})

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return super().has_view_permission(request, obj) and self._is_in_sight(request, obj)

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return super().has_change_permission(request, obj) and self._is_in_sight(request, obj)

    def _is_in_sight(self, request: HttpRequest, obj: Any) -> bool:
        if tenant_of(request) is None:
            return True
        if self.tenant_field is None:
            return False
        return obj is None or self.get_queryset(request).filter(pk=obj.pk).exists()


class ReadOnlyAdmin(TenantConfined, BoundedList, ModelAdmin):
    """Rows can be looked at; each of the declared actions takes a permission of its own."""

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
