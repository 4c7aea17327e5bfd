"""What is meant to happen to an event at a consumer, drawn from its id: handlers and judge agree without a word."""

from zlib import crc32

CONSUMERS = ("skipping", "parking")
"""on_failure="skip" with a handler of one event, on_failure="park_key" with a batch handler."""

CREATE_TABLES = """
    -- An effect that happens twice shows: nothing here is unique but the order of the effects.
    CREATE TABLE effect (id bigint GENERATED ALWAYS AS IDENTITY, consumer text NOT NULL, event_type text NOT NULL,
                         event_id uuid NOT NULL, aggregate text NOT NULL, number int NOT NULL);
    -- The events that fail no longer.
    CREATE TABLE mended (event_id uuid NOT NULL)"""


def _one_in(count, fate, consumer, event_id):
    return crc32(f"{fate} {consumer} {event_id}".encode()) % count == 0


def fails(consumer, event_id, aggregate):
    """Always, until it is mended. Most keys never park: else there would soon be nothing left to handle."""
    may_park = not aggregate.startswith("a") or aggregate in ("a0", "a1")
    return (consumer == "skipping" or may_park) and _one_in(300, "fails", consumer, event_id)


def is_permanent(consumer, event_id):
    return _one_in(2, "permanent", consumer, event_id)


def sleep_seconds(consumer, event_id):
    """Often a little, so that a fault nearly always finds a batch in hand; now and then longer than the members may
    go without a poll (MAX_POLL_INTERVAL_MS in tests/faults/settings.py)."""
    return 3.5 * _one_in(4000, "sleeps long", consumer, event_id) or 0.02 * _one_in(5, "sleeps", consumer, event_id)


def fails_after_commit(consumer, event_id):
    return _one_in(150, "hook", consumer, event_id)


def emits(consumer, event_id):
    return _one_in(10, "emits", consumer, event_id)


def fails_at_first(consumer, event_id):
    """The first time that a member comes to it: most batches are so redone event by event."""
    return _one_in(60, "fails at first", consumer, event_id)
