"""The event catalog: event type and version <-> payload message, and the topic of an event type.

Every app registers its types, and the upcasters between their versions, in its `events.py`, found by autodiscovery.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from google.protobuf.message import Message

from .conf import outbox_settings
from .exceptions import DuplicateRegistration, InvalidEventType, PayloadMismatch, UnknownEventType

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


@dataclass(frozen=True)
class Upcaster:
    """A function that turns the payload of one version into that of a later one."""

    function: Callable[[Any], Message]
    to: str


UpcasterFunction = TypeVar("UpcasterFunction", bound=Callable[[Any], Message])

_catalog: dict[tuple[str, str], EventType] = {}
_upcasters: dict[tuple[str, str], Upcaster] = {}


def register_event(event_type: str, payload: type[Message], version: str = "v1") -> str:
    """Put an event type into the catalog and return its name.

    `event_type`: `<domain>[.<entity>...].<past-tense verb>`, e.g. `conversation.message.sent` (specification,
    best practices: an event states what has happened). `version`: "v1", "v2", ...

    Raises InvalidEventType for a name or version of another shape, DuplicateRegistration for a second
    registration of the same type and version.
    """
    check_event_type(event_type)
    check_version(event_type, version)
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


def check_version(event_type: str, version: str) -> None:
    """Raise InvalidEventType unless the version is v1, v2, ..."""
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise InvalidEventType(f"event version {version!r} of {event_type} must look like v1, v2, ...")


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


def upcasts(event_type: str, version: str, *, to: str) -> Callable[[UpcasterFunction], UpcasterFunction]:
    """Register a function that turns a payload of `version` into one of version `to`, for handlers of the latter.

        @upcasts("order.placed", "v1", to="v2")
        def add_currency(old: OrderPlacedV1) -> OrderPlacedV2:
            return OrderPlacedV2(order_id=old.order_id, amount=old.amount, currency="EUR")

    Several make a chain: v1 to v2 to v3. It runs in the handler's transaction, each time that the event is tried: what
    it raises is treated like an error of the handler, what it returns must be the message of version `to`.

    Raises UnknownEventType when one of the versions is not in the catalog, DuplicateRegistration when `version` has an
    upcaster already, ValueError when `to` is not later than `version`: a chain never comes back to where it was.
    """
    for one in (version, to):
        event_type_for(event_type, one)
    if int(to[1:]) <= int(version[1:]):
        raise ValueError(f"{event_type}: an upcaster leads to a later version, not from {version} to {to}")

    def register(function: UpcasterFunction) -> UpcasterFunction:
        if there := _upcasters.get((event_type, version)):
            raise DuplicateRegistration(f"{event_type} {version} has an upcaster already, to {there.to}")
        _upcasters[event_type, version] = Upcaster(function, to)
        return function

    return register


def versions_from(event_type: str, version: str) -> list[str]:
    """The versions that an event of `version` can be handled in: its own, then those that upcasters lead to."""
    versions = [version]
    while upcaster := _upcasters.get((event_type, versions[-1])):
        versions.append(upcaster.to)
    return versions


def upcast(event_type: str, version: str, payload: Message, *, to: str) -> Message:
    """Return the payload of `version` as one of version `to`, which must be one of `versions_from()`.

    Raises PayloadMismatch when an upcaster returns another message than the catalog names, and what upcasters raise.
    """
    while version != to:
        upcaster = _upcasters[event_type, version]
        payload, version = upcaster.function(payload), upcaster.to
        expected = event_type_for(event_type, version).payload
        if not isinstance(payload, expected):
            raise PayloadMismatch(
                f"the upcaster of {event_type} to {version} returned a {type(payload).__name__}, "
                f"not a {expected.__name__}"
            )
    return payload


def topic_for(event_type: str) -> str:
    """Return the topic of an event type, by its domain (specification, getTopicForEventType)."""
    conf = outbox_settings()
    return conf.TOPICS.get(event_type.partition(".")[0], conf.DEFAULT_TOPIC)


def topics() -> list[str]:
    """Return every topic that events can be routed to, each once."""
    conf = outbox_settings()
    return sorted({*conf.TOPICS.values(), conf.DEFAULT_TOPIC})
