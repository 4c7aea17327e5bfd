"""Real processes: web server, relays and consumers as they are run, on the databases of the test run."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from django.db import connection

from tests.faults.consumers import ConsumerHarness
from tests.services import free_ports
from tests.topics import TopicReader
from voicehelper.identity.models import ApiToken, User
from voicehelper.identity.services import create_tenant, register_user

ROOT = Path(__file__).resolve().parents[2]


class Processes:
    """Starts `manage.py` commands and the web server; ends what is left at the end."""

    def __init__(self, log_dir):
        self._log_dir = log_dir
        self._running = []
        name = connection.settings_dict["NAME"]  # the database of the tests, not the one it was made beside
        self.environment = {
            **os.environ,
            "DATABASE_URL": os.environ["DATABASE_URL"].rpartition("/")[0] + f"/{name}",
            "WEB_CONCURRENCY": "1",
            # A killed member's partitions are given away after this, and not before.
            "KAFKA_SESSION_TIMEOUT_MS": "1500",
        }

    def _start(self, name, *command, **environment):
        log = (self._log_dir / f"{name}-{len(self._running)}.log").open("wb")
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**self.environment, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        log.close()
        self._running.append(process)
        return process

    def manage(self, *arguments):
        return self._start(arguments[0], "manage.py", *map(str, arguments))

    def web(self):
        """Start the web server and return its URL once it is ready."""
        (port,) = free_ports(1)
        process = self._start("web", "-m", "gunicorn", "-c", "voicehelper/gunicorn.conf.py", WEB_PORT=str(port))
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 30
        while True:
            try:
                if httpx.get(f"{url}/readyz").status_code == 200:
                    return url
            except httpx.TransportError:
                pass
            assert process.poll() is None and time.monotonic() < deadline, self.logs()
            time.sleep(0.05)

    def output(self, *arguments):
        """Run a command to its end and return what it printed."""
        result = subprocess.run(
            [sys.executable, "manage.py", *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def status(self):
        return json.loads(self.output("outbox_status", "--json", "--no-lag"))

    def logs(self):
        return "\n".join(log.read_text()[-3000:] for log in sorted(self._log_dir.glob("*.log")))

    def end(self):
        for process in self._running:
            if process.poll() is None:
                process.terminate()
        for process in self._running:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(autouse=True)
def quiet_http_client(caplog):
    caplog.set_level(logging.WARNING, "httpx")


@pytest.fixture
def processes(kafka, tmp_path, transactional_db):
    processes = Processes(tmp_path)
    yield processes
    processes.end()


@pytest.fixture
def fresh_groups(kafka):
    """The product's consumer groups stand at the present end of the topics, which all tests share."""
    for group in ("analytics-service", "audit-service", "notification-service"):
        reader = TopicReader(kafka.bootstrap_servers, group_id=group)
        reader.commit_start()
        reader.close()


@pytest.fixture
def alice(transactional_db):
    user = register_user(
        tenant=create_tenant(name="Demo"), username="alice", password="correct horse battery", role=User.Role.ADMIN
    )
    return user


@pytest.fixture
def authorization(alice):
    return {"Authorization": f"Token {ApiToken.objects.issue(user=alice, name='test').text}"}


def kill_hard(process):
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="session")
def _one_fault_harness(tmp_path_factory):
    directory = tmp_path_factory.mktemp("faults")
    with (directory / "services.log").open("ab") as log:
        harness = ConsumerHarness(directory, output=log.fileno())
        try:
            harness.start()
            yield harness
        finally:
            harness.stop()


@pytest.fixture
def fault_harness(_one_fault_harness):
    """PostgreSQL, Kafka, relays, writers and consumers to which faults may happen.

    See `tests.faults.harness` and `tests.faults.consumers`.
    """
    return _one_fault_harness
