"""The event catalog: event type and version <-> payload message, and the topic of an event type.

Every app registers its types in its `events.py`, found by autodiscovery.
"""

import difflib
import re
from dataclasses import dataclass
from functools import cached_property

from google.protobuf.message import Message

from .conf import outbox_settings
from .exceptions import DuplicateRegistration, InvalidEventType, UnknownEventType

_SHAPE = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+")
_VERSION = re.compile(r"v[1-9][0-9]*")
# Past participles that do not end in "ed"; "reset", "read" and "put" are past tense as they stand.
_IRREGULAR = frozenset(
    """
    become begun bought built caught chosen done drawn found frozen given gone got held hidden hit
    kept known left lent lost made met overridden paid put read rebuilt reset resent rewritten run
    seen sent set shut sold spent split spoken taken thrown understood undone unset upheld withdrawn
    won written
    """.split()  # noqa: SIM905  (a page of quotation marks otherwise)
)


@dataclass(frozen=True)
class EventType:
    """One entry of the catalog."""

    name: str
    version: str
    payload: type[Message]

    @property
    def topic(self) -> str:
        return topic_for(self.name)

    @cached_property
    def type_url(self) -> str:
        """What the payload's `Any` says of its message."""
        return f"type.googleapis.com/{self.payload.DESCRIPTOR.full_name}"


_catalog: dict[tuple[str, str], EventType] = {}


def register_event(event_type: str, payload: type[Message], version: str = "v1") -> str:
    """Put an event type into the catalog and return its name.

    `event_type`: `<domain>[.<entity>...].<past-tense verb>`, e.g. `conversation.message.sent` (specification,
    best practices: an event states what has happened). `version`: "v1", "v2", ...

    Raises InvalidEventType for a name or version of another shape, DuplicateRegistration for a second
    registration of the same type and version.
    """
    check_event_type(event_type)
    if not _VERSION.fullmatch(version):
        raise InvalidEventType(f"event version {version!r} of {event_type} must look like v1, v2, ...")
    if (event_type, version) in _catalog:
        raise DuplicateRegistration(f"event type {event_type} {version} is registered twice")
    _catalog[event_type, version] = EventType(event_type, version, payload)
    return event_type


def check_event_type(event_type: str) -> None:
    """Raise InvalidEventType unless the name is `<domain>[.<entity>...].<past-tense verb>`, at most 128 characters."""
    verb = event_type.rpartition(".")[2] if isinstance(event_type, str) else ""
    past_tense = verb.endswith("ed") or verb.rpartition("_")[2] in _IRREGULAR
    if not past_tense or len(event_type) > 128 or not _SHAPE.fullmatch(event_type):
        raise InvalidEventType(
            f"event type {event_type!r} must be <domain>[.<entity>...].<past-tense verb> in lower case, "
            "at most 128 characters, e.g. conversation.message.sent"
        )


def event_type_for(event_type: str, version: str) -> EventType:
    """Return the catalog's entry. Raises UnknownEventType, naming near misses, when there is none."""
    try:
        return _catalog[event_type, version]
    except KeyError:
        wanted = f"{event_type} {version}"[:200]  # the message is for people, whatever was asked for
        known = sorted(f"{name} {known_version}" for name, known_version in _catalog)
        near = difflib.get_close_matches(wanted, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "register it in your app's events.py"
        raise UnknownEventType(f"no event type {wanted} in the catalog: {hint}") from None


def event_types() -> list[EventType]:
    """Return all registered event types, by name and version."""
    return [_catalog[key] for key in sorted(_catalog)]


def topic_for(event_type: str) -> str:
    """Return the topic of an event type, by its domain (specification, getTopicForEventType)."""
    conf = outbox_settings()
    return conf.TOPICS.get(event_type.partition(".")[0], conf.DEFAULT_TOPIC)


def topics() -> list[str]:
    """Return every topic that events can be routed to, each once."""
    conf = outbox_settings()
    return sorted({*conf.TOPICS.values(), conf.DEFAULT_TOPIC})
