"""Documents in the admin, to look at."""

from typing import Any

from django.contrib import admin
from django.db.models import BinaryField, Func
from django.http import HttpRequest
from django.template.defaultfilters import filesizeformat

from events_outbox.admin import ReadOnlyAdmin
from events_outbox.admin.cells import moment
from events_outbox.admin.filters import FieldChoiceFilter

from .models import Document, DocumentContent

SHOWN_BYTES = 4_000


class StatusFilter(FieldChoiceFilter):
    title = parameter_name = field = "status"


class ContentTypeFilter(FieldChoiceFilter):
    title, parameter_name, field = "content type", "content_type", "content_type"


@admin.register(Document)
class DocumentAdmin(ReadOnlyAdmin):
    payload_fields = ["beginning"]
    readonly_fields = ["beginning"]
    list_display = ["title", "tenant", "user", "content_type", "size", "status", "chunk_count", "created"]
    list_filter = [StatusFilter, ContentTypeFilter]
    list_select_related = ["tenant", "user"]
    time_field = "created_at"
    exact_search = ["id", "user__username"]
    search_fields = ["title", "=tenant__name"]
    search_help_text = "an id or user name, whole; a part of a title"

    def get_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        hidden = self.get_exclude(request, obj)
        return [name for name in super().get_fields(request, obj) if name not in hidden]

    @admin.display(description="size")
    def size(self, document: Document) -> str:
        return filesizeformat(document.size_bytes)

    @admin.display(description="created")
    def created(self, document: Document) -> str:
        return moment(document.created_at)

    @admin.display(description="beginning of the content")
    def beginning(self, document: Document) -> str:
        """The first bytes of a text; of a PDF they tell nobody anything."""
        if document.content_type == Document.ContentType.PDF:
            return "-"
        beginning = Func("data", 1, SHOWN_BYTES, function="SUBSTRING", output_field=BinaryField())
        first = DocumentContent.objects.filter(pk=document.pk).values_list(beginning, flat=True).first()
        return bytes(first or b"").decode("utf-8", "ignore") or "-"
