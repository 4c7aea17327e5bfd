"""Filters whose choices cost nothing. One that an index serves gives the keys it leaves, as `keys()`."""

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


class FieldChoiceFilter(ChoiceFilter):
    """The choices of the model's field."""

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        choices = model_admin.model._meta.get_field(self.field).choices
        return [(value, str(label)) for value, label in choices]


class EventTypeFilter(ChoiceFilter):
    title, parameter_name, field = "event type", "event_type", "event_type"
    choices_of = staticmethod(lambda: sorted({entry.name for entry in event_types()}))


class TopicFilter(ChoiceFilter):
    title = parameter_name = field = "topic"
    choices_of = staticmethod(topics)


class ConsumerFilter(ChoiceFilter):
    title = parameter_name = field = "consumer"
    choices_of = staticmethod(lambda: [consumer.name for consumer in consumers()])


class TextFilter(admin.SimpleListFilter):
    """A text box: there are too many values for a list."""

    field = ""
    is_text = True

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return []

    def has_output(self) -> bool:
        return True

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        value = (self.value() or "").replace("\0", "").strip()
        return queryset.filter(**{self.field: value}) if value else queryset


class TenantFilter(TextFilter):
    title, parameter_name, field = "tenant", "tenant_id", "tenant_id"


class ErrorNameFilter(TextFilter):
    """Why the broker refused it: one of librdkafka's many names, or "behind"."""

    title = parameter_name = field = "reason"
