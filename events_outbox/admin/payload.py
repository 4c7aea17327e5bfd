"""An event's payload on a page: who may see it sees it, and that is noted; others are told what it takes."""

import re

from django.http import HttpRequest
from django.utils.html import format_html
from django.utils.safestring import SafeString

from events_outbox.decoding import decoded
from events_outbox.operators import note_action

SHOWN_CHARACTERS = 200_000
"""A page with more of it is no longer read by anybody, and slow for the browser."""
NOT_SHOWN = "to see it takes the permission events_outbox.view_payload"

_MISLEADING = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
"""Characters that turn the direction of what follows, or are not seen at all."""


def shown(request: HttpRequest, value: bytes | memoryview | None, *, subject: str) -> SafeString:
    """A BaseEvent's bytes as JSON, the payload only for those with the permission to view it.

    `subject`: what is looked at, e.g. "event 0190...", for the audit trail, which is written before anything is shown.
    """
    if not value:
        return format_html('<p class="outbox-note">{}</p>', "no value")
    if may_view(request):
        note_action("payload.viewed", consumer="", subject=subject, by=str(request.user))
        return as_block(decoded(value))
    return as_block(decoded(value, instead_of_payload=NOT_SHOWN))


def may_view(request: HttpRequest) -> bool:
    """Whether the user may see what events carry."""
    return bool(request.user.has_perm("events_outbox.view_payload"))


def as_block(text: str) -> SafeString:
    """Text as it is, in a box that scrolls by itself; its end is left out when it is very long, and that is said."""
    left_out = len(text) - SHOWN_CHARACTERS
    more = f"\n... {left_out} more characters are not shown" if left_out > 0 else ""
    return format_html(
        '<pre class="outbox-text" tabindex="0">{}{}</pre>', readable_characters(text[:SHOWN_CHARACTERS]), more
    )


def readable_characters(text: str) -> str:
    """The text with characters that would mislead its reader written as escapes."""
    return _MISLEADING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
