"""The whole way in real processes, and what happens when parts of it are killed or away."""

import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from django.db import connection, transaction
from django.db.models import Sum

from events_outbox import NewEvent, emit_events
from events_outbox.models import OutboxEvent, ProcessedEvent, RelayCursor
from events_outbox.proto.base_event_pb2 import BaseEvent
from tests.events_outbox.conftest import eventually
from tests.faults.conftest import kill_hard
from voicehelper.analytics.models import DailyTotal
from voicehelper.audit.models import AuditEntry
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload

pytestmark = pytest.mark.django_db(transaction=True)

# Marked apache_kafka: what sets the product's own groups to the end of the shared topics (the embedded broker takes
# no offsets from outside a group), and what needs records to outlive the broker.

MODES = ("chat", "agent", "workflow", "voice")


def post(client, path, **body):
    answer = client.post(path, json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()


def post_conversations(url, authorization, count, clients=8):
    """Concurrent clients: each of `count` conversations gets one message."""

    def one(number):
        client = pool_clients[number % clients]
        conversation = post(client, "/api/v1/conversations", title=f"conversation {number}", mode=MODES[number % 4])
        post(client, "/api/v1/messages", conversation_id=conversation["id"], content=f"message {number}")

    # Given up before the server, which keeps an idle connection for 2 s, closes it under a request.
    limits = httpx.Limits(keepalive_expiry=1)
    pool_clients = [
        httpx.Client(base_url=url, headers=authorization, timeout=60, limits=limits) for _ in range(clients)
    ]
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(count)))
    for client in pool_clients:
        client.close()


def totals():
    return DailyTotal.objects.aggregate(conversations=Sum("conversations"), messages=Sum("messages"))


@pytest.mark.apache_kafka
def test_a_thousand_conversations_are_counted_once_and_audited(processes, fresh_groups, authorization):
    url = processes.web()
    processes.manage("relay_outbox")
    for consumer in ("analytics", "notification", "audit"):
        processes.manage("consume", consumer)
    post_conversations(url, authorization, 1000)

    eventually(lambda: totals() == {"conversations": 1000, "messages": 1000}, 60)
    emitted = set(OutboxEvent.objects.values_list("event_id", flat=True))
    eventually(lambda: AuditEntry.objects.count() == len(emitted), 60)
    assert set(AuditEntry.objects.values_list("event_id", flat=True)) == emitted
    assert processes.status()["pending"] == 0

    summary = httpx.get(f"{url}/api/v1/analytics/summary", headers=authorization).json()
    by_mode = {row["mode"]: (row["conversations"], row["messages"]) for row in summary["rows"]}
    assert by_mode == dict.fromkeys(MODES, (250, 250))


@pytest.mark.apache_kafka
def test_with_kafka_away_the_api_works_and_nothing_is_lost(processes, kafka, authorization, topic_reader):
    url = processes.web()
    processes.manage("relay_outbox")
    post_conversations(url, authorization, 20)
    eventually(lambda: processes.status()["pending"] == 0, 60)
    kafka.stop()
    post_conversations(url, authorization, 50)  # every answer is 201
    with httpx.Client(base_url=url, headers=authorization) as client:
        conversation = post(client, "/api/v1/conversations", title="ordered")
        for number in range(20):
            post(client, "/api/v1/messages", conversation_id=conversation["id"], content=str(number))
    status = eventually(lambda: (s := processes.status())["last_error"] and s)
    assert status["pending"] == 121 and status["leader"]

    kafka.start()
    eventually(lambda: processes.status()["pending"] == 0, 60)
    messages = topic_reader.read_rest()
    assert {BaseEvent.FromString(m.value()).event_id for m in messages} == all_event_ids()
    assert_published_in_order(messages)


def all_event_ids():
    return {str(event_id) for event_id in OutboxEvent.objects.values_list("event_id", flat=True)}


def assert_published_in_order(messages):
    """Per aggregate, the first occurrences in the topic are in the order of the outbox."""
    expected = defaultdict(list)
    for aggregate_id, event_id in OutboxEvent.objects.order_by("id").values_list("aggregate_id", "event_id"):
        expected[aggregate_id].append(str(event_id))
    published = defaultdict(dict)
    for message in messages:
        published[message.key().decode()][BaseEvent.FromString(message.value()).event_id] = None
    assert {key: list(ids) for key, ids in published.items()} == dict(expected)


def emit_many(alice, count, aggregates=40):
    """Conversations of alice's tenant, straight into the outbox, in transactions of a hundred."""
    for start in range(0, count, 100):
        with transaction.atomic():
            emit_events(
                NewEvent(
                    event_type="conversation.created",
                    payload=ConversationCreatedPayload(conversation_id=str(n), mode="chat"),
                    aggregate_id=f"aggregate-{n % aggregates}",
                    tenant_id=alice.tenant_id,
                )
                for n in range(start, min(start + 100, count))
            )


def test_relays_killed_in_mid_batch_leave_no_gap_and_keep_order(processes, alice, topic_reader):
    emit_many(alice, 6000)
    batch_size, kills = 100, 4
    total = processes.status()["pending"]
    for kill in range(1, kills + 1):
        relay = processes.manage("relay_outbox", "--batch-size", batch_size)
        goal = total * kill // (kills + 2)
        eventually(lambda goal=goal: total - pending() >= goal, 60)
        kill_hard(relay)
    assert 0 < pending() < total, "every relay was to be killed in the middle of its work"
    relay = processes.manage("relay_outbox", "--until-empty")
    assert relay.wait(60) == 0
    messages = topic_reader.read_rest()
    counts = Counter(BaseEvent.FromString(m.value()).event_id for m in messages)
    assert set(counts) == all_event_ids()
    assert sum(counts.values()) - len(counts) <= kills * batch_size
    assert_published_in_order(messages)


def pending():
    return OutboxEvent.objects.pending(RelayCursor.read()).count()


@pytest.mark.apache_kafka
def test_consumers_killed_in_mid_batch_count_exactly(processes, fresh_groups, alice):
    count, kills = 6000, 4
    emit_many(alice, count)
    assert processes.manage("relay_outbox", "--until-empty").wait(60) == 0
    for kill in range(1, kills + 1):
        consumer = processes.manage("consume", "analytics", "--batch-size", 20)
        goal = count * kill // (kills + 2)
        eventually(lambda goal=goal: counted() >= goal, 60)
        with transaction.atomic(), connection.cursor() as cursor:
            # The batch comes to its upsert and no further: it is killed in the middle for certain.
            cursor.execute("LOCK TABLE analytics_dailytotal IN SHARE MODE")
            eventually(somebody_waits_for_a_lock)
            time.sleep(0.2)  # offsets sent too early, ahead of the database, would arrive by now
            kill_hard(consumer)
    assert counted() < count, "every consumer was to be killed in the middle of its work"
    processes.manage("consume", "analytics")
    eventually(lambda: counted() == count, 120)
    assert totals() == {"conversations": count, "messages": 0}


def somebody_waits_for_a_lock():
    with connection.cursor() as cursor:
        cursor.execute("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)")
        return cursor.fetchone()[0]


def counted():
    return ProcessedEvent.objects.filter(consumer="analytics").count()


def test_a_standby_takes_over_from_a_killed_leader_within_three_seconds(processes, alice):
    relays = [processes.manage("relay_outbox") for _ in range(2)]
    status = eventually(lambda: (s := processes.status())["leader"] and s["standbys"] == 1 and s, 60)
    leader_pid = int(status["leader"].rpartition(":")[2])
    (leader,) = [relay for relay in relays if relay.pid == leader_pid]
    killed = time.monotonic()
    kill_hard(leader)
    emit_many(alice, 1)
    eventually(lambda: pending() == 0)
    assert time.monotonic() - killed < 3
    assert RelayCursor.read().leader != status["leader"]


@pytest.mark.apache_kafka
@pytest.mark.parametrize("command", [("relay_outbox",), ("consume", "audit")])
def test_sigterm_ends_a_worker_cleanly(processes, fresh_groups, command):
    worker = processes.manage(*command)
    if command[0] == "relay_outbox":
        eventually(lambda: processes.status()["leader"], 30)
    else:
        eventually(lambda: "partitions assigned" in processes.logs(), 30)
    worker.terminate()
    assert worker.wait(10) == 0
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'relay_outbox'")
        assert cursor.fetchone()[0] == 0
