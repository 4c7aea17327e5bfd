"""What the parts are made of: databases with an outbox in them, jobs and relays as processes, the broker."""

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any

import psutil
import psycopg
from confluent_kafka import Consumer, ConsumerGroupState, Message, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from tests.benchmarks.services import Services
from voicehelper.services import BASE_DIR

TOPICS = ("conversation.events", "default.events", "document.events", "identity.events")
OUTBOX = "events_outbox_outboxevent"
COLUMNS = """event_type, event_version, aggregate_id, tenant_id, topic, correlation_id,
             traceparent, tracestate, baggage, value"""
CHUNK = 50_000


@dataclass(frozen=True)
class Scale:
    """How much is measured. `--quick` shows that all parts work, and nothing about speed."""

    rounds: int = 5
    events: int = 200_000
    few_events: int = 2_000
    published_rows: int = 5_000_000
    published_rows_small: int = 100_000
    latency_rate: int = 500
    latency_seconds: int = 10
    memory_events: int = 1_000_000
    idle_seconds: int = 10
    emits: int = 1_000
    bulk_emits: int = 20
    traffic_events: int = 50_000
    consumed_events: int = 100_000
    consumed_singly: int = 20_000
    consumed_waiting: int = 6_000
    redelivered_events: int = 1_000_000
    processed_rows: int = 10_000_000
    recordings: int = 100_000
    requests: int = 5_000
    series: int = 10_000
    admin_rows: int = 10_000_000
    service_turns: int = 15
    service_seconds: int = 4
    warm_up_events: int = 5_000
    warm_up_rounds: int = 20


FULL = Scale()
QUICK = Scale(
    rounds=1,
    events=4_000,
    few_events=200,
    published_rows=20_000,
    published_rows_small=2_000,
    latency_rate=100,
    latency_seconds=2,
    memory_events=20_000,
    idle_seconds=2,
    emits=50,
    bulk_emits=2,
    traffic_events=2_000,
    consumed_events=4_000,
    consumed_singly=1_000,
    consumed_waiting=300,
    redelivered_events=6_000,
    processed_rows=20_000,
    recordings=5_000,
    requests=200,
    series=1_000,
    admin_rows=300_000,
    service_turns=1,
    service_seconds=2,
    warm_up_events=200,
    warm_up_rounds=1,
)


class Bench:
    """One run: its services and its scale."""

    def __init__(self, services: Services, scale: Scale, say: Callable[[str], None]) -> None:
        self.services = services
        self.scale = scale
        self.say = say
        self.bootstrap_servers = services.kafka.bootstrap_servers
        self._template_url = services.postgres.url
        self._databases = 0
        self.manage(self._template_url, "migrate", "--verbosity", "0")
        self.manage(self._template_url, "create_topics")
        self._topic_reader = Consumer(
            {
                "bootstrap.servers": self.bootstrap_servers,
                "group.id": "bench",
                "enable.auto.commit": False,
                "log_level": 0,
            }
        )

    # Processes

    def call(
        self,
        job: Callable[..., Any],
        *,
        url: str | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
        **arguments: Any,
    ) -> Any:
        """Run a function of a part in a fresh process, on the database at `url`, and return what it returned."""
        name = f"{job.__module__}:{job.__qualname__}"
        log_path = self.services.data_dir / f"job.{threading.get_ident()}.log"  # jobs may run beside each other
        with log_path.open("wb") as log:
            result = subprocess.run(
                [sys.executable, "-m", "tests.benchmarks.job", name, json.dumps(arguments)],
                cwd=BASE_DIR,
                env={**self._environment(url), **environment},
                stdout=subprocess.PIPE,
                stderr=log,
            )
        if result.returncode:
            raise RuntimeError(f"{name} failed:\n{log_path.read_text(errors='replace')[-3000:]}")
        return json.loads(result.stdout.splitlines()[-1])

    def manage(self, url: str, *arguments: str) -> None:
        command = [sys.executable, "manage.py", *arguments]
        log = self.services.log
        subprocess.run(command, cwd=BASE_DIR, env=self._environment(url), stdout=log, stderr=log, check=True)

    @contextmanager
    def relay(self, url: str, *arguments: str) -> Iterator[psutil.Process]:
        """A relay as it is deployed; yielded once it leads."""
        with self._deployed(url, "relay_outbox", *arguments) as process:
            with psycopg.connect(url, autocommit=True) as connection:
                wait_until(lambda: _relay_leads(connection) or process.poll() is not None)
            yield psutil.Process(process.pid)

    @contextmanager
    def consumer(self, url: str, name: str, **environment: str) -> Iterator[psutil.Process]:
        """A consumer of `event_handlers.py` as it is deployed; yielded once it has its partitions. Its group's id is
        its name."""
        settings = "tests.benchmarks.settings"
        with self._deployed(url, "consume", name, DJANGO_SETTINGS_MODULE=settings, **environment) as process:
            self.wait_for_members(name, 1)
            yield psutil.Process(process.pid)

    @contextmanager
    def web_server(self, url: str, **environment: str) -> Iterator[psutil.Process]:
        """gunicorn as it is deployed."""
        gunicorn = ["-m", "gunicorn", "--config=voicehelper/gunicorn.conf.py", "voicehelper.wsgi"]
        with self._running([sys.executable, *gunicorn], url, **environment) as process:
            yield psutil.Process(process.pid)

    def _deployed(
        self, url: str, *arguments: str, **environment: str
    ) -> AbstractContextManager[subprocess.Popen[bytes]]:
        return self._running([sys.executable, "manage.py", *arguments], url, **environment)

    @contextmanager
    def _running(self, command: Sequence[str], url: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        log = self.services.log
        environment = {**self._environment(url), **environment}
        process = subprocess.Popen(command, cwd=BASE_DIR, env=environment, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _environment(self, url: str | None) -> dict[str, str]:
        return {**os.environ, "DATABASE_URL": url or self._template_url}

    # Databases

    @contextmanager
    def database(self) -> Iterator["Outbox"]:
        """A migrated database, empty, and dropped in the end."""
        self._databases += 1
        name = f"bench_{self._databases}"
        with psycopg.connect(self._template_url.rpartition("/")[0] + "/postgres", autocommit=True) as server:
            template = self._template_url.rpartition("/")[2]
            server.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
            url = self._template_url.rpartition("/")[0] + f"/{name}"
            try:
                with psycopg.connect(url, autocommit=True) as connection:
                    yield Outbox(self, url, connection)
            finally:
                server.execute(f"DROP DATABASE {name} WITH (FORCE)")

    # Broker

    def ends(self, topics: Sequence[str] = TOPICS) -> dict[tuple[str, int], int]:
        """Where each partition ends now."""
        described = self._topic_reader.list_topics(timeout=30).topics
        return {
            (topic, partition): self._topic_reader.get_watermark_offsets(TopicPartition(topic, partition), timeout=30)[
                1
            ]
            for topic in topics
            for partition in described[topic].partitions
        }

    def count_since(self, before: dict[tuple[str, int], int]) -> int:
        """How many records came since `before`, to the same topics."""
        now = self.ends(sorted({topic for topic, _ in before}))
        return sum(now.values()) - sum(before.values())

    def wait_for_records(self, before: dict[tuple[str, int], int], count: int, timeout_seconds: float = 60) -> None:
        """Return when so many records have come since `before`."""
        wait_until(lambda: self.count_since(before) >= count, timeout_seconds)

    def records_since(self, before: dict[tuple[str, int], int]) -> list[Message]:
        """The records that came since `before`, to the same topics."""
        count = self.count_since(before)
        self._topic_reader.assign([TopicPartition(topic, number, offset) for (topic, number), offset in before.items()])
        records: list[Message] = []
        while len(records) < count:
            got = self._topic_reader.consume(5000, 5.0)
            if not got:
                raise RuntimeError(f"{len(records)} of {count} records came")
            records += got
        self._topic_reader.unassign()
        return records

    @contextmanager
    def topic(self) -> Iterator[str]:
        """A topic of its own, removed in the end."""
        name = f"bench.{uuid.uuid4().hex}"
        admin = self.admin()
        admin.create_topics([NewTopic(name, num_partitions=6)])[name].result(timeout=30)
        try:
            yield name
        finally:
            admin.delete_topics([name])[name].result(timeout=30)

    def wait_for_members(self, group_id: str, count: int) -> None:
        """Return when the group has so many members and each has partitions."""
        admin = self.admin()

        def are_there() -> bool:
            group = admin.describe_consumer_groups([group_id], request_timeout=30)[group_id].result()
            assigned = [member.assignment and member.assignment.topic_partitions for member in group.members]
            return group.state == ConsumerGroupState.STABLE and len(assigned) == count and all(assigned)

        wait_until(are_there)

    def begin_at_end(self, group_id: str) -> None:
        """Commit the topics' ends as the group's offsets: it is to leave alone what earlier parts published."""
        client = Consumer({"bootstrap.servers": self.bootstrap_servers, "group.id": group_id, "log_level": 0})
        offsets = [TopicPartition(topic, number, end) for (topic, number), end in self.ends().items()]
        client.commit(offsets=offsets, asynchronous=False)
        client.close()

    def log_bytes(self, topics: Sequence[str] = TOPICS) -> int:
        """Bytes of these topics' records on the broker's disk: their log segments, without the indexes."""
        log_dir = self.services.kafka.data_dir / "log"
        return sum(file.stat().st_size for topic in topics for file in log_dir.glob(f"{topic}-*/*.log"))

    def admin(self) -> AdminClient:
        return AdminClient({"bootstrap.servers": self.bootstrap_servers})

    def broker_cpu_seconds(self) -> float:
        assert self.services.kafka.process
        return cpu_seconds(psutil.Process(self.services.kafka.process.pid))


class Outbox:
    """One database. `place(name)` is a moment: what was added since can be drained again and again."""

    def __init__(self, bench: Bench, url: str, connection: psycopg.Connection[Any]) -> None:
        self._bench = bench
        self.url = url
        self.connection = connection
        self._seeds = 0
        self._places: dict[str, str] = {}
        self._added_since: dict[str, int] = {}

    def seed(self, count: int) -> None:
        """Emit so many genuine events, through emit_events()."""
        self._bench.call(emit_traffic, url=self.url, count=count)
        self._seeds = count
        self._count(count)

    def add_published(self, count: int) -> None:
        """Add rows with the frozen transaction id, which every snapshot sees: published long ago.

        Copies of the conversation.created events, the smallest ones, with keys of their own in ascending order.
        """
        self._add(count, "event_type = 'conversation.created'", "'2'::xid8", "uuidv7()::text")

    def add_pending(self, count: int) -> None:
        """Add rows that are to be published: copies of the seeds, in their order, with event ids of their own.

        The copies of a seed share its value, and so does a baseline; they are too far apart to share a batch.
        """
        self._add(count, "true", "pg_current_xact_id()", "aggregate_id")
        self._count(count)

    def _count(self, added: int) -> None:
        self._added_since = {name: count + added for name, count in self._added_since.items()}

    def _add(self, count: int, which: str, transaction_id: str, aggregate_id: str) -> None:
        sql = f"""
            WITH seeds AS (SELECT * FROM {OUTBOX} WHERE id <= %(seeds)s AND {which}),
                 copies AS (SELECT * FROM seeds, generate_series(0, %(count)s / (SELECT count(*) FROM seeds)) copy
                             ORDER BY copy, id LIMIT %(count)s)
            INSERT INTO {OUTBOX} (transaction_id, event_id, created_at, {COLUMNS})
            SELECT {transaction_id}, uuidv7(), now(), {COLUMNS.replace("aggregate_id", aggregate_id)} FROM copies"""
        for start in range(0, count, CHUNK):
            self.connection.execute(sql, {"count": min(CHUNK, count - start), "seeds": self._seeds})

    def megabytes(self) -> float:
        """What the table and its indexes take."""
        return self.connection.execute("SELECT pg_total_relation_size(%s)", [OUTBOX]).fetchall()[0][0] / 1e6

    def settle(self) -> None:
        """What autovacuum would do sooner or later, and then in the midst of a run."""
        self.connection.execute(f"VACUUM (ANALYZE) {OUTBOX}")
        self.connection.execute("CHECKPOINT")

    def place(self, name: str) -> None:
        """Remember this moment: what is there now counts as published when the relay starts from here."""
        self._added_since[name] = 0
        self._places[name] = self.connection.execute("SELECT pg_current_snapshot()::text").fetchall()[0][0]

    def rewind(self, name: str) -> None:
        """Put the relay's cursor to that moment."""
        self.connection.execute("VACUUM events_outbox_relaycursor")
        self.connection.execute(
            """UPDATE events_outbox_relaycursor
                  SET published = %s, "window" = NULL, window_last_id = 0,
                      system_identifier = (SELECT system_identifier FROM pg_control_system())""",
            [self._places[name]],
        )

    def snapshot(self, name: str) -> str:
        return self._places[name]

    def fill(self, pending: int, *, published: int = 0, last: int = 0) -> None:
        """Seeds, published rows, then `pending` rows after the place "all", the last ones after "last"."""
        seeds = min(4_000, max(200, pending // 10))
        self.seed(seeds)
        self.add_published(max(0, published - seeds))
        self.place("all")
        self.add_pending(pending - last)
        self.place("last")
        self.add_pending(last)
        self.settle()

    def drain(self, name: str, batch_size: int | None = None) -> "Drain":
        """Let a relay publish what was added since that moment, in a process of its own."""
        count = self._added_since[name]
        self.rewind(name)
        before = self._bench.ends()
        result = self._bench.call(drain, url=self.url, batch_size=batch_size)
        published = self._bench.count_since(before)
        if published != count:
            raise RuntimeError(f"the relay published {published} events instead of {count}")
        return Drain(count, **result)


@dataclass(frozen=True)
class Drain:
    """How a number of events went out. `seconds`: what `Relay.run()`, or a bare producer, took for all of it."""

    count: int
    seconds: float
    cpu_seconds: float

    def rate(self, start_seconds: float) -> float:
        """Events per second, without the start."""
        return self.count / max(self.seconds - start_seconds, 0.001)  # in a smoke run the start may be all there is


def start_of(few: Sequence[Drain], many: Sequence[Drain]) -> float:
    """Seconds of the start, which drains of few events and of many have in common; the medians count.

    Every new producer, the relay's or a bare one, waits 0.5 s for its id (a timer of librdkafka): left in, it would
    make any two look alike. The *baseline's* start is taken off both, so that what else costs a relay time counts.
    """
    (few_seconds, few_count), (many_seconds, many_count) = (
        (statistics.median(drain.seconds for drain in drains), statistics.median(drain.count for drain in drains))
        for drains in (few, many)
    )
    return max(few_seconds - few_count * (many_seconds - few_seconds) / (many_count - few_count), 0.0)


def cpu_us(drains: Sequence[Drain]) -> float:
    """CPU time an event of the process that drains, in microseconds; its start is part of it."""
    return statistics.median(drain.cpu_seconds / drain.count for drain in drains) * 1e6


def drain(batch_size: int | None) -> dict[str, float]:
    """Job: `Relay.run(until_empty=True)`, whole: session, lead, producer, publishing, cursor, last look."""
    from events_outbox.relay import Relay

    relay = Relay(batch_size=batch_size)
    started, started_cpu = time.perf_counter(), time.process_time()
    relay.run(until_empty=True)
    return {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - started_cpu}


def emit_traffic(count: int) -> None:
    """Job: emit so many events of realistic traffic, and make the cursor that `rewind()` moves."""
    from django.db import transaction

    from events_outbox import emit_events
    from events_outbox.models import RelayCursor
    from tests.benchmarks.traffic import conversation_events

    RelayCursor.objects.get_or_create(id=1)
    traffic = conversation_events(count)
    while events := list(islice(traffic, 1000)):
        with transaction.atomic():
            emit_events(events)


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def wait_until(condition: Callable[[], bool], timeout_seconds: float = 60) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {timeout_seconds:.0f} s")
        time.sleep(0.02)


def _relay_leads(connection: psycopg.Connection[Any]) -> bool:
    return bool(
        connection.execute(
            """SELECT 1 FROM pg_locks JOIN pg_database d ON d.oid = database
                WHERE locktype = 'advisory' AND granted AND datname = current_database()"""
        ).fetchone()
    )
