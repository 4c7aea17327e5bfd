"""Rebuilding a lost cursor from what the broker holds.

Without its cursor the relay cannot know what it has published: starting from nothing would flood the topics with all
that retention still holds, starting from now would lose what is pending. The topics themselves are the record. An
event that they hold is published. One that they do not hold is pending, unless it is older than what the topic still
holds at all: that one had been published, and the broker has dropped it since. (An event that really was pending for
longer than the topic's retention is lost by this rule; `replay_outbox` publishes it. The log gives the numbers.)

A restore into another cluster with its cursor needs none of this: see `Leader._rebase`.
"""

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar

import psycopg
from google.protobuf.message import DecodeError

from .conf import outbox_settings
from .exceptions import CursorLost
from .kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition, make_reader
from .proto.base_event_pb2 import BaseEvent
from .window import take_snapshot

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

NOT_THERE = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC)
ASK_SECONDS = 2.0
BROKER_SECONDS = 30.0
"""How long the broker may say nothing before the rebuild is given up, to be tried again."""
CLOCK_SKEW = timedelta(hours=1)
"""How far the clocks of database and relay hosts may differ."""

_CURSOR = "events_outbox_relaycursor"
_OUTBOX = "events_outbox_outboxevent"
_UNDELIVERABLE = "events_outbox_undeliverableevent"


def rebuild_cursor(session: psycopg.Connection[Any], why: str) -> None:
    """Write the cursor anew, in one transaction with what it makes of the events. Needs the leader lock.

    Reads the topics of the last retention period, and the whole outbox. Raises CursorLost when the broker does not
    answer.
    """
    start = take_snapshot(session)
    topics = session.execute(f"SELECT topic::text, min(created_at) FROM {_OUTBOX} GROUP BY topic").fetchall()
    logger.warning("rebuilding the cursor from what the broker holds", extra={"why": why, "topics": len(topics)})
    session.execute("CREATE TEMP TABLE held (event_id text)")
    session.execute("CREATE TEMP TABLE dropped (topic text, before timestamptz)")
    reader = make_reader(lambda error: logger.warning("broker trouble", extra={"error": error.str()}))
    try:
        for topic, oldest in topics:
            holds_from = _note_held(session, reader, topic, oldest - CLOCK_SKEW)
            if holds_from is not None:
                session.execute("INSERT INTO dropped VALUES (%s, %s)", [topic, holds_from - CLOCK_SKEW])
    finally:
        reader.close()
    session.execute("CREATE INDEX ON held (event_id)")
    session.execute("ANALYZE held")
    with session.transaction():
        pending = session.execute(
            # Those that committed after `start` are pending as they stand.
            f"""UPDATE {_OUTBOX} o SET transaction_id = pg_current_xact_id()
                 WHERE (pg_visible_in_snapshot(transaction_id, %s::pg_snapshot)
                        OR transaction_id > pg_current_xact_id())
                   AND NOT EXISTS (SELECT FROM held WHERE held.event_id = o.event_id::text)
                   AND NOT EXISTS (SELECT FROM {_UNDELIVERABLE} u WHERE u.event_id = o.id)
                   AND NOT EXISTS (SELECT FROM dropped d WHERE d.topic = o.topic AND o.created_at < d.before)""",
            [str(start)],
        ).rowcount
        # Published ones with the transaction id of another cluster, that this one has not come to.
        session.execute(
            f"""UPDATE {_OUTBOX} o SET transaction_id = '2'
                 WHERE NOT pg_visible_in_snapshot(transaction_id, %s::pg_snapshot)
                   AND (transaction_id > pg_current_xact_id()
                        OR EXISTS (SELECT FROM held WHERE held.event_id = o.event_id::text))""",
            [str(start)],
        )
        ((assumed,),) = session.execute(
            f"""SELECT count(*) FROM {_OUTBOX} o JOIN dropped d ON d.topic = o.topic AND o.created_at < d.before
                 WHERE NOT EXISTS (SELECT FROM held WHERE held.event_id = o.event_id::text)"""
        ).fetchall()
        session.execute(f"DELETE FROM {_CURSOR}")
        session.execute(
            f"""INSERT INTO {_CURSOR} (id, published, window_last_id, leader, last_error, events_per_second)
                VALUES (1, %s, 0, '', '', 0)""",
            [str(start)],
        )
    session.execute("DROP TABLE held, dropped")
    logger.warning("cursor rebuilt", extra={"pending": pending, "older_than_the_topic": assumed})


def _note_held(session: psycopg.Connection[Any], reader: Consumer, topic: str, since: datetime) -> datetime | None:
    """Note the ids of the events that the topic holds since then.

    Return from when on it holds all of them, where it has dropped some; None where it has not.
    """
    since_ms = int(since.timestamp() * 1000)
    holds_from_ms: list[int] = []
    for number in _ask(session, partial(_partitions, reader, topic)):
        place = TopicPartition(topic, number)
        low, high = _ask(session, partial(reader.get_watermark_offsets, place, ASK_SECONDS))
        first = _ask(session, partial(_first_since, reader, TopicPartition(topic, number, since_ms)))
        first_ms = None
        if 0 <= first.offset < high:
            first_ms = _note_partition(session, reader, first, high)
        if 0 < low == high:  # emptied
            holds_from_ms.append(int(time.time() - outbox_settings().TOPIC_RETENTION_DAYS * 86_400) * 1000)
        elif low > 0:
            holds_from_ms.append(first_ms if first.offset == low and first_ms is not None else since_ms)
    return datetime.fromtimestamp(min(holds_from_ms) / 1000, UTC) if holds_from_ms else None


def _partitions(reader: Consumer, topic: str) -> list[int]:
    found = reader.list_topics(topic, timeout=ASK_SECONDS).topics[topic]
    if found.error is not None and found.error.code() not in NOT_THERE:
        raise KafkaException(found.error)
    return list(found.partitions)


def _first_since(reader: Consumer, moment: TopicPartition) -> TopicPartition:
    (first,) = reader.offsets_for_times([moment], ASK_SECONDS)
    if first.error is not None:
        raise KafkaException(first.error)
    return first


def _note_partition(session: psycopg.Connection[Any], reader: Consumer, first: TopicPartition, high: int) -> int | None:
    """Note the ids of the events from `first` to below offset `high`; return the time of the first record."""
    reader.assign([first])
    first_ms = None
    heard = time.monotonic()
    while _ask(session, partial(reader.position, [first]))[0].offset < high:
        came = reader.consume(1000, 1.0)
        messages = [message for message in came if message.error() is None]
        ids = [event_id for message in messages if (event_id := _event_id(message))]
        # Also the sign of life that keeps the session, and with it the lock.
        session.execute("INSERT INTO held SELECT unnest(%s::text[])", [ids])
        if messages:
            first_ms = first_ms or messages[0].timestamp()[1]
            heard = time.monotonic()
        elif time.monotonic() - heard > BROKER_SECONDS:
            said = [str(message.error()) for message in came if message.error()] or ["nothing comes"]
            raise CursorLost(f"{first.topic} cannot be read to its end: {said[-1]}")
    return first_ms


def _event_id(message: Message) -> str:
    try:
        return str(BaseEvent.FromString(message.value() or b"").event_id)
    except DecodeError:
        return ""  # somebody else's record


def _ask(session: psycopg.Connection[Any], question: Callable[[], Answer]) -> Answer:
    """Ask the broker until it answers."""
    gives_up_at = time.monotonic() + BROKER_SECONDS
    while True:
        session.execute("SELECT 1")  # stay alive
        try:
            return question()
        except KafkaException as error:
            if time.monotonic() > gives_up_at:
                raise CursorLost(f"the broker does not answer: {error.args[0].str()}") from error
            time.sleep(0.1)
