"""The consumers of the fault tests: each event leaves one row in the table `effect`, and may have a fate."""

import os
import time

from django.db import connection, transaction

from events_outbox import Consumer, PermanentEventError, emit_event
from voicehelper.conversations.events import CONVERSATION_CREATED
from voicehelper.notifications.events import NOTIFICATION_CREATED
from voicehelper.proto.notification_pb2 import NotificationCreatedPayload

from . import fates

_GROUP = os.environ.get("EFFECTS_GROUP", "effects")  # each run that begins without members has its own

skipping = Consumer("skipping", group_id=f"{_GROUP}-skipping", on_failure="skip")
parking = Consumer("parking", group_id=f"{_GROUP}-parking", on_failure="park_key")
_came_before = set()


@skipping.handles(CONVERSATION_CREATED)
def one(event):
    _write("skipping", [event])
    _meet_fate("skipping", event)


@skipping.handles(NOTIFICATION_CREATED)
def one_that_a_handler_emitted(event):
    _write("skipping", [event])


@parking.handles_batch(CONVERSATION_CREATED)
def many(events):
    _write("parking", events)
    for event in events:
        _meet_fate("parking", event)


def _write(consumer, events):
    with connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO effect (consumer, event_type, event_id, aggregate, number) VALUES (%s, %s, %s, %s, %s)",
            [(consumer, e.event_type, e.event_id, e.aggregate_id, int(e.metadata["number"])) for e in events],
        )


def _meet_fate(consumer, event):
    if fates.fails_at_first(consumer, event.event_id) and event.event_id not in _came_before:
        _came_before.add(event.event_id)
        if not _is_mended(event.event_id):
            raise ConnectionError("this time")
    if fates.fails(consumer, event.event_id, event.aggregate_id) and not _is_mended(event.event_id):
        error = PermanentEventError if fates.is_permanent(consumer, event.event_id) else ValueError
        raise error("each time")
    time.sleep(fates.sleep_seconds(consumer, event.event_id))
    if fates.fails_after_commit(consumer, event.event_id):
        transaction.on_commit(_fail_after_commit)
    if fates.emits(consumer, event.event_id):
        emit_event(
            NOTIFICATION_CREATED,
            NotificationCreatedPayload(kind=event.event_type),
            aggregate_id=f"{consumer}-{event.aggregate_id}",
            tenant_id=event.tenant_id,
            metadata=dict(event.metadata),
            # A batch handler has no current event to take it from.
            causation_id=str(event.event_id) if consumer == "parking" else None,
        )


def _is_mended(event_id):
    with connection.cursor() as cursor:
        cursor.execute("SELECT EXISTS (SELECT FROM mended WHERE event_id = %s)", [event_id])
        return cursor.fetchone()[0]


def _fail_after_commit():
    raise RuntimeError("after the commit")
