"""The fault harness with consumers: what the writers commit and relays publish is handled, and the effects are judged.

    writers --> PostgreSQL --> relays --> Kafka --proxy--> members of two consumers --proxy--> PostgreSQL

The consumers and their handlers are those of `tests.faults.effects`. In the end the table `effect` is compared with
the writers' ledger: every event once, in the order of its key, or a dead letter if it was meant to fail.
"""

import re
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import psutil
import psycopg
from confluent_kafka import Consumer, KafkaException, TopicPartition

from events_outbox.proto.base_event_pb2 import BaseEvent
from tests.faults import harness as faults
from tests.faults.effects import fates
from tests.faults.effects.fates import CONSUMERS
from tests.faults.harness import FAULTS, MEMBERS, Harness, see_it_end, wait_until
from tests.faults.settings import SESSION_TIMEOUT_MS
from tests.outbox_writers import Ledger, Violations, Written, compare
from tests.topics import TopicReader
from voicehelper.devstack.child import Child
from voicehelper.services import BASE_DIR

MEMBER_MEMORY_BYTES = 250_000_000
MOST_MEMBERS = 4
MEMBER_BATCH_SIZE = 50
EMITTED, FURTHER = "conversation.created", "notification.created"
"""What the writers emit, and what the handlers do."""
HANDLED = {"skipping": [EMITTED, FURTHER], "parking": [EMITTED]}
TOPICS = ("conversation.events", "default.events")

OUTBOX, MARKS = "events_outbox_outboxevent", "events_outbox_processedevent"
LETTERS, EFFECTS = "events_outbox_deadletter", "effect"
TABLES = (OUTBOX, MARKS, LETTERS, EFFECTS)

UNHANDLED_SQL = """
    SELECT count(*) FROM events_outbox_outboxevent o
     WHERE o.id > %s AND o.event_type = ANY(%s)
       AND NOT EXISTS (SELECT FROM events_outbox_processedevent p WHERE p.consumer = %s AND p.event_id = o.event_id)"""
MARKS_SQL = (
    "SELECT event_id::text, xmin::text::bigint FROM events_outbox_processedevent WHERE consumer = %s AND id > %s"
)
LETTERS_SQL = """
    SELECT event_id::text, reason, id FROM events_outbox_deadletter
     WHERE consumer = %s AND id > %s AND resolution = '' ORDER BY id"""


class Member(Child):
    """A process of `manage.py consume`. What it logs is kept in a file."""

    def __init__(self, number, consumer, log_dir, environment, batch_size):
        self.consumer = consumer
        self.log = log_dir / f"{consumer}-{number}.log"
        with self.log.open("wb") as log:
            command = [sys.executable, "manage.py", "consume", consumer, "--batch-size", str(batch_size)]
            super().__init__(f"{consumer} {number}", command, output=log.fileno(), env=environment, stop_seconds=20)
            self.start()

    @property
    def pid(self):
        return self.process.pid

    def is_assigned(self):
        return re.search(r'"partitions assigned".*"partitions":\["', self.log.read_text()) is not None


@dataclass
class Watch:
    """Looks on while a run lasts: memory of the members, and the offsets they have committed."""

    harness: "ConsumerHarness"
    peak_bytes: int = 0
    seen: list = field(default_factory=list)
    """(consumer, topic, partition, committed offset, what the database had by then as the text of a snapshot)"""

    def __enter__(self):
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_on)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _look_on(self):
        clients, last = {}, {}
        while not self._over.wait(0.05):
            for member in list(self.harness.members):
                with suppress(psutil.Error):
                    self.peak_bytes = max(self.peak_bytes, psutil.Process(member.pid).memory_info().rss)
            for consumer in CONSUMERS:
                try:
                    if consumer not in clients:
                        clients[consumer] = self.harness.group_client(consumer)
                    self._look_at_offsets(consumer, clients[consumer], last)
                except psycopg.Error:
                    pass
                except KafkaException:
                    clients.pop(consumer).close()  # it may have lost its only broker for good
        for client in clients.values():
            client.close()

    def _look_at_offsets(self, consumer, client, last):
        committed = client.committed(self.harness.partitions, timeout=2)
        # Asked afterwards: it has what was committed before those offsets were.
        ((snapshot,),) = self.harness.query("SELECT pg_current_snapshot()::text")
        for place in committed:
            key = consumer, place.topic, place.partition
            if place.error is None and place.offset >= 0 and last.get(key) != place.offset:
                last[key] = place.offset
                self.seen.append((*key, place.offset, snapshot))


class ConsumerHarness(Harness):
    """`members`: processes that run. As many of each consumer as are wanted; none in a run of the relay alone."""

    def __init__(self, directory, *, output):
        super().__init__(directory, output=output)
        self.members = []
        self._wanted_members = 0
        self._group = ""
        self.partitions = [TopicPartition(topic, number) for topic in TOPICS for number in range(6)]

    def start(self):
        super().start()
        with self.connect() as session:
            session.execute(fates.CREATE_TABLES)

    def stop(self):
        self._end_members()
        super().stop()

    def heal(self):
        for member in self.members:
            member.resume()
        super().heal()

    def supervise(self):
        """No member may end by itself either."""
        for member in self.members:
            assert member.is_running(), f"{member.name} ended: {member.log.read_text()[-3000:]}"
        super().supervise()
        self.set_members(self._wanted_members)

    def group_client(self, consumer):
        """A client that may ask for the group's offsets and never becomes a member."""
        return Consumer(
            {
                "bootstrap.servers": self.kafka.bootstrap_servers,
                "group.id": f"{self._group}-{consumer}",
                "enable.auto.commit": False,
                "log_level": 0,
            }
        )

    # Members

    def set_members(self, count):
        """Start or stop members, until there are `count` of each consumer."""
        self._wanted_members = count
        for consumer in CONSUMERS:
            members = self.members_of(consumer)
            leaving = members[: max(len(members) - count, 0)]
            for member in leaving:
                self.members.remove(member)
                member.ask_to_stop()
            for _ in range(count - len(members)):
                environment = self._environment(self.postgres_proxy, MEMBERS) | {"EFFECTS_GROUP": self._group}
                number = next(self._serial)
                self.members.append(Member(number, consumer, self.directory, environment, MEMBER_BATCH_SIZE))
            for member in leaving:
                see_it_end(self, member)

    def _found_groups(self):
        """New groups, which begin at the end of the topics: what was before is no business of theirs."""
        self._group = f"effects-{next(self._serial)}"
        for consumer in CONSUMERS:
            reader = TopicReader(self.kafka.bootstrap_servers, TOPICS, group_id=f"{self._group}-{consumer}")
            reader.commit_start()
            reader.close()

    def members_of(self, consumer):
        return [member for member in self.members if member.consumer == consumer]

    def one_of_each(self):
        """A member of each consumer, that has partitions if any has."""
        found = []
        for consumer in CONSUMERS:
            members = self.members_of(consumer)
            found.append(next((member for member in members if member.is_assigned()), members[0]))
        return found

    def end_members(self, members, end):
        """End some of them on purpose."""
        for member in members:
            self.members.remove(member)
            end(member)

    def _end_members(self):
        self._wanted_members = 0
        self.end_members(list(self.members), Child.kill)

    def _give_up(self):
        self._end_members()
        super()._give_up()
        self._discard_parked()

    def _discard_parked(self):
        """Keys are free again for the next run."""
        with self.connect() as session:
            session.execute("UPDATE events_outbox_deadletter SET resolution = 'discarded' WHERE resolution = ''")

    # A run

    @contextmanager
    def run(self, **options):
        """A run of the relay alone."""
        self._end_members()
        with super().run(**options) as run:
            yield run

    @contextmanager
    def consumer_run(self, *, members=2, relays=1, writers=1, writers_pause_seconds=0.05, replays=False, **options):
        """As `run`, and members handle what is published; then their effects are judged too.

        `replays`: in the end what was parked is replayed and judged again, else discarded.
        """
        if not self.members:
            self.heal()
            self._found_groups()
        self.set_members(members)
        starts = {table: self.query(f"SELECT coalesce(max(id), 0) FROM {table}")[0][0] for table in TABLES}
        wait_until(lambda: all(member.is_assigned() for member in self.one_of_each()), "partitions are assigned")
        reader = TopicReader(self.kafka.bootstrap_servers, TOPICS)
        try:
            with Watch(self) as watch:
                with super().run(
                    relays=relays, writers=writers, writers_pause_seconds=writers_pause_seconds, **options
                ) as run:
                    run.starts, self.rng = starts, run.rng
                    yield run
                healed = time.monotonic()
                self._wait_until_handled(run)
                run.recovery_seconds = time.monotonic() - healed
            held = self._judge_members(run, watch, reader.read_rest())
            if replays:
                self._replay_parked(run, held["parking"])
                self._judge_effects(run, "parking", set())
                self._judge_further(run, {**held, "parking": set()})
            self._discard_parked()
        except BaseException:
            self._give_up()
            raise
        finally:
            reader.close()

    def wait_for_handled(self, run, count):
        """`count` more events, by each consumer."""

        def handled(consumer):
            sql = "SELECT count(*) FROM events_outbox_processedevent WHERE consumer = %s AND id > %s"
            return self.query(sql, consumer, run.starts[MARKS])[0][0]

        goals = {consumer: handled(consumer) + count for consumer in CONSUMERS}
        wait_until(
            lambda: all(handled(consumer) >= goal for consumer, goal in goals.items()),
            lambda: f"{count} more events handled; {run.story()}",
            every_seconds=0.1,
        )

    def _unhandled(self, run):
        start = run.starts[OUTBOX]
        return {c: self.query(UNHANDLED_SQL, start, HANDLED[c], c)[0][0] for c in CONSUMERS}

    def _wait_until_handled(self, run):
        """As long as it goes on: what is behind may be much, on a slow machine."""
        while before := sum(self._unhandled(run).values()):
            wait_until(
                lambda before=before: (self.supervise(), sum(self._unhandled(run).values()) < before)[1],
                lambda: f"more is handled: {self._unhandled(run)} are not; {run.story()}",
                every_seconds=0.1,
            )

    # Verdict

    def _judge_members(self, run, watch, messages):
        run.member_peak_bytes = watch.peak_bytes
        held = {consumer: self._held(consumer) for consumer in CONSUMERS}
        for consumer in CONSUMERS:
            self._judge_effects(run, consumer, held[consumer])
            self._judge_letters(run, consumer, held[consumer])
        ahead = self._offsets_ahead(run, watch, messages)
        self._judge_further(run, held)
        print(
            f"handled after {run.recovery_seconds:.1f} s, dead letters { ({c: len(held[c]) for c in CONSUMERS}) }, "
            f"{len(watch.seen)} offsets seen, members at most {watch.peak_bytes / 1e6:.0f} MB; {run.story()}"
        )
        assert not ahead, f"offsets ahead of the database: {len(ahead)}, e.g. {ahead[:3]}; {run.story()}"
        assert watch.peak_bytes < MEMBER_MEMORY_BYTES, f"{watch.peak_bytes}; {run.story()}"
        return held

    def _held(self, consumer):
        """The events that must be dead letters: those that fail, and with parking what comes behind them."""
        held, parked = set(), set()
        for event in sorted(self.ledger.committed.values(), key=lambda event: event.number):
            if fates.fails(consumer, event.event_id, event.aggregate) or event.aggregate in parked:
                held.add(event.event_id)
                if consumer == "parking":
                    parked.add(event.aggregate)
        return held

    def _judge_effects(self, run, consumer, held):
        """Every event once, in the order of its key, but for those held."""
        rows = self.query(
            """SELECT event_id::text, aggregate, number FROM effect
                WHERE consumer = %s AND event_type = %s AND id > %s ORDER BY id""",
            consumer,
            EMITTED,
            run.starts[EFFECTS],
        )
        expected = Ledger({event_id: e for event_id, e in self.ledger.committed.items() if event_id not in held})
        # The last records of a leader that was frozen may arrive late, and so in the next run.
        late = self._known - self.ledger.committed.keys()
        found = compare([Written(*row) for row in rows if row[0] not in late], expected)
        assert found == Violations(), f"effects of {consumer}: {found}; {run.story()}"

    def _judge_letters(self, run, consumer, held):
        letters = self.query(LETTERS_SQL, consumer, run.starts[LETTERS])
        late = self._known - self.ledger.committed.keys()
        kept = {event_id: reason for event_id, reason, _ in letters if event_id not in late}
        assert kept.keys() == held, (
            f"dead letters of {consumer}: {sorted(kept.keys() ^ held)} are too many or missing; {run.story()}"
        )
        for event_id, reason in kept.items():
            may_be = {"permanent" if fates.is_permanent(consumer, event_id) else "failed"}
            if not fates.fails(consumer, event_id, self.ledger.committed[event_id].aggregate):
                may_be = {"behind"}
            elif consumer == "parking":
                may_be.add("behind")
            assert reason in may_be, f"{consumer} {event_id} is {reason}, not {may_be}; {run.story()}"

    def _replay_parked(self, run, held):
        """The handler works now: what was parked is replayed, in order."""
        with self.connect() as session:
            session.execute("INSERT INTO mended SELECT unnest(%s::uuid[])", [list(held)])
        wait_until(self._replay_all, "all dead letters are replayed")
        # What they emit is published and handled too.
        wait_until(lambda: self.query(faults.PENDING_SQL)[0][0] == 0, "all is published")
        self._wait_until_handled(run)

    def _replay_all(self):
        subprocess.run(
            [sys.executable, "manage.py", "dead_letters", "replay", "--consumer", "parking"],
            cwd=BASE_DIR,
            env={**self._environment(self.postgres_proxy), "DATABASE_URL": self.postgres.url},
            stdout=self._output,
            stderr=self._output,
        )
        return not self.query(LETTERS_SQL, "parking", 0)

    def _judge_further(self, run, held):
        """What handlers emit: once for each handled event that makes them, with their cause, and handled once."""
        rows = self.query(
            "SELECT value FROM events_outbox_outboxevent WHERE event_type = %s AND id > %s ORDER BY id",
            FURTHER,
            run.starts[OUTBOX],
        )
        causes, further = Counter(), Ledger()
        late = self._known - self.ledger.committed.keys()
        for (value,) in rows:
            base = BaseEvent.FromString(value)
            causes[base.aggregate_id.partition("-")[0], base.causation_id] += base.causation_id not in late
            further.committed[base.event_id] = Written.parse(value)
        expected = Counter(
            (consumer, event_id)
            for consumer in CONSUMERS
            for event_id in self.ledger.committed.keys() - held[consumer]
            if fates.emits(consumer, event_id)
        )
        assert +causes == expected, f"emitted by handlers: {causes - expected}, not {expected - causes}; {run.story()}"
        rows = self.query(
            "SELECT event_id::text, aggregate, number FROM effect WHERE event_type = %s AND id > %s ORDER BY id",
            FURTHER,
            run.starts[EFFECTS],
        )
        found = compare([Written(*row) for row in rows], further)
        assert found == Violations(), f"effects of what handlers emitted: {found}; {run.story()}"

    def _offsets_ahead(self, run, watch, messages):
        """Records below an offset that was committed before the database had them."""
        records = {}
        for message in messages:
            base = BaseEvent.FromString(message.value())
            place = message.topic(), message.partition()
            records.setdefault(place, []).append((message.offset(), base.event_type, base.event_id))
        start = run.starts[MARKS]
        marks = {consumer: dict(self.query(MARKS_SQL, consumer, start)) for consumer in CONSUMERS}
        ahead, judged = [], {}
        for consumer, topic, partition, committed, snapshot in watch.seen:
            had = _snapshot(snapshot)
            begin = judged.get((consumer, topic, partition), 0)
            for offset, event_type, event_id in records.get((topic, partition), []):
                if not begin <= offset < committed or event_type not in HANDLED[consumer]:
                    continue
                xid = marks[consumer].get(event_id)
                if event_id not in self._known - self.ledger.committed.keys() and (xid is None or not had(xid)):
                    ahead.append((consumer, topic, partition, offset, committed, event_id, xid, snapshot))
            judged[consumer, topic, partition] = max(begin, committed)
        return ahead


def _snapshot(text):
    """Whether a transaction is visible in it, as a function."""
    xmin, xmax, running = text.split(":")
    running = {int(xid) for xid in running.split(",") if xid}
    return lambda xid: xid < int(xmin) or (xid < int(xmax) and xid not in running)


# Faults of members. None lets the relay publish a batch twice.


def members_killed(harness):
    harness.end_members(harness.one_of_each(), Child.kill)
    yield 0
    harness.set_members(harness._wanted_members)


def members_terminated(harness):
    members = harness.one_of_each()
    harness.end_members(members, Child.ask_to_stop)
    yield 0
    for member in members:
        see_it_end(harness, member)
    harness.set_members(harness._wanted_members)


def members_frozen(harness):
    """Beyond their session's life. Then the zombies wake up, with a batch in their hands."""
    members = harness.one_of_each()
    for member in members:
        member.pause()
    time.sleep(SESSION_TIMEOUT_MS / 1000 + 0.5)
    yield 0
    for member in members:
        member.resume()


def members_join(harness):
    """Two more of each; while they come, all are at work."""
    before = harness._wanted_members
    harness.set_members(min(before + 2, MOST_MEMBERS))
    joining = [member for consumer in CONSUMERS for member in harness.members_of(consumer)[before:]]
    if harness.lasting_faults == 1:
        wait_until(lambda: all(member.is_assigned() for member in joining), "who joins gets partitions")
    yield 0


def members_come_and_go(harness):
    """The same; when they have partitions, the ones that were there longest leave."""
    before = harness._wanted_members
    yield from members_join(harness)
    harness.set_members(before)


def members_in_other_number(harness):
    harness.set_members(harness.rng.randint(1, MOST_MEMBERS))
    yield 0


MEMBER_FAULTS = {
    "members": [members_killed, members_terminated, members_frozen, members_come_and_go, members_in_other_number],
}
ALL_FAULTS = {**FAULTS, **MEMBER_FAULTS}
