"""Membership of a consumer group: polling, what is ours, what is done, and waiting without being thrown out."""

import logging
import operator
import threading
import time
from collections.abc import Callable, Sequence
from typing import cast

from monitoring import metrics

from .handlers import Consumer
from .kafka import Consumer as KafkaClient
from .kafka import KafkaError, KafkaException, Message, TopicPartition, make_consumer
from .records import Record

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
BREATH_SECONDS = 1.0
LEAVE_SECONDS = 5.0
LAG_SECONDS = 2.0

Partition = tuple[str, int]


class Stopping(Exception):
    """Told to stop while waiting; the work in flight is not done."""


class ClientBroken(Exception):
    """The Kafka client failed; the work in flight is not done. A new client begins at the committed offsets."""


class Membership:
    """A member of a consumer's group. `on_tick` is called whenever it polls.

    Outside `join()` and `leave()` there is no Kafka: waiting just waits, and offsets go nowhere.
    """

    def __init__(self, consumer: Consumer, on_tick: Callable[[], None]) -> None:
        self._consumer = consumer
        self._on_tick = on_tick
        # A plain flag: an Event's lock can be held by the very wait that a signal handler interrupts.
        self.stopping = False
        self.owned: set[Partition] = set()
        # Partitions lost since the batch began. One that comes back begins again at its committed offset, so the
        # batch must leave it alone: its own idea of what is done there would run ahead of that.
        self._gone: set[Partition] = set()
        self._done: dict[Partition, int] = {}
        self._uncommitted: set[Partition] = set()
        self._is_committing = False
        # A partition that was taken away while it was paused is still paused when it comes back.
        self._has_new = False
        self._held: list[Message] = []
        self._client: KafkaClient | None = None
        self._last_poll = self._last_lag = 0.0

    def join(self) -> None:
        """Make a client and subscribe. Raises ImproperlyConfigured when librdkafka refuses the settings."""
        self._client = make_consumer(self._consumer.group_id, self._on_trouble, self._on_commit)
        self._client.subscribe(
            self._consumer.topics, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
        )

    def leave(self) -> None:
        """Leave the group. A broker that is frozen is not waited for: it drops the member by itself."""
        if self._client is not None:
            leaving = threading.Thread(target=self._client.close, name="leave-group", daemon=True)
            leaving.start()
            leaving.join(LEAVE_SECONDS)
        self._client = None
        self.owned.clear()
        self._done.clear()
        self._held.clear()
        self._uncommitted.clear()
        self._is_committing = False

    def poll_batch(self, size: int) -> list[Record]:
        """Return the next records, at most `size`, and begin a batch; none when nothing came in half a second.

        Raises ClientBroken.
        """
        client = self._client
        if client is None:
            raise ClientBroken("not in the group")
        if self._has_new:
            client.resume(client.assignment())
            self._has_new = False
        held, self._held = self._held, []
        messages = [m for m in held if self._owns(m)]
        if not messages:
            first = client.poll(POLL_SECONDS)
            if first is not None:
                # consume(n, t) would wait the whole t when fewer than n are there.
                messages = [first, *client.consume(size - 1, 0)]
        self._polled()
        self._gone.clear()
        return [_record(m) for m in messages if self._is_good(m) and self._owns(m)]

    def _polled(self) -> None:
        self._last_poll = time.monotonic()
        self._on_tick()

    def _is_good(self, message: Message) -> bool:
        error = message.error()
        if error is None:
            return True
        if error.fatal():
            raise ClientBroken(error.str())
        if error.code() != KafkaError._PARTITION_EOF:
            logger.warning("record not read", extra={"error_name": error.name(), "error": error.str()})
        return False

    def _owns(self, message: Message) -> bool:
        # A rebalance inside poll() may have taken the partition of a message that was fetched before.
        return (message.topic(), message.partition()) in self.owned

    def has_lost(self, record: Record) -> bool:
        """Whether the record's partition was taken away since the batch began: its new owner handles it."""
        return (record.topic, record.partition) in self._gone

    # -- rebalance -----------------------------------------------------------------------------------------------

    def _on_assign(self, _client: KafkaClient, partitions: list[TopicPartition]) -> None:
        self.owned |= {(p.topic, p.partition) for p in partitions}
        self._has_new = True
        logger.info("partitions assigned", extra={"partitions": _names(partitions)})

    def _on_revoke(self, client: KafkaClient, partitions: list[TopicPartition]) -> None:
        # It goes out ahead of the answer to the rebalance, or of leaving the group.
        self._send_offsets(client, {(p.topic, p.partition) for p in partitions})
        self._forget(partitions)
        logger.info("partitions revoked", extra={"partitions": _names(partitions)})

    def _on_lost(self, _client: KafkaClient, partitions: list[TopicPartition]) -> None:
        # Another member has them by now: committing would move its offsets.
        self._forget(partitions)
        logger.warning("partitions lost", extra={"partitions": _names(partitions)})

    def _forget(self, partitions: list[TopicPartition]) -> None:
        lost = {(p.topic, p.partition) for p in partitions}
        self.owned -= lost
        self._gone |= lost
        self._held = [m for m in self._held if (m.topic(), m.partition()) not in lost]
        for topic, partition in lost:
            self._done.pop((topic, partition), None)
            metrics.CONSUMER_LAG.remove(self._consumer.name, topic, str(partition))

    def _on_trouble(self, error: KafkaError) -> None:
        logger.warning("broker trouble", extra={"error_name": error.name(), "error": error.str()})

    # -- offsets -------------------------------------------------------------------------------------------------

    def note_done(self, record: Record) -> None:
        """The database has what there is to do about this record and those before it."""
        if not self.has_lost(record):
            self._done[record.topic, record.partition] = record.offset + 1
            self._uncommitted.add((record.topic, record.partition))

    def commit(self) -> None:
        """Send the offsets of what is done, without waiting: a broker that is frozen must not freeze us.

        One request is under way at a time: a broker takes longer for one than we may take for a batch, and the next
        one carries what has been done since. Call it in every round, also of none.
        """
        if self._client is not None and self._uncommitted and not self._is_committing:
            self._is_committing = True
            self._send_offsets(self._client, self._uncommitted)
            self._uncommitted = set()

    def _send_offsets(self, client: KafkaClient, partitions: set[Partition]) -> None:
        """Whatever fails costs a redelivery, which the processed marks absorb."""
        offsets = [TopicPartition(t, p, self._done[t, p]) for t, p in partitions if (t, p) in self._done]
        if not offsets:
            self._is_committing = False
            return
        try:
            client.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:
            self._on_commit(error.args[0], offsets)

    def _on_commit(self, error: KafkaError | None, offsets: list[TopicPartition]) -> None:
        """Called from poll() when the broker has answered."""
        self._is_committing = False
        errors = [error, *(offset.error for offset in offsets)]
        if failed := next((e for e in errors if e is not None), None):
            logger.warning("offsets not committed", extra={"error": failed.str()})

    # -- waiting -------------------------------------------------------------------------------------------------

    def breathe(self) -> None:
        """Between events: poll often enough to show life and to stay in the group. Raises as `wait()` does."""
        if time.monotonic() - self._last_poll > BREATH_SECONDS:
            self.wait(0)

    def wait(self, seconds: float) -> None:
        """Wait without leaving the group: partitions are paused and polling goes on.

        Raises Stopping when told to stop, ClientBroken when the client fails.
        """
        deadline = time.monotonic() + seconds
        try:
            self._pause()
            try:
                while True:
                    if self.stopping:
                        raise Stopping
                    self._poll_paused(min(max(deadline - time.monotonic(), 0), POLL_SECONDS))
                    if time.monotonic() >= deadline:
                        return
            finally:
                if self._client is not None:
                    self._client.resume(self._client.assignment())
        except KafkaException as error:
            raise ClientBroken(str(error)) from error

    def _pause(self) -> None:
        if self._client is not None:
            self._client.pause(self._client.assignment())

    def _poll_paused(self, seconds: float) -> None:
        if self._client is None:
            time.sleep(seconds)
        elif (message := self._client.poll(seconds)) is not None and self._is_good(message):
            self._held.append(message)  # of a partition that was assigned during the wait
            self._pause()
        self._polled()

    # -- lag -----------------------------------------------------------------------------------------------------

    def measure_lag(self) -> None:
        """Set the lag of our partitions, from what the client knows without asking the broker."""
        if self._client is None or not self.owned or time.monotonic() - self._last_lag < LAG_SECONDS:
            return
        self._last_lag = time.monotonic()
        for position in self._client.position([TopicPartition(t, p) for t, p in sorted(self.owned)]):
            _, high = self._client.get_watermark_offsets(position, cached=True)
            if position.offset >= 0 and high >= 0:
                metrics.CONSUMER_LAG.labels(self._consumer.name, position.topic, str(position.partition)).set(
                    max(high - position.offset, 0)
                )


def _names(partitions: Sequence[TopicPartition]) -> list[str]:
    return [f"{p.topic}/{p.partition}" for p in partitions]


# The client returns a result *and* leaves an exception behind when a header's name is not UTF-8. A direct call, once
# the interpreter has specialised it, does not look for one, and the next call of anything raises; this always looks.
_headers_of = operator.methodcaller("headers")


def _record(message: Message) -> Record:
    try:
        headers = cast("list[tuple[str, bytes | None]]", _headers_of(message) or [])
    except (SystemError, UnicodeDecodeError):
        headers = []  # a name that is not UTF-8: the client cannot show them, but key and value are there
    # A consumed message has a place; only its type allows for one that has none.
    return Record(
        topic=message.topic() or "",
        partition=cast(int, message.partition()),
        offset=cast(int, message.offset()),
        key=message.key(),
        value=message.value(),
        headers=headers,
        timestamp_ms=message.timestamp()[1],
    )
