"""What all pages have in common: rows to look at, whose they are, what an operator may do."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.admin.utils import quote, unquote
from django.contrib.contenttypes.models import ContentType
from django.core.exceptions import PermissionDenied
from django.db import connection, models
from django.db.models import Q, QuerySet
from django.db.models.constants import LOOKUP_SEP
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils.module_loading import import_string
from django.utils.safestring import SafeString

from events_outbox.conf import outbox_settings
from events_outbox.handlers import consumers
from events_outbox.operators import note_action

from . import payload
from .keyset import BoundedList

if TYPE_CHECKING:
    DjangoModelAdmin = admin.ModelAdmin[Any]
    ModelAdmin = admin.ModelAdmin[Any]
else:
    from unfold.admin import ModelAdmin  # the theme's; it has no types

    DjangoModelAdmin = admin.ModelAdmin

AT_ONCE = 500
"""Django takes at most a thousand fields of a form, and a person reads fewer."""

ICONS = {
    "replay": "replay",
    "replay_by_force": "restart_alt",
    "discard": "delete",
    "redrive": "redo",
    "resume": "play_arrow",
}


def tenant_of(request: HttpRequest) -> str | None:
    """The only tenant whose rows the user may see; None: the user sees all. EVENTS_OUTBOX["ADMIN_TENANT"] decides."""
    function = outbox_settings().ADMIN_TENANT
    if function is None:
        return None
    tenant: str | None = import_string(function)(request.user)
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

    payload_fields: Sequence[str] = ()
    """Fields that hold what an event carries, or what its users wrote: seen with the permission for payloads alone."""

    class Media:
        css: ClassVar[dict[str, list[str]]] = {"all": ["events_outbox/event.css", "events_outbox/operate.css"]}

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def get_exclude(self, request: HttpRequest, obj: Any = None) -> Any:
        hidden = () if payload.may_view(request) else self.payload_fields
        return [*(super().get_exclude(request, obj) or ()), *hidden]

    def lookup_allowed(self, lookup: str, value: Any, request: HttpRequest) -> bool:
        """No list is filtered by what an event carries: who may not see a text could guess it letter by letter."""
        name = lookup.partition(LOOKUP_SEP)[0]
        binary = {field.name for field in self.opts.concrete_fields if isinstance(field, models.BinaryField)}
        return name not in {*self.payload_fields, *binary} and super().lookup_allowed(lookup, value, request)

    def may(self, request: HttpRequest, codename: str) -> bool:
        """Whether the user has one of the permissions of events."""
        return bool(request.user.has_perm(f"events_outbox.{codename}"))

    def get_object(self, request: HttpRequest, object_id: str, from_field: str | None = None) -> Any:
        if "\0" in object_id:  # no key has it, and the database refuses to look
            return None
        obj: Any = super().get_object(request, object_id, from_field)
        if obj is not None:
            obj.page_request = request  # with the row, as an admin is shared by the threads
        return obj

    def payload_on_page(self, obj: Any, value: bytes | memoryview | None, *, subject: str) -> SafeString:
        """An event as the page's user may see it. Asked for once a page, as looking is noted."""
        if not hasattr(obj, "payload_shown"):
            obj.payload_shown = payload.shown(obj.page_request, value, subject=subject)
        return cast(SafeString, obj.payload_shown)

    def list_buttons(self, request: HttpRequest) -> list[tuple[str, str, str]]:
        """Buttons above the list that the user may press: what they say, where they lead, their icon."""
        return []

    def page_buttons(self, request: HttpRequest, obj: Any) -> list[tuple[str, str, str]]:
        """Buttons of a row's page, as those of the list: the actions that the user may run."""
        return [
            (name.replace("_", " ").capitalize(), self._address(obj, "act", name), ICONS.get(name, "bolt"))
            for name in self.get_actions(request)
        ]

    def get_urls(self) -> list[URLPattern]:
        name = f"{self.opts.app_label}_{self.opts.model_name}_act"
        act = path("<path:object_id>/act/<slug:action>/", self.admin_site.admin_view(self.act_view), name=name)
        return [act, *super().get_urls()]

    def act_view(self, request: HttpRequest, object_id: str, action: str) -> HttpResponse:
        """One of the list's actions for a single row: it asks as it does there, and leads back to the row."""
        found = self.get_actions(request).get(action)
        if found is None or not self.has_view_permission(request):
            raise PermissionDenied
        obj = self.get_object(request, unquote(object_id))
        if obj is None:
            raise Http404
        run: Any = found[0]
        answer = run(self, request, self.get_queryset(request).filter(pk=obj.pk))
        row = self._address(obj, "change")
        if answer is None:
            return HttpResponseRedirect(row)
        answer.context_data["back"] = row
        return cast(HttpResponse, answer)

    def _address(self, obj: models.Model, page: str, *arguments: str) -> str:
        name = f"admin:{self.opts.app_label}_{self.opts.model_name}_{page}"
        return reverse(name, args=[quote(obj.pk), *arguments])

    def changelist_view(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponse:
        """Refuse an action that is not the user's; show the list, with its buttons."""
        wanted = request.POST.getlist("action")
        if set(wanted) & set(self.actions or ()) - set(self.get_actions(request)):
            raise PermissionDenied
        answer: HttpResponse = super().changelist_view(request, extra_context)
        return _with_buttons(answer, "actions_list", self.list_buttons(request))

    def changeform_view(
        self,
        request: HttpRequest,
        object_id: str | None = None,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        answer: HttpResponse = super().changeform_view(request, object_id, form_url, extra_context)
        shown = (getattr(answer, "context_data", None) or {}).get("original")
        if shown is None:
            return answer
        if self.payload_fields and payload.may_view(request):
            subject = f"{self.opts.verbose_name} {shown.pk}"
            note_action("payload.viewed", consumer="", subject=subject, by=str(request.user))
        return _with_buttons(answer, "actions_detail", self.page_buttons(request, shown))

    def log(self, request: HttpRequest, obj: models.Model, text: str) -> None:
        user_id = str(request.user.pk)
        LogEntry.objects.log_actions(user_id, [obj], CHANGE, change_message=text, single_object=True)

    def few(self, request: HttpRequest, queryset: QuerySet[Any], command: str, *, button: str = "") -> list[Any] | None:
        """The chosen rows, the oldest first; None, and a message that says why, when there are none or too many.

        `command`, and `button` above the list, if there is one: what takes more.
        """
        if self.list_select_related and not isinstance(self.list_select_related, bool):
            queryset = queryset.select_related(*self.list_select_related)
        # Without their large fields, which can be of 900 kB each: no action needs those of all.
        chosen = list(queryset.order_by("id").defer(*self.list_defer)[: AT_ONCE + 1])
        if not chosen:
            self.message_user(request, "None of them is there any more", messages.ERROR)
            return None
        if len(chosen) <= AT_ONCE:
            return chosen
        others = f'"{button}" or `manage.py {command}`' if button else f"`manage.py {command}`"
        self.message_user(request, f"Select at most {AT_ONCE}, or use {others}", messages.ERROR)
        return None

    def log_many(self, request: HttpRequest, count: int, text: str) -> None:
        """Log what was done to many rows at once, in one line."""
        LogEntry.objects.create(
            user_id=str(request.user.pk),
            content_type=ContentType.objects.get_for_model(self.model),
            object_repr=f"{count} {self.opts.verbose_name_plural}",
            action_flag=CHANGE,
            change_message=text,
        )


def _with_buttons(answer: HttpResponse, place: str, buttons: list[tuple[str, str, str]]) -> HttpResponse:
    """Add buttons where the theme has them; an answer that is no page stays as it is."""
    if isinstance(answer, TemplateResponse) and answer.context_data is not None and buttons:
        answer.context_data[place] = [
            *(answer.context_data.get(place) or []),
            *({"title": title, "path": path, "icon": icon, "attrs": {}} for title, path, icon in buttons),
        ]
    return answer


def _consumers_of(model: type[models.Model]) -> set[str]:
    """The consumers that a table holds rows of, also those that no code registers any more.

    From one name to the next by the index that begins with them: as many look-ups as there are names.
    """
    statement = """WITH RECURSIVE found(consumer) AS (
                    (SELECT consumer FROM {table} ORDER BY consumer LIMIT 1)
                    UNION ALL
                    SELECT (SELECT consumer FROM {table} WHERE consumer > found.consumer ORDER BY consumer LIMIT 1)
                      FROM found WHERE found.consumer IS NOT NULL
                )
                SELECT consumer FROM found WHERE consumer IS NOT NULL"""
    with connection.cursor() as cursor:
        cursor.execute(statement.replace("{table}", connection.ops.quote_name(model._meta.db_table)))
        return {name for (name,) in cursor.fetchall()}


class EventIdAdmin(ReadOnlyAdmin):
    """Rows are found by an event id, in a table whose index begins with the consumer."""

    exact_search = ("event_id",)
    search_help_text = "an event id, whole"

    def exact_conditions(self, term: str) -> list[Q]:
        names = {consumer.name for consumer in consumers()} | _consumers_of(self.model)
        return [condition & Q(consumer__in=sorted(names)) for condition in super().exact_conditions(term)]
