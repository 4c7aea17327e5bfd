"""A consumer's group and a topic of its own, moved by plain clients: no code of ours."""

import random
import time
from contextlib import contextmanager

from confluent_kafka import Consumer as Client
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from events_outbox import Consumer, handlers


class ConsumerGroup:
    """A registered consumer that nobody runs, with an empty topic of two partitions. Needs Apache Kafka."""

    def __init__(self, bootstrap_servers, partitions=2):
        self.name = f"test-{random.randrange(10**9)}"
        self.topic = f"{self.name}.events"
        self.partitions = partitions
        self._settings = {"bootstrap.servers": bootstrap_servers, "log_level": 0, "reconnect.backoff.max.ms": 200}
        self._admin = AdminClient(self._settings)
        self._done(self._admin.create_topics([NewTopic(self.topic, num_partitions=partitions, replication_factor=1)]))
        self.consumer = Consumer(self.name, group_id=self.name, topics=[self.topic])

    def close(self):
        handlers._consumers.pop(self.name, None)

    def write(self, partition, count, age_seconds=0):
        """Write records that are so old, in one batch."""
        producer = Producer({**self._settings, "linger.ms": 50})
        written_ms = int((time.time() - age_seconds) * 1000)
        for number in range(count):
            producer.produce(self.topic, str(number), partition=partition, timestamp=written_ms)
        assert producer.flush(30) == 0

    def drop_before(self, partition, offset):
        """As retention does."""
        self._done(self._admin.delete_records([TopicPartition(self.topic, partition, offset)]))

    def commit(self, *offsets):
        """Commit an offset for each partition; None for none."""
        with self._client() as client:
            places = [TopicPartition(self.topic, n, offset) for n, offset in enumerate(offsets) if offset is not None]
            client.commit(offsets=places, asynchronous=False)

    def committed(self):
        with self._client() as client:
            found = client.committed([TopicPartition(self.topic, n) for n in range(self.partitions)], 10)
            return [place.offset if place.offset >= 0 else None for place in found]

    @contextmanager
    def member(self, client_id):
        """Somebody who has joined the group and has all partitions."""
        with self._client(**{"client.id": client_id}) as client:
            client.subscribe([self.topic])
            deadline = time.monotonic() + 30
            while len(client.assignment()) < self.partitions:
                assert time.monotonic() < deadline, "not assigned in time"
                client.poll(0.05)
            yield client

    @contextmanager
    def _client(self, **settings):
        client = Client({**self._settings, "group.id": self.name, "enable.auto.commit": False, **settings})
        try:
            yield client
        finally:
            client.close()

    def _done(self, futures):
        for future in futures.values():
            future.result(timeout=30)
