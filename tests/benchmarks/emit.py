"""What emitting costs the business transaction."""

import random
import statistics
import time
from dataclasses import replace

from tests.benchmarks.bench import Bench
from tests.benchmarks.report import Row, median_and_spread, number

PAIRS_A_TRANSACTION = 50
BULK = 1_000


def run(bench: Bench) -> list[Row]:
    scale = bench.scale
    with bench.database() as outbox:
        singles = bench.call(emit_beside_insert, url=outbox.url, rounds=scale.rounds, pairs=scale.emits)
    with bench.database() as outbox:
        bulks = bench.call(emit_in_bulk, url=outbox.url, rounds=scale.rounds, times=scale.bulk_emits)
    ratio, spread = median_and_spread([emit / insert for emit, insert in singles])
    emit_us, spread_emit = median_and_spread([emit * 1e6 for emit, _ in singles])
    insert_us, spread_insert = median_and_spread([insert * 1e6 for _, insert in singles])
    rate, spread_rate = median_and_spread([BULK * scale.bulk_emits / sum(seconds) for seconds in bulks])
    call_ms, _ = median_and_spread([statistics.median(seconds) * 1e3 for seconds in bulks])
    return [
        Row(
            measure="emit_event() / a plain one-row model insert in the same transaction",
            value=ratio,
            unit="x",
            must="<= 1.15",
            baseline=f"Message.objects.create() of the same text, {number(insert_us)} µs ({spread_insert})",
            detail=f"{spread}; emit_event() with the making of its payload {number(emit_us)} µs ({spread_emit}); each "
            f"of them the median of {scale.emits:,}, taking turns",
        ),
        Row(
            measure=f"emit_events() of {BULK:,}",
            value=rate,
            unit="events/s",
            must=">= 30000",
            detail=f"{spread_rate}; transactions of {BULK:,} events of realistic traffic, commit included: "
            f"{number(call_ms)} ms each",
        ),
    ]


def emit_beside_insert(rounds: int, pairs: int) -> list[tuple[float, float]]:
    """Job: seconds of an emit and of an insert, for each round. Messages of a conversation, and their events."""
    from django.db import transaction

    from events_outbox import emit_event
    from tests.benchmarks.traffic import text
    from voicehelper.conversations.events import MESSAGE_SENT
    from voicehelper.conversations.models import Message
    from voicehelper.conversations.services import METADATA, create_conversation
    from voicehelper.identity.services import create_tenant, register_user
    from voicehelper.proto.conversation_pb2 import MessageSentPayload

    user = register_user(tenant=create_tenant(name="Bench"), username="alice", password="correct horse battery")
    conversation = create_conversation(user=user, title="Bench")
    rng = random.Random(1)
    position = 0

    def insert(content):
        nonlocal position
        position += 1
        return Message.objects.create(
            conversation=conversation,
            tenant_id=conversation.tenant_id,
            user=user,
            position=position,
            role=Message.Role.USER,
            content=content,
        )

    def emit(content):
        return emit_event(
            MESSAGE_SENT,
            MessageSentPayload(
                conversation_id=str(conversation.id),
                message_id=str(conversation.id),
                role="user",
                content=content,
                mode=conversation.mode,
                content_length=len(content),
            ),
            aggregate_id=conversation.id,
            tenant_id=conversation.tenant_id,
            user_id=user.id,
            metadata=METADATA,
        )

    def measure(count):
        took = {insert: [], emit: []}
        contents = [text(rng, rng.randrange(50, 801)) for _ in range(count)]
        for start in range(0, count, PAIRS_A_TRANSACTION):
            with transaction.atomic():
                for number_, content in enumerate(contents[start : start + PAIRS_A_TRANSACTION]):
                    for write in (insert, emit) if number_ % 2 else (emit, insert):
                        started = time.perf_counter()
                        write(content)
                        took[write].append(time.perf_counter() - started)
        return statistics.median(took[emit]), statistics.median(took[insert])

    measure(200)
    return [measure(pairs) for _ in range(rounds)]


def emit_in_bulk(rounds: int, times: int) -> list[list[float]]:
    """Job: seconds of each transaction that emits BULK events, for each round."""
    from django.db import transaction

    from events_outbox import emit_events
    from tests.benchmarks.traffic import conversation_events

    def measure(count, seed):
        took = []
        # Ids and times are left to emit_events(), as callers do.
        left_out = {"event_id": None, "timestamp": None, "correlation_id": None}
        events = [replace(event, **left_out) for event in conversation_events(count * BULK, seed)]
        for start in range(0, len(events), BULK):
            these = events[start : start + BULK]
            started = time.perf_counter()
            with transaction.atomic():
                emit_events(these)
            took.append(time.perf_counter() - started)
        return took

    measure(2, 0)
    return [measure(times, seed) for seed in range(1, rounds + 1)]
