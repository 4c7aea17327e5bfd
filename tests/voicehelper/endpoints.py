"""Every endpoint of the API, read from the URL configuration, so that a test misses none; and what they changed."""

from collections.abc import Iterator
from typing import NamedTuple
from uuid import UUID

from django.apps import apps
from django.db import connection
from django.urls import URLPattern, URLResolver, get_resolver

PREFIX = "api/v1/"
PK = "<uuid:pk>"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
UNSAFE = ("POST", "PUT", "PATCH", "DELETE")
OPEN = ("auth/token", "schema/", "docs/")
"""What needs no token: to get one, and the description of the API, which is about no tenant."""


class Endpoint(NamedTuple):
    route: str
    """Below /api/v1/, such as `users/<uuid:pk>`."""
    view: type

    @property
    def methods(self) -> set[str]:
        named = {method for method in METHODS if hasattr(self.view, method.lower())}
        return named | ({"HEAD"} if "GET" in named else set())

    def url(self, pk: UUID | str = "") -> str:
        return f"/{PREFIX}{self.route.replace(PK, str(pk))}"


def _walk(patterns, before: str = "") -> Iterator[Endpoint]:
    for pattern in patterns:
        route = before + str(pattern.pattern)
        if isinstance(pattern, URLResolver):
            yield from _walk(pattern.url_patterns, route)
        elif isinstance(pattern, URLPattern) and route.startswith(PREFIX):
            yield Endpoint(route.removeprefix(PREFIX), pattern.callback.view_class)


def endpoints() -> list[Endpoint]:
    """All but the open ones."""
    return [one for one in _walk(get_resolver().url_patterns) if not one.route.startswith(OPEN)]


def rows() -> dict[str, set[str]]:
    """All there is in the database, by table, each row as text."""
    found = {}
    with connection.cursor() as cursor:
        for model in apps.get_models():
            if model._meta.managed:
                table = connection.ops.quote_name(model._meta.db_table)
                cursor.execute(f"SELECT t::text FROM {table} t")
                found[model._meta.label] = {text for (text,) in cursor.fetchall()}
    return found


def new_rows(before: dict[str, set[str]]) -> list[str]:
    """What has come since; nothing that was there may have changed or gone."""
    after = rows()
    for label, texts in before.items():
        assert texts <= after[label], f"{label} has changed: {texts - after[label]}"
    return [text for label, texts in after.items() for text in texts - before[label]]
