"""What is told to whom, and how: the table of kinds of notifications.

| kind (event type) | told to | by default through | may be switched off in the app |
|---|---|---|---|
| conversation.created | admins, but who opened it | app | yes |
| conversation.failed | who opened it, admins; but who ended it so | app, e-mail | no |
| document.indexed | who uploaded it | app | yes |
| document.failed | who uploaded it, admins | app, e-mail | no |
| analytics.budget.exceeded | admins | app, e-mail | no |

Webhooks of the tenant get every kind, unless they name those they want. The templates of a kind are in
templates/notifications/<kind>/. What went wrong stays in the app whatever a user prefers: e-mails and webhooks get
lost, and there has to be one place where nothing does.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from events_outbox import Event
from voicehelper.conversations.events import CONVERSATION_CREATED, CONVERSATION_FAILED
from voicehelper.conversations.models import Conversation
from voicehelper.knowledge.events import DOCUMENT_INDEXED

from .models import Channel
from .texts import line

# Registered by the domains they are of.
DOCUMENT_FAILED = "document.failed"
BUDGET_EXCEEDED = "analytics.budget.exceeded"
TEST = "webhook.test"
"""Not an event: what the tenant's admin has a webhook told to try it."""

ERROR_MAX_CHARS = 500


@dataclass(frozen=True)
class Facts:
    """What an event comes to. `concerned`: the user it concerns most. `actor`: who did it, and need not be told."""

    context: Mapping[str, Any]
    concerned: UUID | None = None
    actor: UUID | None = None


@dataclass(frozen=True)
class Kind:
    """One line of the table. `facts`: read from the event, and from the tenant's rows."""

    event_type: str
    facts: Callable[[Event[Any], UUID], Facts]
    tells_concerned: bool = False
    tells_admins: bool = False
    by_email: bool = False
    stays_in_app: bool = False

    def is_default(self, channel: str) -> bool:
        """Whether a user who has said nothing about it is told by this channel."""
        return channel == Channel.IN_APP or (channel == Channel.EMAIL and self.by_email)

    def is_fixed(self, channel: str) -> bool:
        """Whether a user has no say in it."""
        return channel == Channel.IN_APP and self.stays_in_app


def _opened(event: Event[Any], tenant_id: UUID) -> Facts:
    return Facts(
        {"title": line(event.payload.title), "mode": line(event.payload.mode)}, actor=uuid_or_none(event.user_id)
    )


def _conversation_failed(event: Event[Any], tenant_id: UUID) -> Facts:
    payload, by = event.payload, uuid_or_none(event.user_id)
    context = {
        "title": "",
        "mode": line(payload.mode),
        "message_count": payload.message_count,
        "reason": line(payload.reason, ERROR_MAX_CHARS),
    }
    opener = by
    if conversation_id := uuid_or_none(event.aggregate_id):
        found = Conversation.objects.for_tenant(tenant_id).filter(id=conversation_id).first()
        if found is not None:
            context["title"], opener = line(found.title), found.user_id
    # No reason: a user ended it so, and knows.
    return Facts(context, concerned=opener, actor=None if payload.reason else by)


def _indexed(event: Event[Any], tenant_id: UUID) -> Facts:
    title = getattr(event.payload, "title", "")  # the payload has none so far
    context = {"title": line(title), "chunk_count": event.payload.chunk_count}
    return Facts(context, concerned=uuid_or_none(event.user_id))


def _document_failed(event: Event[Any], tenant_id: UUID) -> Facts:
    context = {"title": line(event.payload.title), "error": line(event.payload.error, ERROR_MAX_CHARS)}
    return Facts(context, concerned=uuid_or_none(event.user_id))


def _budget_exceeded(event: Event[Any], tenant_id: UUID) -> Facts:
    payload = event.payload
    show = _dollars if payload.measure == "cost_dollars" else _tokens
    figures: dict[str, Any] = {}
    for name in ("value", "average", "limit"):
        figure = getattr(payload, name)
        figures |= {name: figure if math.isfinite(figure) else None, f"{name}_text": show(figure)}
    return Facts({"day": line(payload.day), "measure": line(payload.measure), **figures})


KINDS: dict[str, Kind] = {
    kind.event_type: kind
    for kind in (
        Kind(CONVERSATION_CREATED, _opened, tells_admins=True),
        Kind(
            CONVERSATION_FAILED,
            _conversation_failed,
            tells_concerned=True,
            tells_admins=True,
            by_email=True,
            stays_in_app=True,
        ),
        Kind(DOCUMENT_INDEXED, _indexed, tells_concerned=True),
        Kind(
            DOCUMENT_FAILED,
            _document_failed,
            tells_concerned=True,
            tells_admins=True,
            by_email=True,
            stays_in_app=True,
        ),
        Kind(BUDGET_EXCEEDED, _budget_exceeded, tells_admins=True, by_email=True, stays_in_app=True),
    )
}
USER_CHANNELS = (Channel.IN_APP, Channel.EMAIL)
"""Those that a user has a say in: webhooks are the tenant's."""


def uuid_or_none(text: str) -> UUID | None:
    """The UUID that a text is, None for any other."""
    try:
        return UUID(text)
    except ValueError:
        return None


def _dollars(value: float) -> str:
    return f"${value:,.2f}" if math.isfinite(value) else "unknown"


def _tokens(value: float) -> str:
    return f"{value:,.0f} tokens" if math.isfinite(value) else "unknown"
