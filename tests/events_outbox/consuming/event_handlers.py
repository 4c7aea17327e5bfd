import ctypes
import logging
import os
import time

from events_outbox import Consumer, RetryPolicy
from voicehelper.identity.models import Tenant

GROUP = os.environ["TEST_GROUP"]  # each test has consumer groups of its own
NO_RETRIES = RetryPolicy(max_retries=0)

counting = Consumer("counting", group_id=f"counting-{GROUP}")
other = Consumer("other", group_id=f"other-{GROUP}")
strict = Consumer("strict", group_id=f"strict-{GROUP}", on_failure="stop", retry=NO_RETRIES)


def leave_mark(consumer, event):
    logging.getLogger(__name__).info("handling for %s", consumer.name)
    Tenant.objects.create(name=f"{consumer.name} {os.getpid()} {event.event_id}")


@counting.handles("conversation.created")
def count(event):
    leave_mark(counting, event)
    time.sleep(0.005)  # many events take a while
    if event.aggregate_id == "slow":
        time.sleep(600)
    if event.aggregate_id == "stuck":
        ctypes.PyDLL(None).sleep(600)  # never lets another thread run


@other.handles_batch("conversation.*")
def also_count(events):
    for event in events:
        leave_mark(other, event)


@strict.handles("conversation.created")
def refuse(event):
    if event.aggregate_id == "bad":
        raise ValueError("no good")
    leave_mark(strict, event)
