"""The consumer `notification`: tells users and webhooks of a tenant what concerns them. `kinds` says what and whom."""

from typing import Any
from uuid import UUID

from events_outbox import Consumer, Event, PermanentEventError

from .kinds import KINDS
from .services import announce

notification = Consumer("notification", group_id="notification-service")


@notification.handles(*KINDS)
def tell(event: Event[Any]) -> None:
    """Tell whom it concerns."""
    try:
        tenant_id = UUID(event.tenant_id)
    except ValueError as error:
        raise PermanentEventError(f"tenant_id {event.tenant_id!r} is not a UUID") from error
    announce(event=event, tenant_id=tenant_id)
