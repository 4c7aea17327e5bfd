"""One harness for every fault of the relay.

Writers over the public API commit and roll back at random, and keep a ledger outside the database. Relays, as real
processes, publish what they commit. Faults are injected. Then all is made whole again, the topics are read with an
independent reader, and what is in them is compared with the ledger.

PostgreSQL and Apache Kafka are the harness's own. The relays reach both only through proxies:

    writers --proxy--> PostgreSQL <--proxy-- relays --proxy--> Kafka <-- reader
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import psutil
import psycopg
from confluent_kafka.admin import AdminClient, NewTopic

from tests.faults.proxy import Proxy
from tests.outbox_writers import AGGREGATE_NAMES, CREATE_AGGREGATES, FILL_AGGREGATES, Ledger, Written, compare
from tests.services import TOPICS, free_ports
from tests.topics import TopicReader
from voicehelper.devstack.apache_kafka import ApacheKafka
from voicehelper.devstack.child import Child
from voicehelper.devstack.postgres import DATABASE, FORGETFUL, EmbeddedPostgres
from voicehelper.services import BASE_DIR

RELAY, WRITERS, MEMBERS, HARNESS = "relay_outbox", "fault_writers", "fault_members", "fault_harness"
SESSION_SECONDS = 2  # LEADER_SESSION_TIMEOUT_SECONDS in tests/faults/settings.py
RECOVERY_SECONDS = 60
RELAY_MEMORY_BYTES = 200_000_000

PENDING_SQL = """
    SELECT count(*) FROM events_outbox_outboxevent o
     WHERE NOT EXISTS (SELECT FROM events_outbox_relaycursor c
                        WHERE pg_visible_in_snapshot(o.transaction_id, c.published)
                           OR (pg_visible_in_snapshot(o.transaction_id, c."window") AND o.id <= c.window_last_id))"""
LEADER_SQL = """
    SELECT c.leader FROM events_outbox_relaycursor c
     WHERE EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted)"""
SESSIONS_SQL = "SELECT pid FROM pg_stat_activity WHERE application_name = %s AND datname = current_database()"


class Relay(Child):
    """A relay process. What it logs is kept in a file."""

    def __init__(self, number, log_dir, environment, batch_size):
        self.log = log_dir / f"relay-{number}.log"
        with self.log.open("wb") as log:
            command = [sys.executable, "manage.py", "relay_outbox", "--batch-size", str(batch_size)]
            super().__init__(f"relay {number}", command, output=log.fileno(), env=environment, stop_seconds=20)
            self.start()

    @property
    def pid(self):
        return self.process.pid

    def ports(self):
        """Its ends of its TCP connections."""
        return {connection.laddr.port for connection in psutil.Process(self.pid).net_connections("tcp")}


@dataclass
class Watch:
    """Looks on while a run lasts: memory of the relays, and that the cursor never goes back."""

    harness: "Harness"
    peak_bytes: int = 0
    went_back: list = field(default_factory=list)

    def __enter__(self):
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look_on)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _look_on(self):
        session, before = None, None
        while not self._over.wait(0.05):
            for relay in list(self.harness.relays):
                with suppress(psutil.Error):
                    self.peak_bytes = max(self.peak_bytes, psutil.Process(relay.pid).memory_info().rss)
            try:
                session = session or self.harness.connect()
                row = session.execute(
                    """SELECT pg_snapshot_xmax(published)::text::bigint,
                              coalesce(pg_snapshot_xmax("window")::text::bigint, 0), window_last_id
                         FROM events_outbox_relaycursor"""
                ).fetchone()
            except psycopg.Error:
                session = None
                continue
            if row and before and not _is_behind(before, row):
                self.went_back.append((before, row))
            before = row or before
        if session is not None:
            session.close()


def _is_behind(earlier, later):
    """Whether the cursor at `earlier` may have become the one at `later`."""
    (published, window, last_id), (later_published, later_window, later_last_id) = earlier, later
    if later_published == published and window and window == later_window:
        return later_last_id >= last_id
    return later_published >= published and (not window or later_published >= window or later_window == window)


class Run:
    """One run: its faults, and in the end its verdict."""

    def __init__(self, harness, seed, batch_size):
        self.harness = harness
        self.seed = seed
        self.batch_size = batch_size
        self.faults = []
        self.crashes = 0
        self.rng = random.Random(seed)

    @contextmanager
    def fault(self, fault):
        """Let a fault happen. It lasts until the block is left."""
        self.faults.append(fault.__name__)
        self.harness.lasting_faults += 1
        steps = fault(self.harness)
        try:
            self.crashes += next(steps)
            yield
        finally:
            for _ in steps:
                pass
            self.harness.lasting_faults -= 1

    def wait_for_committed(self, count, timeout_seconds=RECOVERY_SECONDS):
        goal = self.harness.committed() + count
        wait_until(lambda: self.harness.committed() >= goal, f"{count} more events committed", timeout_seconds)

    def wait_for_published(self, count):
        goal = self.published() + count
        wait_until(lambda: self.published() >= goal, f"{count} more events published")

    def published(self):
        return self.harness.committed() - self.harness.query(PENDING_SQL)[0][0]

    def story(self):
        return f"seed {self.seed}, faults {self.faults}, logs in {self.harness.directory}"


class Harness:
    def __init__(self, directory, *, output):
        self.directory = directory
        self._output = output
        self._stack = ExitStack()
        self._serial = iter(range(10**9))
        self.relays = []
        self._wanted = self._batch_size = 0
        self.writers = None
        self.lasting_faults = 0
        self._known = {}  # every event that was ever in a ledger

    # Services

    def start(self):
        port, controller_port, proxied_port = free_ports(3)
        self.kafka_proxy = self._proxy(("127.0.0.1", proxied_port))
        listeners = {"PLAINTEXT": port, "CONTROLLER": controller_port, "PROXIED": proxied_port}
        self.kafka = ApacheKafka(
            self.directory / "kafka",
            port,
            controller_port=controller_port,
            output=self._output,
            properties={
                "listeners": ",".join(f"{name}://127.0.0.1:{port}" for name, port in listeners.items()),
                "listener.security.protocol.map": ",".join(f"{name}:PLAINTEXT" for name in listeners),
                # Whoever comes in through the proxy is sent to the proxy.
                "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port},PROXIED://127.0.0.1:{self.kafka_proxy.port}",
            },
        )
        self._stack.callback(self.kafka.kill)
        self.kafka.start()

        self.postgres = EmbeddedPostgres(self.directory / "postgres", output=self._output, settings=FORGETFUL)
        self._stack.callback(self.postgres.stop)
        self.postgres.start()
        self.postgres.wait_until_ready()
        socket_path = str(self.postgres.socket_dir / ".s.PGSQL.5432")
        self.postgres_proxy = self._proxy(socket_path)
        self.writers_proxy = self._proxy(socket_path)
        subprocess.run(
            [sys.executable, "manage.py", "migrate", "-v", "0"],
            cwd=BASE_DIR,
            env=self._environment(self.postgres_proxy),
            check=True,
        )
        with self.connect() as session:
            session.execute(CREATE_AGGREGATES)
            session.execute(FILL_AGGREGATES, [[*AGGREGATE_NAMES, "long"]])

        self.kafka.wait_until_ready()
        admin = AdminClient({"bootstrap.servers": self.kafka.bootstrap_servers})
        for future in admin.create_topics([NewTopic(topic, 6, 1) for topic in TOPICS]).values():
            future.result(30)

    def stop(self):
        for relay in self.relays:
            relay.kill()
        self._end_writers()
        self._stack.close()

    def _proxy(self, server):
        proxy = Proxy(server)
        self._stack.callback(proxy.close)
        return proxy

    def _environment(self, database_proxy, application_name=""):
        url = f"postgresql://postgres@127.0.0.1:{database_proxy.port}/{DATABASE}"
        return {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.faults.settings",
            "DATABASE_URL": url + (f"?application_name={application_name}" if application_name else ""),
            "KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{self.kafka_proxy.port}",
        }

    def connect(self):
        return psycopg.connect(self.postgres.url, application_name=HARNESS, autocommit=True, connect_timeout=5)

    def query(self, sql, *parameters):
        with self.connect() as session:
            return session.execute(sql, parameters).fetchall()

    def heal(self):
        """Make everything whole again, whatever had happened to it."""
        for proxy in (self.kafka_proxy, self.postgres_proxy, self.writers_proxy):
            proxy.heal()
        for child in (self.kafka, self.postgres):
            child.resume()
            child.start()
            child.wait_until_ready()
        for relay in self.relays:
            relay.resume()
        self.supervise()

    # Relays

    def supervise(self):
        """No relay may end by itself, whatever happens around it: a person would have to look why."""
        for relay in self.relays:
            assert relay.is_running(), f"{relay.name} ended: {relay.log.read_text()[-3000:]}"
        self.set_relays(self._wanted)

    def set_relays(self, count, batch_size=None):
        self._wanted = count
        self._batch_size = batch_size or self._batch_size
        while len(self.relays) < count:
            number = next(self._serial)
            environment = self._environment(self.postgres_proxy)
            self.relays.append(Relay(number, self.directory, environment, self._batch_size))

    def end_relay(self, relay, end):
        """End one of them on purpose."""
        self.relays.remove(relay)
        end(relay)

    def leader(self):
        """The process that leads, or None."""
        try:
            rows = self.query(LEADER_SQL)
        except psycopg.Error:
            return None
        pids = {int(name.rpartition(":")[2]) for (name,) in rows if name}
        return next((relay for relay in self.relays if relay.pid in pids), None)

    def wait_for_leader(self, other_than=None):
        def leads():
            leader = self.leader()
            return leader if leader is not None and leader is not other_than else None

        return wait_until(leads, "a relay leads")

    def someone_to_hit(self):
        """The leader, or if the database cannot say any relay."""
        return self.leader() or self.relays[0]

    # Writers and ledger

    def _start_writers(self):
        self._ledger_path = self.directory / f"ledger-{next(self._serial)}"
        self._ledger_path.touch()
        self._ledger_file = self._ledger_path.open()
        self._stack.callback(self._ledger_file.close)
        self._ledger_rest, self._halts = "", 0
        self._writers_log = self._ledger_path.with_suffix(".log")
        with self._writers_log.open("wb") as log:
            self.writers = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.writers", self._ledger_path],
                cwd=BASE_DIR,
                env=self._environment(self.writers_proxy, WRITERS),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                process_group=0,
            )

    def _end_writers(self):
        if self.writers is not None:
            with self.writers, suppress(BrokenPipeError):
                self.writers.kill()
            self.writers = None

    def tell_writers(self, *command):
        self.writers.stdin.write(" ".join(map(str, command)) + "\n")
        self.writers.stdin.flush()

    def committed(self):
        """How many events the writers know to be committed, in this run."""
        self._read_ledger()
        return self.ledger.count()

    def _read_ledger(self):
        log = self._writers_log.read_text()
        assert self.writers.poll() is None and "Traceback" not in log, f"the writers failed: {log[-3000:]}"
        *lines, self._ledger_rest = (self._ledger_rest + self._ledger_file.read()).split("\n")
        for line in lines:
            what, *events = json.loads(line)
            if what == "?":
                self.ledger.announce([Written(*event) for event in events])
            elif what == "+":
                self.ledger.confirm([self.ledger.in_doubt[event_id] for event_id in events])
            else:
                self._halts += 1

    def _halt_writers(self):
        goal = self._halts + 1
        self.tell_writers("halt")
        wait_until(lambda: (self._read_ledger(), self._halts >= goal)[1], "the writers halt", 120)
        # What is still committing when the answer was lost must be over before its rows are looked for.
        wait_until(lambda: not self.query(SESSIONS_SQL, WRITERS), "the writers' transactions are over")

    # A run

    @contextmanager
    def run(self, *, relays=2, seed=None, writers=4, batch_size=100, writers_pause_seconds=0.02):
        """Writers write and relays publish while the block injects faults; then judge. Yields a `Run`.

        `writers_pause_seconds`: of each writer, after each transaction.
        Afterwards `run` has what was seen: violations, committed, peak_bytes. Fails when a promise was broken.
        """
        run = Run(self, random.randrange(10**9) if seed is None else seed, batch_size)
        print(f"seed {run.seed}")  # shown when the test fails
        self._begin(relays, batch_size)
        self.ledger = Ledger()
        reader = TopicReader(self.kafka.bootstrap_servers, TOPICS)
        try:
            with Watch(self) as watch:
                self.tell_writers("go", run.seed, writers, writers_pause_seconds)
                yield run
                self.heal()
                self._halt_writers()
                run.recovery_seconds = self._wait_until_published(run)
            self._judge(run, watch, reader)
        except BaseException:
            self._give_up()
            raise
        finally:
            reader.close()

    def _begin(self, relays, batch_size):
        for relay in list(self.relays):
            if len(self.relays) > relays or batch_size != self._batch_size:
                self.end_relay(relay, Child.kill)
        self.set_relays(relays, batch_size)
        if self.writers is None:
            self._start_writers()
        self.heal()
        self._wait_until_whole()
        # What a run that failed left behind is no business of the next one.
        wait_until(lambda: self.query(PENDING_SQL)[0][0] == 0, "the leftovers are published")

    def _give_up(self):
        """After a failure nothing is left that could disturb the next run."""
        for relay in list(self.relays):
            self.end_relay(relay, Child.kill)
        self._end_writers()
        self._wanted = 0
        self.heal()

    def _wait_until_whole(self):
        """One relay leads and every other one has noticed that it does not."""

        def whole():
            self.supervise()
            return self.leader() and len(self.query(SESSIONS_SQL, RELAY)) == len(self.relays)

        wait_until(whole, "one relay leads, the others stand by")

    def _wait_until_published(self, run):
        started = time.monotonic()
        wait_until(
            lambda: (self.supervise(), self.query(PENDING_SQL)[0][0] == 0)[1],
            lambda: f"all is published: {self.query(PENDING_SQL)[0][0]} pending; {run.story()}",
        )
        self._wait_until_whole()
        return time.monotonic() - started

    def _judge(self, run, watch, reader):
        rows = self.query("SELECT event_id::text FROM events_outbox_outboxevent WHERE event_id = ANY(%s::uuid[])",
                          list(self.ledger.in_doubt))  # fmt: skip
        run.in_doubt = self.ledger.settle({row[0] for row in rows})
        # What handlers emit is not the writers'.
        messages = [m for m in reader.read_rest() if ("event_type", b"conversation.created") in m.headers()]
        read = [Written.parse(message.value()) for message in messages]
        # The last records of a frozen leader may arrive late, and so in the next run.
        late = [event for event in read if event.event_id in self._known]
        run.violations = compare([event for event in read if event.event_id not in self._known], self.ledger)
        run.violations.duplicates += len(late)
        self._known |= self.ledger.committed
        run.committed = self.ledger.count()
        run.peak_bytes = watch.peak_bytes
        undeliverable = self.query("SELECT count(*) FROM events_outbox_undeliverableevent")[0][0]

        found, story = run.violations, run.story()
        print(
            f"{run.committed} events committed ({run.in_doubt[0]} of them and {run.in_doubt[1]} others in doubt), "
            f"{found}, {run.crashes} crashes, published after {run.recovery_seconds:.1f} s, "
            f"relays at most {run.peak_bytes / 1e6:.0f} MB; {story}"
        )
        assert (found.missed, found.phantoms, found.out_of_order) == (0, 0, 0), f"{found}; {story}"
        assert found.duplicates <= run.crashes * run.batch_size, f"{found}, {run.crashes} crashes; {story}"
        assert not watch.went_back, f"the cursor went back: {watch.went_back}; {story}"
        assert undeliverable == 0, story
        assert watch.peak_bytes < RELAY_MEMORY_BYTES, f"{watch.peak_bytes}; {story}"


def wait_until(condition, what, timeout_seconds=RECOVERY_SECONDS, every_seconds=0.02):
    """Wait until `condition()` is true and return what it returned; PostgreSQL may be away meanwhile."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            if result := condition():
                return result
        except psycopg.OperationalError:
            pass
        assert time.monotonic() < deadline, f"not within {timeout_seconds} s: {what() if callable(what) else what}"
        time.sleep(every_seconds)


# Faults. Each yields once, while it lasts, the number of batches that may be published twice because of it.


def leader_killed(harness):
    harness.end_relay(harness.someone_to_hit(), Child.kill)
    yield 1
    harness.set_relays(harness._wanted)


def leader_killed_with_a_batch_in_hand(harness):
    """The batch never reaches the broker: what was taken for published too early is lost with the leader."""
    harness.kafka_proxy.to_server.held = True
    time.sleep(1)
    harness.end_relay(harness.someone_to_hit(), Child.kill)
    harness.kafka_proxy.cut()
    yield 1
    harness.kafka_proxy.heal()
    harness.set_relays(harness._wanted)


def leader_terminated(harness):
    """It gives up a batch only when the broker does not answer."""
    leader = harness.someone_to_hit()
    harness.end_relay(leader, Child.ask_to_stop)
    yield 1
    see_it_end(harness, leader)
    harness.set_relays(harness._wanted)


def see_it_end(harness, child):
    """A relay, or a member, that was asked to stop."""
    alone = harness.lasting_faults == 1
    try:
        code = child.process.wait(10)
    except subprocess.TimeoutExpired:
        # One whose database neither answers nor hangs up waits for it: the supervisor's patience ends first.
        assert not alone, f"{child.name} does not stop: {child.log.read_text()[-3000:]}"
        child.kill()
    else:
        log = child.log.read_text()
        # Before it has begun it ends like any program.
        assert code == 0 or (code == -signal.SIGTERM and not log), f"{child.name} ended with {code}: {log[-3000:]}"


def leader_frozen(harness):
    """Beyond its session's life. Then the zombie wakes up, with a batch in its hands."""
    leader = harness.someone_to_hit()
    leader.pause()
    time.sleep(SESSION_SECONDS)
    if harness.lasting_faults == 1 and len(harness.relays) > 1:  # amidst others perhaps nobody can lead
        harness.wait_for_leader(other_than=leader)
    yield 1
    leader.resume()


def broker_killed(harness):
    harness.kafka.kill()
    yield 1
    harness.kafka.start()
    harness.kafka.wait_until_ready()


def broker_restarted(harness):
    harness.kafka.stop()
    yield 1
    harness.kafka.start()
    harness.kafka.wait_until_ready()


def broker_frozen(harness):
    harness.kafka.pause()
    yield 0
    harness.kafka.resume()


def broker_slow(harness):
    harness.kafka_proxy.to_server.delay_seconds = harness.kafka_proxy.to_client.delay_seconds = 0.1
    yield 0
    harness.kafka_proxy.heal()


def broker_connections_cut(harness):
    harness.kafka_proxy.cut()
    yield 0


def broker_answers_lost(harness):
    """Records arrive, acknowledgements do not."""
    harness.kafka_proxy.to_client.swallows = True
    yield 0
    harness.kafka_proxy.heal()


def _postgres_restarted(harness, how):
    harness.postgres.send_signal(how)
    harness.postgres.process.wait(60)
    yield 1
    harness.postgres.start()
    harness.postgres.wait_until_ready()


def postgres_restarted_fast(harness):
    return _postgres_restarted(harness, signal.SIGINT)


def postgres_restarted_immediately(harness):
    """As after a crash: nothing is said to anyone, and the log is replayed."""
    return _postgres_restarted(harness, signal.SIGQUIT)


def postgres_connections_terminated(harness):
    """One by one, relays', writers' and consumers'."""
    relays = 0
    with suppress(psycopg.OperationalError):
        for name in (RELAY, WRITERS, MEMBERS):
            for (pid,) in harness.query(SESSIONS_SQL, name):
                relays += name == RELAY
                harness.query("SELECT pg_terminate_backend(%s)", pid)
                time.sleep(0.05)
    yield relays


def postgres_connections_cut(harness):
    harness.postgres_proxy.cut()
    harness.writers_proxy.cut()
    yield 1


def postgres_answers_lost(harness):
    """The cursor was moved, or the writer's transaction committed, and nobody was told."""
    harness.postgres_proxy.to_client.swallows = harness.writers_proxy.to_client.swallows = True
    yield 1
    harness.postgres_proxy.heal()
    harness.writers_proxy.heal()


def postgres_slow(harness):
    harness.postgres_proxy.to_server.delay_seconds = harness.postgres_proxy.to_client.delay_seconds = 0.05
    yield 0
    harness.postgres_proxy.heal()


def postgres_held(harness):
    """The line stands still, longer than the leader's session lives."""
    harness.postgres_proxy.to_client.held = harness.postgres_proxy.to_server.held = True
    time.sleep(SESSION_SECONDS)
    yield 1
    harness.postgres_proxy.heal()


FAULTS = {
    "relay": [leader_killed, leader_killed_with_a_batch_in_hand, leader_terminated, leader_frozen],
    "broker": [broker_killed, broker_restarted, broker_frozen],
    "way to the broker": [broker_slow, broker_connections_cut, broker_answers_lost],
    "postgres": [postgres_restarted_fast, postgres_restarted_immediately, postgres_connections_terminated],
    "way to postgres": [postgres_connections_cut, postgres_answers_lost, postgres_slow, postgres_held],
}
"""By what they hit: only one of a kind happens at a time."""


def mixed_faults(run, until, faults=FAULTS):
    """One to three faults at a time, overlapping, each of its own kind, until `until()`."""
    while not until():
        kinds = run.rng.sample(sorted(faults), run.rng.choice([1, 1, 2, 2, 3]))
        with ExitStack() as lasting:
            for kind in kinds:
                lasting.enter_context(run.fault(run.rng.choice(faults[kind])))
                time.sleep(run.rng.random() * 0.5)
            time.sleep(run.rng.random() * 1.5)
        run.harness.supervise()
        time.sleep(run.rng.random())
