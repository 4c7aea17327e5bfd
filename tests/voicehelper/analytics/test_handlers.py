import dataclasses
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta, timezone

import pytest
from django.db import connection, transaction

from events_outbox import emit_event
from events_outbox.handlers import consumer_named
from events_outbox.models import DeadLetter
from tests.voicehelper.conftest import consume
from voicehelper.analytics.event_handlers import count
from voicehelper.analytics.models import DailyTotal
from voicehelper.conversations.services import create_conversation, send_message
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


def test_both_types_go_to_one_handler_in_one_call(db):
    consumer = consumer_named("analytics")
    assert consumer.group_id == "analytics-service"
    assert consumer.topics == ["conversation.events"]
    created, sent = (consumer.route(f"conversation.{name}", "v1").handler for name in ("created", "message.sent"))
    assert created is sent
    assert created.is_batch


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

    with ThreadPoolExecutor(4) as pool:
        expected = sum(pool.map(work, range(4)), Counter())

    counted = Counter()
    for (tenant_id, day, _mode), (conversations, messages) in totals().items():
        counted[tenant_id, day, "conversation.created"] += conversations
        counted[tenant_id, day, "conversation.message.sent"] += messages
    assert +counted == expected
    assert expected.total() == 4 * 15 * 60
