"""pytest plugin (`-p tests.services`): the services of a test run, there before Django reads its settings.

PostgreSQL is started at once, unless `DATABASE_URL` names one. Of Kafka only the address is fixed: the broker
itself starts with the first test that asks for the fixture `kafka`. A running `make up` is not touched.

`TEST_KAFKA=embedded` leaves Apache Kafka out. With `CI=true` nothing may be left out: what is missing fails.

A run that is over ends: a thread some test left behind, or a client that cannot be taken down, is named and left.
"""

import contextlib
import faulthandler
import os
import random
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CI = os.environ.get("CI") == "true"
TOPICS = ("conversation.events", "document.events", "identity.events", "default.events")


@pytest.hookimpl(wrapper=True)  # a wrapper runs before pytest-django, which reads the settings in this hook
def pytest_load_initial_conftests(early_config: pytest.Config) -> Iterator[Any]:
    services = Services()
    early_config.add_cleanup(lambda: _end_soon(early_config.stash.get(STATUS, 1)))
    early_config.add_cleanup(services.stop)
    early_config.stash[SERVICES] = services
    services.start()
    return (yield)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[STATUS] = int(exitstatus)


def _end_soon(status: int) -> None:
    """Give the process 30 s to end by itself; then say where each thread is, and end it with the run's own status.

    Python waits for every thread that is no daemon. Once it is taking itself down no thread of Python runs any more:
    a hang there is seen by faulthandler's own, which cannot know the status and fails the run.
    """

    def end() -> None:
        time.sleep(30)
        print("the tests are over, but this process does not end; its threads are at:", file=sys.__stderr__)
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        os._exit(status)

    threading.Thread(target=end, name="end", daemon=True).start()
    faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)


def pytest_report_header(config: pytest.Config) -> str:
    kafka = config.stash[SERVICES].kafka
    return f"kafka: {kafka.kind}" + (f" ({kafka.why_embedded})" if kafka.why_embedded else "")


def pytest_runtest_setup(item: pytest.Item) -> None:
    why_embedded = item.config.stash[SERVICES].kafka.why_embedded
    if item.get_closest_marker("apache_kafka") and why_embedded:
        _leave_out(f"needs Apache Kafka: {why_embedded}")
    for marker in item.iter_markers("needs_tool"):
        (tool,) = marker.args
        if shutil.which(tool) is None:
            _leave_out(f"needs the program {tool}, which is not installed")


def _leave_out(reason: str) -> None:
    if CI:
        pytest.fail(f"nothing may be left out in CI: {reason}", pytrace=False)
    pytest.skip(reason)


class Kafka:
    """The broker of the run, Apache Kafka or the embedded one: one port, and the product's topics."""

    def __init__(self, data_dir: Path, output: int) -> None:
        # Imported here: the module reads VOICEHELPER_DATA_DIR when it is imported.
        from voicehelper.devstack.apache_kafka import ApacheKafka, missing_requirement
        from voicehelper.devstack.embedded_broker import EmbeddedBroker

        forced = os.environ.get("TEST_KAFKA") == "embedded"
        self.why_embedded = "TEST_KAFKA=embedded" if forced else missing_requirement()
        self.was_started = False
        port, controller_port = free_ports(2)
        self._broker: ApacheKafka | EmbeddedBroker
        if self.why_embedded:
            self._broker = EmbeddedBroker(port, TOPICS, output=output)
        else:
            self._broker = ApacheKafka(data_dir / "kafka", port, controller_port=controller_port, output=output)
        self.kind = self._broker.kind
        self.data_dir = data_dir / "kafka"
        self.port = port
        self.bootstrap_servers = self._broker.bootstrap_servers
        self.pause = self._broker.pause
        self.resume = self._broker.resume
        self.kill = self._broker.kill

    def start(self) -> None:
        """Start it, or start it again with what it kept; returns when it answers and the topics are there."""
        self._broker.start()
        self._broker.wait_until_ready()
        if self.kind == "apache" and not self.was_started:
            self._create_topics()
        self.was_started = True

    def stop(self) -> None:
        self._broker.stop()

    def is_running(self) -> bool:
        return self._broker.is_running()

    def _create_topics(self) -> None:
        from confluent_kafka.admin import AdminClient, NewTopic

        admin = AdminClient({"bootstrap.servers": self.bootstrap_servers})
        topics = [NewTopic(topic, num_partitions=6, replication_factor=1) for topic in TOPICS]
        for future in admin.create_topics(topics).values():
            future.result(timeout=30)


class Services:
    """PostgreSQL, Kafka and their directory, for one test run."""

    def start(self) -> None:
        self.data_dir = Path(tempfile.mkdtemp(prefix="voicehelper-tests-"))
        os.environ["VOICEHELPER_DATA_DIR"] = str(self.data_dir)
        from voicehelper.devstack.postgres import FORGETFUL, EmbeddedPostgres

        self.log = (self.data_dir / "services.log").open("ab")
        self.postgres = None
        if not os.environ.get("DATABASE_URL"):
            self.postgres = EmbeddedPostgres(self.data_dir / "postgres", output=self.log.fileno(), settings=FORGETFUL)
            self.postgres.start()
            self.postgres.wait_until_ready()
            os.environ["DATABASE_URL"] = self.postgres.url
        self.kafka = Kafka(self.data_dir, self.log.fileno())
        os.environ["KAFKA_BOOTSTRAP_SERVERS"] = self.kafka.bootstrap_servers

    def stop(self) -> None:
        if hasattr(self, "kafka"):
            self.kafka.kill()
        if getattr(self, "postgres", None):
            self.postgres.stop()
        if hasattr(self, "log"):
            self.log.close()
        shutil.rmtree(self.data_dir)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on, all different.

    From below the range the kernel chooses from: they may be used much later, and again and again.
    """
    ports: set[int] = set()
    while len(ports) < count:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = random.SystemRandom().randrange(20_000, 32_000)
            probe.bind(("127.0.0.1", port))
            ports.add(port)
    return list(ports)


SERVICES = pytest.StashKey[Services]()
STATUS = pytest.StashKey[int]()
