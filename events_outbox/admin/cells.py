"""Cells of a list: one line each."""

from datetime import datetime

from django.utils import timezone
from django.utils.html import format_html

SHOWN_OF_AN_ID = 12
LONGEST_WHOLE_ID = 20


def short_id(value: object) -> str:
    """The end of an id, which tells more than its beginning, the time; the whole one is shown on pointing at it."""
    text = str(value)
    if len(text) <= LONGEST_WHOLE_ID:
        return format_html('<span class="list-id">{}</span>', text)
    return format_html('<span class="list-id" title="{}">…{}</span>', text, text[-SHOWN_OF_AN_ID:])


def moment(value: datetime | None) -> str:
    """A time to the second, in one line; to the microsecond on pointing at it."""
    if value is None:
        return "-"
    local = timezone.localtime(value)
    return format_html(
        '<time class="list-time" datetime="{}" title="{}">{}</time>',
        local.isoformat(),
        local.isoformat(sep=" "),
        local.strftime("%Y-%m-%d %H:%M:%S"),
    )


def one_line(text: str) -> str:
    """The beginning of a text; all of it on pointing at it."""
    return format_html('<span class="list-text" title="{}">{}</span>', text[:1000], text[:120]) if text else "-"
