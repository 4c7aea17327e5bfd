"""`make up`: start everything, show one log, restart what dies, stop all on Ctrl-C."""

import contextlib
import fcntl
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from voicehelper.devstack import DevstackError
from voicehelper.devstack.apache_kafka import ApacheKafka
from voicehelper.devstack.child import Child
from voicehelper.devstack.embedded_broker import EmbeddedBroker
from voicehelper.devstack.log_stream import LogStream
from voicehelper.devstack.milvus import MilvusLite
from voicehelper.devstack.postgres import EmbeddedPostgres
from voicehelper.devstack.prometheus import Prometheus, is_installed
from voicehelper.services import BASE_DIR, DATA_DIR, SERVICES_FILE, Services, write_services

HOST = "127.0.0.1"
TOPICS = ("conversation.events", "document.events", "identity.events", "default.events")
CONSUMERS = ("analytics", "notification", "audit", "knowledge")
LONGEST_RESTART_DELAY_SECONDS = 30
STABLE_AFTER_SECONDS = 60  # a process that ran this long starts over with the shortest delay
START_SECONDS = 60  # for the web server to answer
MANAGE = [sys.executable, str(BASE_DIR / "manage.py")]


def up(kafka: str) -> None:
    """Run until Ctrl-C, SIGTERM or SIGHUP; a second one kills all processes at once.

    `kafka` is `"embedded"` or `"apache"`. Raises DevstackError, all stopped again, when it cannot start.
    """
    ports = Ports()
    with only_one_run(DATA_DIR) as earlier_run_was_killed:
        ports.check(kafka, wait_seconds=15 if earlier_run_was_killed else 0)
        Supervisor(kafka, ports).run()


@contextlib.contextmanager
def only_one_run(data_dir: Path) -> Iterator[bool]:
    """Hold the data directory's lock; yields whether the run before this one was killed.

    The kernel frees the lock with its process, so a lock file left behind means nothing by itself.
    Raises DevstackError when another run holds it.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "make-up.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise DevstackError(
                f"already running (pid {lock.read().strip()}) on {data_dir}: stop it there with Ctrl-C"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        services = data_dir / SERVICES_FILE.name  # removed by a run that ends in order
        was_killed = services.exists()
        services.unlink(missing_ok=True)
        yield was_killed


class Ports:
    """The TCP ports of a run, from the environment. Raises DevstackError for what is not a port number."""

    def __init__(self) -> None:
        self.web = _port("WEB_PORT", 8000)
        self.kafka = _port("KAFKA_PORT", 9092)
        self.relay_metrics = _port("METRICS_PORT", 9101)  # the consumers' follow
        self.consumer_metrics = {name: self.relay_metrics + 1 + at for at, name in enumerate(CONSUMERS)}
        self.milvus = _port("MILVUS_PORT", 19530)
        self.delivery_metrics = self.relay_metrics + 1 + len(CONSUMERS)
        self.prometheus = _port("PROMETHEUS_PORT", 9090)
        self.starts_prometheus = is_installed() and not os.environ.get("PROMETHEUS_URL")

    def check(self, kafka: str, *, wait_seconds: float) -> None:
        """Raise DevstackError, naming port and variable, unless all are free within `wait_seconds`."""
        wanted = [
            (self.web, "the web server", "WEB_PORT"),
            (self.relay_metrics, "the relay's metrics", "METRICS_PORT"),
        ]
        wanted += [(port, f"{name}'s metrics", "METRICS_PORT") for name, port in self.consumer_metrics.items()]
        wanted.append((self.delivery_metrics, "delivery's metrics", "METRICS_PORT"))
        if self.starts_prometheus and "PROMETHEUS_PORT" in os.environ:
            wanted.append((self.prometheus, "Prometheus", "PROMETHEUS_PORT"))
        if not os.environ.get("MILVUS_URI"):
            wanted.append((self.milvus, "Milvus Lite", "MILVUS_PORT"))
        if not os.environ.get("KAFKA_BOOTSTRAP_SERVERS"):
            wanted.append((self.kafka, "the Kafka broker", "KAFKA_PORT"))
            if kafka == "apache":
                wanted.append((self.kafka + 1, "Kafka's controller", "KAFKA_PORT"))
        deadline = time.monotonic() + wait_seconds
        for port, purpose, variable in wanted:
            while not _is_free(port):
                if time.monotonic() >= deadline:
                    raise DevstackError(
                        f"port {port}, for {purpose}, is taken by another process: stop that one, or choose "
                        f"another port, for example `{variable}={port + 1000} make up`"
                    )
                time.sleep(0.1)
        # Nobody has asked for one by name: Debian's package starts its own there, which does not know our processes.
        while self.starts_prometheus and not _is_free(self.prometheus):
            self.starts_prometheus = time.monotonic() < deadline
            time.sleep(0.1)


@dataclass
class Watched:
    """A child and when to start it again after it died."""

    child: Child
    started_at: float = field(default_factory=time.monotonic)
    restart_at: float | None = None
    delay_seconds: float = 1

    def restart_if_dead(self, log: LogStream) -> None:
        now = time.monotonic()
        if self.restart_at is not None:
            if now >= self.restart_at:
                self.child.start()
                self.started_at, self.restart_at = now, None
        elif not self.child.is_running():
            if now - self.started_at > STABLE_AFTER_SECONDS:
                self.delay_seconds = 1
            self.restart_at = now + self.delay_seconds
            log.write(f"{_how_it_ended(self.child)}; starting it again in {self.delay_seconds:.0f} s")
            self.child.kill()  # what it started may still hold its port
            self.delay_seconds = min(2 * self.delay_seconds, LONGEST_RESTART_DELAY_SECONDS)


class StopRequested(BaseException):
    """Ctrl-C, SIGTERM or SIGHUP, raised wherever the main thread is, so that no wait has to look for it."""


class Supervisor:
    """All processes of one run. The main thread starts and watches them; threads only copy their lines."""

    def __init__(self, kafka: str, ports: Ports) -> None:
        self.ports = ports
        self.log = LogStream(sys.stdout, name_width=len("notification"))
        self.stopping = False
        self.make_pid = os.getppid() if "MAKELEVEL" in os.environ else None
        self.postgres: EmbeddedPostgres | None = None
        self.broker: EmbeddedBroker | ApacheKafka | None = None
        if not os.environ.get("DATABASE_URL"):
            self.postgres = EmbeddedPostgres(DATA_DIR / "postgres", output=self.log.open("postgres"))
        if not os.environ.get("KAFKA_BOOTSTRAP_SERVERS"):
            output = self.log.open("kafka")
            if kafka == "apache":
                self.broker = ApacheKafka(DATA_DIR / "kafka", ports.kafka, output=output)
            else:
                self.broker = EmbeddedBroker(ports.kafka, TOPICS, output=output)
        self.milvus: MilvusLite | None = None
        if not os.environ.get("MILVUS_URI"):
            self.milvus = MilvusLite(DATA_DIR / "milvus.db", ports.milvus, output=self.log.open("milvus"))
        self.prometheus: Prometheus | None = None
        if ports.starts_prometheus:
            targets = {
                "web": [ports.web],
                "relay": [ports.relay_metrics],
                "consumer": [*ports.consumer_metrics.values()],
                "delivery": [ports.delivery_metrics],
            }
            output = self.log.open("prometheus")
            self.prometheus = Prometheus(DATA_DIR / "prometheus", ports.prometheus, targets, output=output)
        gunicorn = [sys.executable, "-m", "gunicorn", "--config=voicehelper/gunicorn.conf.py"]
        self.web = self._child("web", [*gunicorn, "voicehelper.wsgi"], env=self._web_environment())
        relay = [*MANAGE, "relay_outbox", f"--metrics-port={ports.relay_metrics}"]
        self.workers = [self._child("relay", relay)]
        for name, port in ports.consumer_metrics.items():
            self.workers.append(self._child(name, [*MANAGE, "consume", name, f"--metrics-port={port}"]))
        delivery = [*MANAGE, "deliver_notifications", f"--metrics-port={ports.delivery_metrics}"]
        self.workers.append(self._child("delivery", delivery))
        self.prepare_output = self.log.open("prepare")
        self.preparing: Child | None = None
        self.watched: list[Watched] = []

    def run(self) -> None:
        """Start, watch, and stop everything in the end, whatever the end is."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_stop_signal)
        try:
            self._start()
            # A killed `make` takes us along, and so does a closed terminal of which only `make` was told.
            while self.make_pid in (None, os.getppid()) and self.log.has_reader():
                self._watch_once()
        except StopRequested:
            pass
        finally:
            self.stopping = True
            self._stop()

    def _start(self) -> None:
        self.log.write(f"starting; data is in {DATA_DIR}")
        servers = [server for server in (self.postgres, self.broker, self.milvus) if server]
        for server in servers:
            server.start()
        for server in servers:
            server.wait_until_ready()
        write_services(
            Services(
                database_url=self.postgres.url if self.postgres else os.environ["DATABASE_URL"],
                kafka_bootstrap_servers=self.broker.bootstrap_servers
                if self.broker
                else os.environ["KAFKA_BOOTSTRAP_SERVERS"],
                kafka_is_embedded=isinstance(self.broker, EmbeddedBroker),
                web_url=f"http://{HOST}:{self.ports.web}",
                milvus_uri=self.milvus.uri if self.milvus else os.environ["MILVUS_URI"],
            )
        )
        self.web.start()  # it takes its seconds to import everything; nobody knows its address yet
        self._prepare()
        for worker in self.workers:
            worker.start()
        others = [self.prometheus] if self.prometheus else []
        for other in others:
            other.start()
        self.watched = [Watched(child) for child in (*servers, self.web, *self.workers, *others)]
        self._wait_for_web()
        self.log.write(self._banner())

    def _prepare(self) -> None:
        """Migrate, create topics and the demo tenants, publish again what an in-memory broker forgot."""
        last_broker = DATA_DIR / "last-broker"
        forgetful = isinstance(self.broker, EmbeddedBroker)
        options = [f"--demo-file={DATA_DIR / 'demo.json'}"]
        if not forgetful:
            options.append("--create-topics")
        if forgetful or (last_broker.exists() and last_broker.read_text() == "embedded"):
            options.append("--replay")
        command = [sys.executable, "-m", "voicehelper.devstack.prepare", *options]
        self.preparing = Child("prepare", command, output=self.prepare_output)
        self.preparing.start()
        while self.preparing.is_running():
            time.sleep(0.05)
        if self.preparing.process and self.preparing.process.returncode:
            raise DevstackError("preparing database and topics failed: the lines marked `prepare` above say why")
        last_broker.write_text("embedded" if forgetful else "lasting")

    def _wait_for_web(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(self.ports.web, "/readyz"):
            self._watch_once()
            if time.monotonic() > deadline:
                raise DevstackError(f"/readyz did not answer 200 within {START_SECONDS} s: see the `web` lines above")

    def _watch_once(self) -> None:
        broker = self.broker
        if isinstance(broker, EmbeddedBroker) and not broker.is_running():
            self._replace_embedded_broker(broker)
        for watched in self.watched:
            watched.restart_if_dead(self.log)
        time.sleep(0.1)

    def _replace_embedded_broker(self, broker: EmbeddedBroker) -> None:
        """A new one knows no records and no offsets: relay and consumers start over, after a replay."""
        self.log.write(f"{_how_it_ended(broker)}; starting it again, with relay and consumers")
        self._stop_together(self.workers)
        broker.start()
        broker.wait_until_ready()
        self._prepare()
        for worker in self.workers:
            worker.start()

    def _stop(self) -> None:
        self.log.write("stopping (Ctrl-C again kills everything at once)")
        preparing = [self.preparing] if self.preparing else []
        # Consumers leave their groups and finish their transactions while broker and database are there.
        for children in (
            preparing,
            [self.web, self.prometheus],
            self.workers[:1],
            self.workers[1:],
            [self.broker, self.milvus],
            [self.postgres],
        ):
            self._stop_together([child for child in children if child])
        SERVICES_FILE.unlink(missing_ok=True)
        self.log.close()
        self.log.write("stopped")

    def _stop_together(self, children: Sequence[Child]) -> None:
        for child in children:
            child.ask_to_stop()
        for child in children:
            if not child.stop():
                self.log.write(f"{child.name} did not stop within {child.stop_seconds:.0f} s and was killed")

    def _on_stop_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.stopping:
            self.stopping = True
            raise StopRequested
        for child in (
            self.preparing,
            self.web,
            self.prometheus,
            *self.workers,
            self.broker,
            self.milvus,
            self.postgres,
        ):
            if child:
                child.kill_without_waiting()
        os._exit(128 + number)

    def _figures(self) -> str:
        if self.prometheus:
            return f"{self.prometheus.url}  (Prometheus; the admin shows them)"
        if url := os.environ.get("PROMETHEUS_URL"):
            return f"{url}  (PROMETHEUS_URL)"
        if is_installed():
            port = self.ports.prometheus
            return (
                f"none over time: port {port} is taken; choose one, for example `PROMETHEUS_PORT={port + 1000} make up`"
            )
        return "none over time: install the program `prometheus` and start again"

    def _web_environment(self) -> dict[str, str]:
        environment = {"WEB_PORT": str(self.ports.web)}
        if self.prometheus:
            environment["PROMETHEUS_URL"] = self.prometheus.url
        return environment

    def _child(self, name: str, command: Sequence[str], env: dict[str, str] | None = None) -> Child:
        env = {"PYTHONUNBUFFERED": "1", **(env or {})}
        return Child(name, command, output=self.log.open(name), env=env, stop_seconds=15)

    def _banner(self) -> str:
        web = f"http://{HOST}:{self.ports.web}"
        demo: dict[str, Any] = json.loads((DATA_DIR / "demo.json").read_text())
        logins = "\n".join(
            f"    {user['username']:<8} {user['password']}  {user['role']:<6} of {user['tenant']:<5}"
            f"  Authorization: Token {user['token']}"
            for user in demo["users"]
        )
        token = demo["users"][0]["token"]
        return f"""
{"=" * 100}
  VoiceHelper runs.

  API      {web}/api/v1/
  Admin    {web}/admin/
  Metrics  {web}/metrics   relay :{self.ports.relay_metrics}, consumers \
{", ".join(f":{port}" for port in self.ports.consumer_metrics.values())}, delivery :{self.ports.delivery_metrics}
  Figures  {self._figures()}
  Kafka    {self.broker.bootstrap_servers if self.broker else os.environ["KAFKA_BOOTSTRAP_SERVERS"]}

  Logins (demo tenants; the first one also opens the admin):
{logins}

  Try it:
    curl -s -X POST {web}/api/v1/conversations -H "Authorization: Token {token}" \\
         -H "Content-Type: application/json" -d '{{"title": "Hello", "mode": "chat"}}'
    curl -s {web}/api/v1/analytics/summary -H "Authorization: Token {token}"

  In another terminal (it finds these services by itself):
    .venv/bin/python manage.py outbox_status
    .venv/bin/python manage.py relay_outbox        # a standby relay
    .venv/bin/python manage.py consume analytics   # one more consumer of the group

  Ctrl-C stops everything; the data stays in {DATA_DIR}.
{"=" * 100}
"""


def _port(variable: str, default: int) -> int:
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal() or not 0 < int(text) < 65_000:
        raise DevstackError(f"{variable}={text} is not a port number")
    return int(text)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT is no obstacle
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _how_it_ended(child: Child) -> str:
    process: subprocess.Popen[bytes] | None = child.process
    code = process.returncode if process else None
    how = f"killed by {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
    return f"{child.name} ended ({how})"
