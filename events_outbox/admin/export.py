"""A list as CSV: all rows of its filter, search and dates, streamed; columns that describe, never a payload.

Each chunk is a statement of its own that goes on from the last key, so no transaction is held open for as long as
somebody reads, and memory does not grow with the rows.
"""

import csv
import logging
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.contrib.admin.options import IncorrectLookupParameters
from django.core.exceptions import PermissionDenied
from django.db import models
from django.http import HttpRequest, HttpResponseBase, HttpResponseRedirect, StreamingHttpResponse
from django.urls import URLPattern, path
from django.utils import timezone

from events_outbox.operators import note_action

if TYPE_CHECKING:
    from .keyset import BoundedChangeList

    ModelAdmin = admin.ModelAdmin[Any]
else:
    from unfold.admin import ModelAdmin

logger = logging.getLogger(__name__)

CHUNK_ROWS = 2_000
FORMULA_BEGINNINGS = ("=", "+", "-", "@", "\t", "\r")
LARGE_FIELDS = (models.BinaryField, models.JSONField, models.TextField)


class ExportedList(ModelAdmin):
    """Gives a list the address `export/`: the same conditions, as a file."""

    export_fields: Sequence[str] = ()
    """Names of fields, and of methods of the admin. None: all fields that are not large, which a payload may be."""

    def has_export_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.has_perm("events_outbox.export_events"))

    def get_urls(self) -> list[URLPattern]:
        name = f"{self.opts.app_label}_{self.opts.model_name}_export"
        export = path("export/", self.admin_site.admin_view(self.export_view), name=name)
        return [export, *super().get_urls()]

    def export_view(self, request: HttpRequest) -> HttpResponseBase:
        if not (self.has_view_permission(request) and self.has_export_permission(request)):
            raise PermissionDenied
        try:
            changelist: BoundedChangeList = self.get_changelist_instance(request)  # type: ignore[assignment]
        except IncorrectLookupParameters:
            return HttpResponseRedirect("../?e=1")
        answer = StreamingHttpResponse(self._lines(changelist, str(request.user)), content_type="text/csv")
        name = f"{self.opts.verbose_name_plural}-{timezone.now():%Y-%m-%d}.csv".replace(" ", "-")
        answer["Content-Disposition"] = f'attachment; filename="{name}"'
        answer["Cache-Control"] = "no-store"
        answer["X-Accel-Buffering"] = "no"  # a proxy is not to gather it
        return answer

    def _lines(self, changelist: "BoundedChangeList", user: str) -> Iterator[str]:
        names = self._export_names()
        writer = csv.writer(_Echo())
        rows, complete = 0, False
        try:
            yield writer.writerow(names)
            for chunk in chunks(changelist):
                cells = ([_cell(self._value(row, name)) for name in names] for row in chunk)
                lines = "".join(writer.writerow(row) for row in cells)
                rows += len(chunk)  # before: who stops reading here may have got them
                yield lines
            complete = True
        finally:
            self._note(changelist, user, rows, complete)

    def _export_names(self) -> Sequence[str]:
        fields = (field for field in self.opts.concrete_fields if not isinstance(field, LARGE_FIELDS))
        return self.export_fields or [field.attname for field in fields]

    def _value(self, row: models.Model, name: str) -> Any:
        method = getattr(self, name, None)
        return method(row) if callable(method) else getattr(row, name)

    def _note(self, changelist: "BoundedChangeList", user: str, rows: int, complete: bool) -> None:
        conditions = {chosen.name: chosen.value for chosen in changelist.chosen()}
        note_action(
            "events.exported",
            consumer="",
            subject=str(self.opts.verbose_name_plural),
            by=user,
            conditions=conditions,
            rows=rows,
            complete=complete,
        )


def chunks(changelist: "BoundedChangeList") -> Iterator[list[Any]]:
    """All rows of a list, the newest first, in lists of bounded length."""
    key = None
    while True:
        walk = changelist.walk(key, newest_first=True, limit=CHUNK_ROWS)
        if walk.rows:
            yield walk.rows
        if walk.more:
            key = walk.rows[-1].pk
        elif walk.stop is not None:
            key = walk.stop
        else:
            return


def _cell(value: Any) -> Any:
    """As a cell that no spreadsheet takes for a formula, with times in UTC."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if value is None or isinstance(value, bool | int | float | date):
        return value
    text = str(value)
    return f"'{text}" if text.startswith(FORMULA_BEGINNINGS) else text


class _Echo:
    """A file that gives back what is written to it."""

    def write(self, text: str) -> str:
        return text
