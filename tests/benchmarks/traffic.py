"""Realistic conversation traffic: the same events for the same seed.

The text is made of the words of Python's reference manual, each as frequent as there, drawn one by one: prose, which
repeats whole phrases, would compress better.
"""

import random
import re
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from itertools import accumulate
from pydoc_data.topics import topics

from events_outbox.emit import NewEvent
from voicehelper.conversations.services import METADATA
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload, MessageSentPayload

STARTED_MS = 1_790_000_000_000
EVENTS_PER_SECOND = 10
TENANTS, USERS, LIVE_CONVERSATIONS = 20, 500, 200
MESSAGES_A_CONVERSATION = 12
MODES = ("chat", "chat", "chat", "agent", "workflow", "voice")


@dataclass
class _Conversation:
    id: uuid.UUID
    tenant: uuid.UUID
    user: uuid.UUID
    mode: str
    messages: int = 0


def conversation_events(count: int, seed: int = 1) -> Iterator[NewEvent]:
    """Conversations that are opened and written to, many at the same time: messages of 50 to 800 characters."""
    rng = random.Random(seed)
    users = [(_uuid7(STARTED_MS, rng), _uuid7(STARTED_MS, rng)) for _ in range(USERS)]
    tenants = [tenant for tenant, _ in users[:TENANTS]]
    live: list[_Conversation] = []
    for number in range(count):
        now_ms = STARTED_MS + number * 1000 // EVENTS_PER_SECOND
        if len(live) < LIVE_CONVERSATIONS or rng.random() < 1 / MESSAGES_A_CONVERSATION:
            if len(live) >= LIVE_CONVERSATIONS:
                live.pop(rng.randrange(len(live)))
            which = rng.randrange(USERS)
            conversation = _Conversation(
                _uuid7(now_ms, rng), tenants[which % TENANTS], users[which][1], rng.choice(MODES)
            )
            live.append(conversation)
            payload = ConversationCreatedPayload(
                conversation_id=str(conversation.id), title=text(rng, rng.randrange(15, 60)), mode=conversation.mode
            )
            event_type = "conversation.created"
        else:
            conversation = rng.choice(live)
            conversation.messages += 1
            is_answer = conversation.messages % 2 == 0
            content = text(rng, rng.randrange(200, 801) if is_answer else rng.randrange(50, 401))
            payload = MessageSentPayload(
                conversation_id=str(conversation.id),
                message_id=str(_uuid7(now_ms, rng)),
                role="assistant" if is_answer else "user",
                content=content,
                mode=conversation.mode,
                content_length=len(content),
            )
            event_type = "conversation.message.sent"
        yield NewEvent(
            event_type=event_type,
            payload=payload,
            aggregate_id=conversation.id,
            tenant_id=conversation.tenant,
            user_id=conversation.user,
            metadata=METADATA,
            # A web request's id, as the middleware gives it.
            correlation_id=uuid.UUID(int=rng.getrandbits(128), version=4).hex,
            event_id=_uuid7(now_ms, rng),
            timestamp=datetime.fromtimestamp(now_ms / 1000 + rng.random() / 1000, UTC),
        )


def text(rng: random.Random, chars: int) -> str:
    """Words in sentences, `chars` characters long."""
    words, weights = _vocabulary()
    drawn = rng.choices(words, cum_weights=weights, k=chars // 3 + 5)
    sentences = []
    while drawn:
        length = rng.randrange(4, 18)
        sentences.append(" ".join(drawn[:length]).capitalize() + rng.choice("...?!"))
        drawn = drawn[length:]
    return " ".join(sentences)[:chars].ljust(chars, ".")


@cache
def _vocabulary() -> tuple[list[str], list[int]]:
    counts = Counter(re.findall(r"\b[a-z]+(?:'[a-z]+)?\b", " ".join(topics.values())))
    return list(counts), list(accumulate(counts.values()))


def _uuid7(at_ms: int, rng: random.Random) -> uuid.UUID:
    bits = at_ms << 80 | 0x7 << 76 | rng.getrandbits(12) << 64 | 0b10 << 62 | rng.getrandbits(62)
    return uuid.UUID(int=bits)
