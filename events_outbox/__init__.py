"""Transactional outbox events over Kafka for Django.

    from events_outbox import emit_event

    with transaction.atomic():
        conversation = Conversation.objects.create(...)
        emit_event("conversation.created", ConversationCreatedPayload(...),
                   aggregate_id=conversation.id, tenant_id=conversation.tenant_id)

Guarantees:

1. Atomic: an event exists if and only if the transaction that emitted it committed.
2. Never missed: every committed event reaches Kafka, in whatever order transactions commit, whatever is killed.
3. Ordered: events of one aggregate are published and handled in the order their transactions committed.
4. Effectively once: a handler's effects in the database happen exactly once per event and consumer.
5. Nothing blocks the business: `emit_event()` is one INSERT and never talks to Kafka.
6. Nothing is lost silently: what cannot be published or handled is kept, visible, counted, and can be replayed.
7. Flat cost: publishing never updates or deletes event rows; its speed does not depend on the table's size.

The names below are the public API.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .catalog import register_event, upcasts
    from .decorators import logged, retrying
    from .emit import NewEvent, aemit_event, emit_event, emit_events
    from .exceptions import EventContractError, NotInTransaction, PermanentEventError
    from .handlers import Consumer, Event
    from .policies import FailureGuard, RetryPolicy

_HOMES = {
    "register_event": "catalog",
    "upcasts": "catalog",
    "logged": "decorators",
    "retrying": "decorators",
    "NewEvent": "emit",
    "aemit_event": "emit",
    "emit_event": "emit",
    "emit_events": "emit",
    "EventContractError": "exceptions",
    "NotInTransaction": "exceptions",
    "PermanentEventError": "exceptions",
    "Consumer": "handlers",
    "Event": "handlers",
    "FailureGuard": "policies",
    "RetryPolicy": "policies",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: models may not be loaded before Django's app registry is ready.
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Consumer",
    "Event",
    "EventContractError",
    "FailureGuard",
    "NewEvent",
    "NotInTransaction",
    "PermanentEventError",
    "RetryPolicy",
    "aemit_event",
    "emit_event",
    "emit_events",
    "logged",
    "register_event",
    "retrying",
    "upcasts",
]
