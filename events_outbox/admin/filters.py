"""Filters whose choices cost nothing."""

from collections.abc import Callable
from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest

from events_outbox.catalog import event_types, topics
from events_outbox.handlers import consumers


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
