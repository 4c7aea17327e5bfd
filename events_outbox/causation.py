"""What an event came of and what came of it: the events of its correlation id as a tree by causation."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from django.db.models import F, Func, IntegerField
from google.protobuf.message import DecodeError

from .models import OutboxEvent, OutboxEventQuerySet
from .proto.base_event_pb2 import BaseEvent

GROUP_EVENTS = 200
"""More of a group is not shown: nobody reads on, and each event's bytes have to be read."""
GROUP_BYTES = 16_000_000
"""How much of the events' bytes is read for their causes."""
_ANCESTORS = 20


@dataclass(frozen=True)
class Caused:
    """An event of the group. `cause`: its causation id, empty when nothing caused it, None when it was not read."""

    event: OutboxEvent
    cause: str | None


@dataclass(frozen=True)
class Node:
    """A line of the tree, in the order that it is read. `depth`: 0 for a root. `note`: what is odd about its cause."""

    event: OutboxEvent
    depth: int
    is_current: bool
    note: str = ""


@dataclass(frozen=True)
class Group:
    """The tree. `has_more`: the group has more events than are shown."""

    nodes: Sequence[Node]
    has_more: bool


def correlation_group(
    event: OutboxEvent, events: OutboxEventQuerySet, *, limit: int = GROUP_EVENTS, max_bytes: int = GROUP_BYTES
) -> Group:
    """The event's group, of those `events` that may be seen: the first ones of it, and the way to this one."""
    shown: dict[int, OutboxEvent] = {}
    has_more = False
    light = events.defer("value", "baggage", "tracestate")
    if event.correlation_id:
        first = list(light.filter(correlation_id=event.correlation_id).order_by("id")[: limit + 1])
        has_more = len(first) > limit
        shown = {one.pk: one for one in first[:limit]}
    shown.setdefault(event.pk, event)
    causes = _causes(sorted(shown), max_bytes)
    if has_more:
        _add_ancestors(event, light, shown, causes)
    return Group(tree([Caused(shown[pk], causes.get(pk)) for pk in sorted(shown)], event.event_id), has_more)


def _add_ancestors(
    event: OutboxEvent, events: OutboxEventQuerySet, shown: dict[int, OutboxEvent], causes: dict[int, str]
) -> None:
    """Add the causes of the event, and theirs, that are not among the first ones."""
    known = {str(one.event_id) for one in shown.values()}
    cause = causes.get(event.pk, "")
    for _ in range(_ANCESTORS):
        event_id = _as_uuid(cause)
        if event_id is None or str(event_id) in known:
            return
        found = events.filter(event_id=event_id, correlation_id=event.correlation_id).first()
        if found is None:
            return
        known.add(str(event_id))
        shown[found.pk] = found
        causes |= _causes([found.pk], GROUP_BYTES)
        cause = causes.get(found.pk, "")


def _causes(ids: Sequence[int], max_bytes: int) -> dict[int, str]:
    """The causation ids, read from the events' bytes, as far as those are not too many."""
    size = Func(F("value"), function="octet_length", output_field=IntegerField())
    sizes = OutboxEvent.objects.filter(pk__in=ids).order_by("id").values_list("pk", size)
    wanted, total = [], 0
    for pk, size_bytes in sizes:
        if total + size_bytes <= max_bytes:
            wanted.append(pk)
            total += size_bytes
    values = OutboxEvent.objects.filter(pk__in=wanted).order_by().values_list("pk", "value")
    return {pk: causation_id(value) for pk, value in values.iterator(chunk_size=20)}


def causation_id(value: bytes | memoryview) -> str:
    """The causation id in an event's bytes; empty also where they are no event."""
    try:
        return str(BaseEvent.FromString(bytes(value)).causation_id)
    except DecodeError:
        return ""


def tree(group: Sequence[Caused], current: UUID) -> list[Node]:
    """The events, given in the order they were emitted, each below its cause.

    What was caused by an event that is not among them is a root and says so; a circle is opened at its first event.
    """
    by_id = {str(caused.event.event_id): caused for caused in group}
    effects: dict[str, list[Caused]] = defaultdict(list)
    roots: list[tuple[Caused, str]] = []
    for caused in group:
        cause = _canonical(caused.cause)
        if cause in by_id and by_id[cause] is not caused:
            effects[cause].append(caused)
        else:
            roots.append((caused, _note(caused, cause)))
    nodes: list[Node] = []
    seen: set[str] = set()
    for root, note in roots:
        nodes += _walk(root, note, effects, seen, current)
    for caused in group:  # what no root leads to goes round in circles
        if str(caused.event.event_id) not in seen:
            nodes += _walk(caused, "caused by one of its own effects", effects, seen, current)
    return nodes


def _walk(
    root: Caused, note: str, effects: Mapping[str, list[Caused]], seen: set[str], current: UUID
) -> Iterator[Node]:
    stack = [(root, note, 0)]
    while stack:
        caused, its_note, depth = stack.pop()
        event_id = str(caused.event.event_id)
        if event_id in seen:
            continue
        seen.add(event_id)
        yield Node(caused.event, depth, caused.event.event_id == current, its_note)
        stack += [(effect, "", depth + 1) for effect in reversed(effects.get(event_id, []))]


def _note(caused: Caused, cause: str) -> str:
    if caused.cause is None:
        return "its cause was not read: the events are too large"
    if not cause:
        return ""
    if cause == str(caused.event.event_id):
        return "names itself as its cause"
    return f"caused by {cause}, which is not in this group"


def _canonical(cause: str | None) -> str:
    event_id = _as_uuid(cause or "")
    return (cause or "") if event_id is None else str(event_id)


def _as_uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None
