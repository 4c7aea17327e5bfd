"""Membership of a consumer group: polling, what is ours, what is done, and waiting without being thrown out.

Two threads use the client, one at a time. The consumer's own polls between its batches and while it waits. While it
handles a batch, a caretaker polls in its place with all partitions paused, so that a handler may take longer than
`max.poll.interval.ms` and rebalances go on meanwhile.
"""

import logging
import operator
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from typing import cast

from monitoring import metrics, shared_files

from .conf import outbox_settings
from .handlers import Consumer
from .kafka import Consumer as KafkaClient
from .kafka import (
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
    can_be_reached,
    make_consumer,
    starting_offsets,
)
from .records import Headers, Record

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
CARE_SECONDS = 0.25
BREATH_SECONDS = 1.0
COMMIT_AGAIN_SECONDS = 1.0
LEAVE_SECONDS = 5.0
LAG_SECONDS = 2.0
TROUBLE_SECONDS = 10.0

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
        # Whoever holds it may use the client and change what is below. Callbacks come from poll(), so they hold it.
        self._lock = threading.RLock()
        self._client: KafkaClient | None = None
        self._broken: Exception | None = None
        # Partitions lost since the batch began. One that comes back begins again at its committed offset, so the
        # batch must leave it alone: its own idea of what is done there would run ahead of that.
        self._gone: set[Partition] = set()
        self._done: dict[Partition, int] = {}
        self._done_at_ms: dict[Partition, int] = {}
        self._uncommitted: set[Partition] = set()
        self._is_committing = False
        self._commit_after = 0.0
        # A partition that was taken away while it was paused is still paused when it comes back.
        self._is_paused = False
        self._held: list[Record] = []
        self._trouble_at: float | None = None
        self._trouble = ""
        self._busy_since: float | None = None
        self._left = threading.Event()
        self._caretaker: threading.Thread | None = None
        self._last_poll = self._last_lag = 0.0

    def join(self) -> None:
        """Make a client and subscribe. Raises ImproperlyConfigured when librdkafka refuses the settings."""
        self._client = make_consumer(self._consumer.group_id, self._on_trouble, self._on_commit)
        self._client.subscribe(
            self._consumer.topics, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
        )
        self._left.clear()
        # In a copy of this thread's context: its log lines are the consumer's.
        care = copy_context().run
        self._caretaker = threading.Thread(target=care, args=(self._take_care,), name="caretaker", daemon=True)
        self._caretaker.start()

    def leave(self) -> None:
        """Leave the group. A broker that is frozen is not waited for: it drops the member by itself."""
        self._left.set()
        if self._caretaker is not None:
            self._caretaker.join()
        if self._client is not None:
            leaving = threading.Thread(target=self._client.close, name="leave-group", daemon=True)
            leaving.start()
            leaving.join(LEAVE_SECONDS)
        self._caretaker = self._client = self._broken = self._trouble_at = None
        self.owned.clear()
        self._done.clear()
        self._done_at_ms.clear()
        self._held.clear()
        self._uncommitted.clear()
        self._is_committing = self._is_paused = False

    def poll_batch(self, size: int) -> list[Record]:
        """Return the next records, at most `size`, and begin a batch; none when nothing came in half a second.

        Raises ClientBroken.
        """
        with self._lock:
            self._check_client()
            client = self._client
            if client is None:
                raise ClientBroken("not in the group")
            if self._is_paused:
                client.resume(client.assignment())
                self._is_paused = False
            records, self._held = self._held or self._fetch(client, size), []
            # Only now: a partition that was lost and came back meanwhile is ours, and these are its records.
            self._gone.clear()
            self._polled()
            return [record for record in records if (record.topic, record.partition) in self.owned]

    def _fetch(self, client: KafkaClient, size: int) -> list[Record]:
        first = client.poll(POLL_SECONDS)
        if first is None:
            self._look_for_broker(client)
            return []
        self._trouble_at = None
        self._gone.clear()
        messages = client.consume(size - 1, 0)  # consume(n, t) would wait the whole t when fewer than n are there
        if (first.topic(), first.partition()) not in self._gone:  # else it comes again, to whoever has the partition
            messages.insert(0, first)
        return [_record(message) for message in messages if self._is_good(message)]

    def put_back(self, records: Sequence[Record]) -> None:
        """Let the next batch begin with those of the records that are neither done nor lost."""
        with self._lock:
            undone = [
                r for r in records if not self.has_lost(r) and r.offset >= self._done.get((r.topic, r.partition), 0)
            ]
            self._held = undone + self._held

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

    def has_lost(self, record: Record) -> bool:
        """Whether the record's partition was taken away since the batch began: its new owner handles it."""
        return (record.topic, record.partition) in self._gone

    def _check_client(self) -> None:
        if self._broken is not None:
            raise ClientBroken(str(self._broken)) from self._broken

    # -- rebalance -----------------------------------------------------------------------------------------------

    def _on_assign(self, client: KafkaClient, partitions: list[TopicPartition]) -> None:
        self._is_paused = True  # maybe it was when it was ours before
        if self._consumer.start_at != "earliest":
            try:
                self._begin_at(client, partitions)
            except KafkaException as error:
                self._broken = error  # to begin anywhere else could leave events out
                return
        self.owned |= {(p.topic, p.partition) for p in partitions}
        logger.info("partitions assigned", extra={"partitions": _names(partitions)})

    def _begin_at(self, client: KafkaClient, partitions: list[TopicPartition]) -> None:
        """Begin where `start_at` says in partitions of which the group has committed nothing, and commit that.

        Else a group that begins at the latest, and is restarted before it has handled anything, would leave out what
        came in between.
        """
        starts = starting_offsets(client, partitions, self._consumer.start_at)
        client.incremental_assign([starts.get((p.topic, p.partition), p) for p in partitions])
        self._done.update({partition: start.offset for partition, start in starts.items()})
        self._uncommitted |= set(starts)

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
        self._held = [record for record in self._held if (record.topic, record.partition) not in lost]
        self._uncommitted -= lost
        for topic, partition in lost:
            self._done.pop((topic, partition), None)
            self._done_at_ms.pop((topic, partition), None)
            for gauge in (metrics.CONSUMER_LAG, metrics.CONSUMER_LAG_SECONDS):
                shared_files.forget(gauge, self._consumer.name, topic, str(partition))

    # -- trouble -------------------------------------------------------------------------------------------------

    def _on_trouble(self, error: KafkaError) -> None:
        self._trouble_at = self._trouble_at or time.monotonic()
        self._trouble = error.str()
        logger.warning("broker trouble", extra={"error_name": error.name(), "error": error.str()})

    @property
    def trouble(self) -> str:
        """What the client says of a broker that it does not reach; empty when nothing is known to be wrong."""
        return "" if self._trouble_at is None else self._trouble

    def _look_for_broker(self, client: KafkaClient) -> None:
        """Raise ClientBroken when our client does not find the broker again and another one does.

        librdkafka can lose a single broker for good when that was restarted or frozen.
        """
        if self._trouble_at is None or time.monotonic() - self._trouble_at < TROUBLE_SECONDS:
            return
        try:
            client.list_topics(timeout=2.0)
        except KafkaException as error:
            if can_be_reached():
                raise ClientBroken(f"lost a broker that is there: {error}") from error
            self._trouble_at = time.monotonic()
        else:
            self._trouble_at = None

    # -- offsets -------------------------------------------------------------------------------------------------

    def note_done(self, records: Sequence[Record]) -> None:
        """The database has what there is to do about these records and those before them."""
        last = {(record.topic, record.partition): record for record in records}
        with self._lock:
            for partition, record in last.items():
                if partition not in self._gone:
                    self._done[partition] = record.offset + 1
                    self._done_at_ms[partition] = record.timestamp_ms
                    self._uncommitted.add(partition)

    def commit(self) -> None:
        """Send the offsets of what is done, without waiting: a broker that is frozen must not freeze us.

        One request is under way at a time: a broker takes longer for one than we may take for a batch, and the next
        one carries what has been done since. Call it in every round, also of none.
        """
        with self._lock:
            is_due = bool(self._uncommitted) and time.monotonic() >= self._commit_after
            if self._client is not None and is_due and not self._is_committing:
                self._is_committing = True
                partitions, self._uncommitted = self._uncommitted, set()
                self._send_offsets(self._client, partitions)

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
            # Again soon: where nothing more comes, they would stay behind, and the group's lag with them.
            self._uncommitted |= {(o.topic, o.partition) for o in offsets} & self.owned
            self._commit_after = time.monotonic() + COMMIT_AGAIN_SECONDS

    # -- staying in the group ------------------------------------------------------------------------------------

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While the block handles events, the caretaker polls, for at most BATCH_TIMEOUT_SECONDS."""
        self._busy_since = time.monotonic()
        try:
            yield
        finally:
            self._busy_since = None

    def check(self) -> None:
        """Between events: raise Stopping when told to stop, ClientBroken when the client failed."""
        if self.stopping:
            raise Stopping
        self._check_client()

    def _take_care(self) -> None:
        """The caretaker: poll for a consumer that is busy, so that it stays in the group and partitions can move."""
        while not self._left.wait(CARE_SECONDS):
            if not self._lock.acquire(blocking=False):
                continue  # the consumer's own thread is polling
            try:
                busy_since, now = self._busy_since, time.monotonic()
                if busy_since is None or now - self._last_poll < BREATH_SECONDS or self._broken:
                    continue
                if now - busy_since < outbox_settings().BATCH_TIMEOUT_SECONDS:
                    self._poll_paused(0)
                # After that it may never end. The group drops us, and /livez tells.
            except (KafkaException, ClientBroken) as error:
                self._broken = error
            finally:
                self._lock.release()

    def wait(self, seconds: float) -> None:
        """Wait without leaving the group: partitions are paused and polling goes on.

        Raises Stopping when told to stop, ClientBroken when the client fails.
        """
        deadline = time.monotonic() + seconds
        try:
            while True:
                self.check()
                with self._lock:
                    self._poll_paused(min(max(deadline - time.monotonic(), 0), POLL_SECONDS))
                if time.monotonic() >= deadline:
                    return
        except KafkaException as error:
            raise ClientBroken(str(error)) from error

    def _poll_paused(self, seconds: float) -> None:
        if self._client is None:
            time.sleep(seconds)
        else:
            self._client.pause(self._client.assignment())
            self._is_paused = True
            message = self._client.poll(seconds)
            if message is not None and self._is_good(message):
                self._held.append(_record(message))  # of a partition that was assigned during the wait
        self._polled()

    # -- lag -----------------------------------------------------------------------------------------------------

    def measure_lag(self) -> None:
        """Set the lag of our partitions, from what the client knows without asking the broker.

        In seconds it is the age of the last event that was handled, while later ones wait.
        """
        if self._client is None or not self.owned or time.monotonic() - self._last_lag < LAG_SECONDS:
            return
        self._last_lag = time.monotonic()
        with self._lock:
            for position in self._client.position([TopicPartition(t, p) for t, p in sorted(self.owned)]):
                _, high = self._client.get_watermark_offsets(position, cached=True)
                partition = (position.topic, position.partition)
                offset = self._done.get(partition, position.offset)
                if offset < 0 or high < 0:
                    continue
                labels = (self._consumer.name, position.topic, str(position.partition))
                lag = max(high - offset, 0)
                metrics.CONSUMER_LAG.labels(*labels).set(lag)
                done_at_ms = self._done_at_ms.get(partition)
                if lag == 0:
                    metrics.CONSUMER_LAG_SECONDS.labels(*labels).set(0)
                elif done_at_ms is not None and done_at_ms > 0:
                    metrics.CONSUMER_LAG_SECONDS.labels(*labels).set(max(time.time() - done_at_ms / 1000, 0))


def _names(partitions: Sequence[TopicPartition]) -> list[str]:
    return [f"{p.topic}/{p.partition}" for p in partitions]


# The client returns a result *and* leaves an exception behind when a header's name is not UTF-8. A direct call, once
# the interpreter has specialised it, does not look for one, and the next call of anything raises; this always looks.
_headers_of = operator.methodcaller("headers")


def _headers(message: Message) -> Headers:
    try:
        return cast(Headers, _headers_of(message) or ())
    except (SystemError, UnicodeDecodeError):
        return ()  # a name that is not UTF-8: the client cannot show them, but key and value are there


def _record(message: Message) -> Record:
    # A consumed message has a place; only its type allows for one that has none.
    return Record(
        message.topic() or "",
        cast(int, message.partition()),
        cast(int, message.offset()),
        message.key(),
        message.value(),
        partial(_headers, message),
        message.timestamp()[1],
    )
