"""An independent reader of topics: a plain client with assign(), no group, no code of ours."""

import time

from confluent_kafka import Consumer, KafkaException, TopicPartition

TOPICS = ("conversation.events", "default.events", "document.events", "identity.events")


class TopicReader:
    """Reads what comes into the topics after it was made, or from their start."""

    def __init__(self, bootstrap_servers, topics=TOPICS, *, from_start=False, group_id="tests"):
        self._settings = {
            "bootstrap.servers": bootstrap_servers, "group.id": group_id, "enable.auto.commit": False,
            "fetch.wait.max.ms": 50, "reconnect.backoff.max.ms": 200, "log_level": 0
        }  # fmt: skip
        self._client = Consumer(self._settings)
        partitions = [
            TopicPartition(topic, partition)
            for topic in topics
            for partition in self._client.list_topics(topic, timeout=30).topics[topic].partitions
        ]
        for partition in partitions:
            start, end = self._watermarks(partition)
            partition.offset = start if from_start else end
        self._client.assign(partitions)
        self._assigned = partitions
        self._starts = {(p.topic, p.partition): p.offset for p in partitions}
        self.messages = []

    def _watermarks(self, partition):
        """Start and end of a partition; a new topic's leader may not be there at once."""

        def ask():
            try:
                return self._client.get_watermark_offsets(partition, timeout=5)
            except KafkaException:
                self._renew()
                raise

        return _insist(ask)

    def _renew(self):
        """A client that has seen its only broker away may not find it again, however long it is back."""
        assigned = getattr(self, "_assigned", [])
        positions = self._client.position(assigned)
        for place in positions:
            if place.offset < 0:
                place.offset = self._starts[place.topic, place.partition]
        self._client.close()
        self._client = Consumer(self._settings)
        self._client.assign(positions)

    def read(self, count, timeout_seconds=30):
        """Return all messages since the reader was made, once there are `count`. Fails when they do not come."""
        deadline = time.monotonic() + timeout_seconds
        while len(self.messages) < count:
            assert time.monotonic() < deadline, f"{len(self.messages)} of {count} records came"
            self.messages += [m for m in self._client.consume(1000, 0.2) if m.error() is None]
        return self.messages

    def read_rest(self):
        """Return all messages since the reader was made, up to the present end of the topics."""
        for partition in self._client.position(self._assigned):
            _, end = self._watermarks(partition)
            start = partition.offset if partition.offset >= 0 else self._starts[partition.topic, partition.partition]
            if end > start:
                self._read_to(partition, end)
        return self.messages

    def _read_to(self, partition, end, timeout_seconds=30):
        deadline = time.monotonic() + timeout_seconds
        while self._client.position([partition])[0].offset < end:
            assert time.monotonic() < deadline, f"{partition.topic} not read to its end"
            self.messages += [m for m in self._client.consume(1000, 0.2) if m.error() is None]

    def commit_start(self):
        """Commit the offsets at which this reader started, for its group, once its last member is gone."""
        _insist(lambda: self._client.commit(offsets=self._assigned, asynchronous=False))

    def close(self):
        self._client.close()


def _insist(request, timeout_seconds=60):
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            return request()
        except KafkaException:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
