import dataclasses
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal

import pytest
from django.db import connection, transaction

from events_outbox import emit_event
from events_outbox.handlers import consumer_named
from events_outbox.models import DeadLetter
from events_outbox.testing import handle_now
from tests.voicehelper.analytics.conftest import DAY, completed, emit, reply
from tests.voicehelper.conftest import consume
from voicehelper.analytics.event_handlers import count
from voicehelper.analytics.models import BudgetDay, DailyTotal
from voicehelper.conversations.services import (
    complete_conversation,
    create_conversation,
    fail_conversation,
    send_message,
)
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload


def totals() -> dict:
    return {
        (str(row.tenant_id), row.day, row.mode): (row.conversations, row.messages) for row in DailyTotal.objects.all()
    }


@pytest.fixture
def events(bob, charlie, emitted):
    """Six conversations and ten messages of two tenants in two modes."""
    for user, mode, conversations in ((bob, "chat", 3), (bob, "voice", 2), (charlie, "chat", 1)):
        for number in range(conversations):
            conversation = create_conversation(user=user, title=str(number), mode=mode)
            for _ in range(number + 1):
                send_message(user=user, conversation_id=conversation.id, content="Hi")
    return emitted("conversation.created") + emitted("conversation.message.sent")


def test_every_event_is_counted_once(bob, charlie, events):
    consume("analytics")

    today = events[0].timestamp.date()
    expected = {
        (str(bob.tenant_id), today, "chat"): (3, 6),
        (str(bob.tenant_id), today, "voice"): (2, 3),
        (str(charlie.tenant_id), today, "chat"): (1, 1),
    }
    assert totals() == expected

    consume("analytics")
    assert totals() == expected


def test_later_events_are_added(bob, events):
    consume("analytics")
    conversation = create_conversation(user=bob, title="One more", mode="voice")
    send_message(user=bob, conversation_id=conversation.id, content="Hi")
    consume("analytics")

    assert totals()[str(bob.tenant_id), events[0].timestamp.date(), "voice"] == (3, 4)


def test_a_batch_is_one_statement(events, django_assert_num_queries):
    with django_assert_num_queries(1):
        count(events)


def test_replies_are_three_statements_more(bob, django_assert_num_queries):
    with django_assert_num_queries(3):  # lock the days, add, look whether a budget is exceeded
        count([reply(bob.tenant_id, DAY), reply(bob.tenant_id, DAY - timedelta(days=1))])


def test_all_types_go_to_one_handler_in_one_call(db):
    consumer = consumer_named("analytics")
    assert consumer.group_id == "analytics-service"
    assert consumer.topics == ["conversation.events"]
    names = ("created", "message.sent", "completed", "failed")
    (handler,) = {consumer.route(f"conversation.{name}", "v1").handler for name in names}
    assert handler.is_batch


def test_replies_are_counted_by_model(bob):
    count(
        [
            reply(bob.tenant_id, cost=0.1, tokens=(100, 10), latency=0.1, model="small"),
            reply(bob.tenant_id, cost=0.2, tokens=(200, 20), latency=0.1000001, model="small"),
            reply(bob.tenant_id, cost=0.7, tokens=(300, 30), latency=31.5, model="large"),
        ]
    )
    small, large = DailyTotal.objects.order_by("-model")
    assert (small.model, small.messages, small.replies) == ("small", 2, 2)
    assert (small.input_tokens, small.output_tokens) == (300, 30)
    assert (small.cost_dollars, small.latency_seconds) == (Decimal("0.3"), Decimal("0.2"))
    assert (small.replies_to_100ms, small.replies_to_500ms, small.replies_over_30s) == (2, 0, 0)
    assert (large.replies_to_30s, large.replies_over_30s, large.latency_seconds) == (0, 1, Decimal("31.5"))


def test_cost_is_an_exact_sum_in_any_order(bob):
    """Doubles would give another sum for another order, and none of them 1,000.1."""
    events = [reply(bob.tenant_id, cost=0.1) for _ in range(1000)] + [reply(bob.tenant_id, cost=900.1)]
    random.shuffle(events)
    for start in range(0, len(events), 77):
        count(events[start : start + 77])
    assert DailyTotal.objects.get().cost_dollars == Decimal("1000.1")


def test_the_ends_of_conversations_are_counted(bob):
    for end in (complete_conversation, complete_conversation, fail_conversation):
        end(user=bob, conversation_id=create_conversation(user=bob, title="x", mode="voice").id)
    consume("analytics")
    total = DailyTotal.objects.get()
    assert (total.mode, total.model, total.conversations, total.completed, total.failed) == ("voice", "", 3, 2, 1)


def test_a_message_of_a_user_has_no_model_and_no_latency(bob, events):
    consume("analytics")
    for total in DailyTotal.objects.all():
        assert (total.model, total.replies, total.latency_seconds, total.cost_dollars) == ("", 0, 0, 0)
    assert not BudgetDay.objects.exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"cost": float("nan")},
        {"cost": float("inf")},
        {"cost": -0.01},
        {"cost": 1e9},
        {"latency": -1.0},
        {"latency": 1e300},
        {"tokens": (-1, 0)},
        {"model": "x" * 201},
        {"model": "x\0"},
        {"mode": "x" * 21},
    ],
    ids=str,
)
def test_an_event_with_what_nobody_can_have_counted_costs_itself_only(bob, wrong):
    emit(reply(bob.tenant_id, cost=0.5), reply(bob.tenant_id, **wrong), completed(bob.tenant_id))
    consume("analytics")
    dead = DeadLetter.objects.get()
    assert (dead.consumer, dead.reason) == ("analytics", "permanent")
    sums = DailyTotal.objects.all().added_up()
    assert (sums["replies"], sums["completed"], sums["cost_dollars"]) == (1, 1, Decimal("0.5"))


def test_the_largest_values_are_counted(bob):
    most, tokens = 999_999_999.5, 2**31 - 1
    largest = reply(bob.tenant_id, cost=most, tokens=(tokens, tokens), latency=most, model="x" * 200)
    for _ in range(3):
        count([largest] * 100)
    total = DailyTotal.objects.get()
    assert (total.input_tokens, total.cost_dollars) == (300 * tokens, 300 * Decimal(most))


def test_totals_are_exact_under_duplicates_and_replay(bob):
    replies = [reply(bob.tenant_id, cost=0.1, tokens=(1, 1)) for _ in range(20)]
    emit(*replies)
    consume("analytics")
    handle_now("analytics", events=[*replies, *replies[:7]])
    consume("analytics")
    sums = DailyTotal.objects.all().added_up()
    assert (sums["replies"], sums["cost_dollars"], sums["input_tokens"]) == (20, 2, 20)


def test_the_day_is_that_of_utc(bob, events):
    late = datetime(2026, 3, 1, 23, 59, 59, 999_999, tzinfo=UTC)
    east = datetime(2026, 3, 1, 1, 0, tzinfo=timezone(timedelta(hours=2)))
    event = next(event for event in events if event.tenant_id == str(bob.tenant_id))
    count([dataclasses.replace(event, timestamp=late), dataclasses.replace(event, timestamp=east)])
    assert {(row.day, row.conversations) for row in DailyTotal.objects.all()} == {
        (date(2026, 3, 1), 1),
        (date(2026, 2, 28), 1),
    }


def test_an_event_without_a_proper_tenant_costs_itself_only(bob, events):
    with transaction.atomic():
        emit_event("conversation.created", ConversationCreatedPayload(), aggregate_id="c-1", tenant_id="nonsense")
    consume("analytics")

    dead = DeadLetter.objects.get()
    assert (dead.consumer, dead.reason, dead.attempts) == ("analytics", "permanent", 1)
    assert sum(conversations for conversations, _ in totals().values()) == 6


@pytest.mark.django_db(transaction=True)
def test_concurrent_workers_lose_nothing_and_never_deadlock(events):
    days = [datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=number) for number in range(60)]

    def work(worker: int) -> Counter:
        randomness, counted = random.Random(worker), Counter()
        try:
            for _ in range(15):
                batch = [dataclasses.replace(randomness.choice(events), timestamp=day) for day in days]
                randomness.shuffle(batch)
                with transaction.atomic():
                    count(batch)
                counted.update((event.tenant_id, event.timestamp.date(), event.event_type) for event in batch)
        finally:
            connection.close()
        return counted

    # Replies as well, which lock rows of two tables.
    events = [*events, *(reply(event.tenant_id, cost=0.1, tokens=(1, 1)) for event in events)]
    with ThreadPoolExecutor(4) as pool:
        expected = sum(pool.map(work, range(4)), Counter())

    counted = Counter()
    for row in DailyTotal.objects.all():
        counted[str(row.tenant_id), row.day, "conversation.created"] += row.conversations
        counted[str(row.tenant_id), row.day, "conversation.message.sent"] += row.messages
    assert +counted == expected
    sums = DailyTotal.objects.all().added_up()
    assert sums["cost_dollars"] * 10 == sums["replies"] == sums["input_tokens"] > 0
    assert expected.total() == 4 * 15 * 60
