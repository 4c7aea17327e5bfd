"""Apache Kafka itself: one KRaft node (broker and controller) on loopback; Maven fetches its jars."""

import base64
import fcntl
import os
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from voicehelper.devstack import DevstackError
from voicehelper.devstack.child import Child
from voicehelper.services import BASE_DIR

VERSION = "4.1.2"
OLDEST_JAVA = 17
HOST = "127.0.0.1"
POM = Path(__file__).parent / "kafka" / "pom.xml"
LOGGING = Path(__file__).parent / "kafka" / "log4j2.properties"
JARS = BASE_DIR / "build" / f"apache-kafka-{VERSION}"  # shared by `make up` and tests: fetched once

JVM_OPTIONS = ["-Xms256m", "-Xmx512m", "-XX:+UseSerialGC", "-Djava.awt.headless=true"]
SERVER_PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{host}:{controller_port}
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller_port}
advertised.listeners=PLAINTEXT://{host}:{port}
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
log.dirs={log_dir}
auto.create.topics.enable=false
num.partitions=6
# One node: what is replicated elsewhere has one copy here.
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=1
# Nobody else is about to join a group that is just starting.
group.initial.rebalance.delay.ms=0
# Clients of a development broker may want to notice a dead member sooner than the default's 6 s.
group.min.session.timeout.ms=1000
# A killed broker may not come back before its old session has expired.
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
"""


class ApacheKafka(Child):
    """One node. `start()` returns at once, `wait_until_ready()` when it answers a metadata request.

    Stopped, killed or paused, it comes back on the same port with the same data.
    """

    kind = "apache"

    def __init__(
        self,
        data_dir: Path,
        port: int,
        *,
        output: int,
        controller_port: int | None = None,
        properties: Mapping[str, str] | None = None,
        jvm_options: Sequence[str] = (),
    ) -> None:
        """`controller_port`: `port` + 1 unless given; nobody but Kafka itself connects to it.

        `properties`: of the server, over those above: more listeners, TLS, SASL, an authorizer. They may hold
        passwords, so the file that they are written to is for its owner only.
        """
        self.data_dir = data_dir.resolve()
        self._more_properties = dict(properties or {})
        self.port = port
        self.controller_port = controller_port or port + 1
        self.bootstrap_servers = f"{HOST}:{port}"
        self._properties = self.data_dir / "server.properties"
        command = [_java() or "java", *JVM_OPTIONS, *jvm_options, f"-Dlog4j2.configurationFile={LOGGING}"]
        super().__init__(
            "kafka",
            [*command, "-cp", JARS / "*", "kafka.Kafka", self._properties],
            output=output,
            stop_seconds=30,
        )

    def start(self) -> None:
        """Fetch the jars and format the data directory where that has not been done, then start the broker.

        Raises DevstackError when Java or Maven is missing or too old.
        """
        if self.is_running():
            return
        problem = missing_requirement()
        if problem:
            raise DevstackError(f"Apache Kafka cannot run here: {problem}")
        fetch_jars()
        self._write_properties()
        super().start()

    def wait_until_ready(self, timeout_seconds: float = 90) -> None:
        """Return when a client gets its metadata. Raises DevstackError when none does in time."""
        deadline = time.monotonic() + timeout_seconds
        client = AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0, "reconnect.backoff.ms": 50})
        while True:
            try:
                client.list_topics(timeout=1)
                return
            except KafkaException as error:
                if not self.is_running() or time.monotonic() > deadline:
                    raise DevstackError(f"Apache Kafka on port {self.port} does not start: {error}") from error

    def _write_properties(self) -> None:
        log_dir = self.data_dir / "log"
        self.data_dir.mkdir(parents=True, exist_ok=True)
        written = SERVER_PROPERTIES.format(
            host=HOST, port=self.port, controller_port=self.controller_port, log_dir=log_dir
        )
        # Of two lines with the same name the later one counts.
        written += "".join(f"{name}={value}\n" for name, value in self._more_properties.items())
        self._properties.touch(mode=0o600)
        self._properties.write_text(written)
        if (log_dir / "meta.properties").exists():
            return
        # Kafka wants 22 characters of URL-safe base64, the first of which may not be a dash.
        cluster_id = "A" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode()[1:22]
        java: list[str | Path] = [
            _java() or "java",
            f"-Dlog4j2.configurationFile={LOGGING}",
            "-cp",
            JARS / "*",
        ]
        options: list[str | Path] = [
            "--config",
            self._properties,
            "--cluster-id",
            cluster_id,
            "--ignore-formatted",
        ]
        _run([*java, "kafka.tools.StorageTool", "format", *options])


def missing_requirement() -> str | None:
    """Why Apache Kafka cannot run here, or None when it can."""
    java = _java()
    if java is None:
        return f"there is no Java; install {OLDEST_JAVA} or newer (Debian: default-jre-headless)"
    answer = subprocess.run([java, "-version"], capture_output=True, text=True).stderr
    version = re.search(r'version "(\d+)', answer)
    if version is None or int(version[1]) < OLDEST_JAVA:
        found = answer.strip().partition("\n")[0]
        return f"Java {OLDEST_JAVA} or newer is needed, {java} is: {found}"
    if not _jars_are_complete() and shutil.which("mvn") is None:
        return "Maven (mvn) is needed to fetch its jars (Debian: maven)"
    return None


def fetch_jars() -> None:
    """Download Kafka and what it needs into `JARS`, once. Raises DevstackError when Maven fails."""
    JARS.parent.mkdir(parents=True, exist_ok=True)
    with JARS.with_name(JARS.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a test run and `make up` may both be at their first start
        if _jars_are_complete():
            return
        shutil.rmtree(JARS, ignore_errors=True)
        _run(["mvn", "-q", "-B", "-f", POM, "dependency:copy-dependencies", f"-DoutputDirectory={JARS}"])
        shutil.copy(POM, JARS)


def _jars_are_complete() -> bool:
    copied = JARS / POM.name  # copied last, and compared: another pom.xml needs other jars
    return copied.exists() and copied.read_bytes() == POM.read_bytes()


def _java() -> str | None:
    return shutil.which("java", path=str(Path(os.environ.get("JAVA_HOME", "")) / "bin")) or shutil.which("java")


def _run(command: Sequence[str | Path]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        shown = (result.stdout + result.stderr).strip()[-2000:]
        raise DevstackError(f"`{' '.join(map(str, command))}` failed:\n{shown}")
