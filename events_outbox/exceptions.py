"""Errors of the package, classed by what the caller does next.

- `EventContractError` and its kinds: the call of `emit_event()` is wrong; fix the code, nothing was written.
- `PermanentEventError`: raised by a handler to say that trying again is useless; the event becomes a dead letter.
- `LeadershipLost`: the relay's database session is gone; contend for the lead again.
- `CursorLost`: the relay's cursor is to be rebuilt from what the broker holds, and the broker is away; try again.
"""


class EventContractError(ValueError):
    """An event that the contract does not allow. Nothing was written."""


class UnknownEventType(EventContractError):
    """The catalog has no such event type and version."""


class InvalidEventType(EventContractError):
    """An event type that is not named `<domain>[.<entity>...].<past-tense verb>`."""


class PayloadMismatch(EventContractError):
    """The payload is not the message that the catalog names for this event type."""


class InvalidEventField(EventContractError):
    """A field that cannot be stored or sent: empty, too long, or with characters that text cannot hold."""


class EventTooLarge(EventContractError):
    """The serialised event is larger than EVENTS_OUTBOX["MAX_EVENT_BYTES"]."""


class NotInTransaction(RuntimeError):
    """`emit_event()` was called outside `transaction.atomic()`: event and write could part. Nothing was written."""


class DuplicateRegistration(ValueError):
    """An event type, a consumer name or a handler was registered twice."""


class PermanentEventError(Exception):
    """Raise it in a handler when trying again is useless: the event is dead-lettered without retries."""


class LeadershipLost(Exception):
    """The relay's database session, and with it the leader lock, is gone."""


class CursorLost(Exception):
    """The cursor is unusable, and cannot be rebuilt now."""
