"""What caused what: the tree of a correlation group, its bounds, orphans and circles."""

from uuid import UUID

import pytest
from django.db import transaction

from events_outbox import emit_event
from events_outbox.causation import Caused, causation_id, correlation_group, tree
from events_outbox.models import OutboxEvent
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload


def uid(number):
    return UUID(int=number)


def caused(number, cause):
    """An event, and the number of its cause, or text for what is no event of the group."""
    text = str(uid(cause)) if isinstance(cause, int) else cause
    return Caused(OutboxEvent(pk=number, event_id=uid(number)), text)


def drawn(*group, current=1):
    return [(node.event.pk, node.depth, node.note) for node in tree([caused(*one) for one in group], uid(current))]


def test_effects_are_below_their_cause_in_order():
    assert drawn((1, ""), (2, 1), (3, 1), (4, 2), (5, 4)) == [
        (1, 0, ""),
        (2, 1, ""),
        (4, 2, ""),
        (5, 3, ""),
        (3, 1, ""),
    ]


def test_the_current_event_is_marked():
    nodes = tree([caused(1, ""), caused(2, 1)], uid(2))
    assert [node.is_current for node in nodes] == [False, True]


def test_an_effect_emitted_before_its_cause_has_its_place():
    assert drawn((1, 2), (2, "")) == [(2, 0, ""), (1, 1, "")]


def test_orphans_say_what_is_missing():
    assert drawn((1, 99), (2, "no uuid"), (3, None)) == [
        (1, 0, f"caused by {uid(99)}, which is not in this group"),
        (2, 0, "caused by no uuid, which is not in this group"),
        (3, 0, "its cause was not read: the events are too large"),
    ]


def test_a_cause_in_other_spelling_is_found():
    assert drawn((1, ""), (2, str(uid(1)).upper().replace("-", "")))[1] == (2, 1, "")


def test_circles_are_opened():
    assert drawn((1, 1)) == [(1, 0, "names itself as its cause")]
    circle = drawn((1, 3), (2, 1), (3, 2), (4, ""))
    assert circle == [(4, 0, ""), (1, 0, "caused by one of its own effects"), (2, 1, ""), (3, 2, "")]


def test_a_long_chain_is_no_recursion():
    assert drawn(*((n, n - 1 if n > 1 else "") for n in range(1, 3000)))[-1] == (2999, 2998, "")


def test_bytes_that_are_no_event_have_no_cause():
    assert causation_id(b"\xff\xff") == ""


@pytest.fixture
def emit_caused():
    def emit_caused(cause=None, correlation_id="req-1", **fields):
        with transaction.atomic():
            return emit_event(
                "conversation.created",
                ConversationCreatedPayload(conversation_id="c1", title=fields.pop("title", "t"), mode="chat"),
                aggregate_id="c1",
                tenant_id=fields.pop("tenant_id", "t1"),
                correlation_id=correlation_id,
                causation_id=str(cause.event_id) if cause else "",
            )

    return emit_caused


def shown(event, events=None, **options):
    group = correlation_group(event, OutboxEvent.objects.all() if events is None else events, **options)
    return [(node.event.pk, node.depth) for node in group.nodes], group.has_more


@pytest.mark.django_db
def test_a_group_is_read(emit_caused):
    first = emit_caused()
    second = emit_caused(first)
    third = emit_caused(second)
    emit_caused(correlation_id="another")
    assert shown(second) == ([(first.pk, 0), (second.pk, 1), (third.pk, 2)], False)


@pytest.mark.django_db
def test_a_large_group_is_cut_but_the_way_to_the_event_is_shown(emit_caused):
    first = emit_caused()
    many = [emit_caused(first) for _ in range(5)]
    cause = emit_caused(many[-1])
    last = emit_caused(cause)
    nodes, has_more = shown(last, limit=2)
    assert has_more
    assert nodes == [(first.pk, 0), (many[0].pk, 1), (many[-1].pk, 1), (cause.pk, 2), (last.pk, 3)]


@pytest.mark.django_db
def test_only_so_many_bytes_are_read_for_causes(emit_caused):
    first = emit_caused()
    large = emit_caused(first, title="x" * 5000)
    small = emit_caused(first)
    group = correlation_group(first, OutboxEvent.objects.all(), max_bytes=2000)
    notes = {node.event.pk: node.note for node in group.nodes}
    assert notes[large.pk].startswith("its cause was not read") and notes[small.pk] == ""


@pytest.mark.django_db
def test_events_that_may_not_be_seen_are_not_in_it(emit_caused):
    own = emit_caused()
    emit_caused(own, tenant_id="t2")
    assert shown(own, OutboxEvent.objects.filter(tenant_id="t1")) == ([(own.pk, 0)], False)


@pytest.mark.django_db
def test_the_number_of_queries_does_not_grow_with_the_group(emit_caused, django_assert_num_queries):
    event = emit_caused()
    for _ in range(20):
        emit_caused(event)
    with django_assert_num_queries(3):
        shown(event)
