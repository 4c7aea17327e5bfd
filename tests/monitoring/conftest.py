"""Real servers for the monitoring tests: gunicorn with the smallest project, and an OTLP receiver."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from monitoring.tracing import init_tracing, tracing_config

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="session", autouse=True)
def _tracing() -> None:
    """Spans get ids in the test process, as they do in every server."""
    init_tracing(tracing_config())


def free_port() -> int:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_until(condition: Callable[[], Any], *, seconds: float = 20) -> Any:
    """Return what `condition` returned once it is true; fail when it is not within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        if result := condition():
            return result
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


@dataclass
class Answer:
    status: int
    text: str
    headers: dict[str, str]

    def json(self) -> Any:
        return json.loads(self.text)


def get(url: str, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, headers=named)  # noqa: S310 our own servers
    try:
        with urllib.request.urlopen(request, timeout=20) as response:  # noqa: S310
            return Answer(response.status, response.read().decode(), dict(response.headers))
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.read().decode(), dict(error.headers))


def answers(url: str) -> bool:
    try:
        return get(url).status == 200
    except OSError:
        return False


def sample(text: str, name: str, **labels: str) -> float:
    """Sum of the samples of that name in an exposition whose labels include those; 0.0 when there is none."""
    return sum(
        one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
        if one.name == name and labels.items() <= one.labels.items()
    )


def counted(name: str, **labels: str) -> float:
    """Sum of this process's samples of that name whose labels include those."""
    return sum(
        one.value
        for family in REGISTRY.collect()
        for one in family.samples
        if one.name == name and labels.items() <= one.labels.items()
    )


@dataclass
class Server:
    """A gunicorn with two workers that serves the smallest project."""

    process: subprocess.Popen[bytes]
    url: str
    data: Path
    log: Path

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def pids(self) -> set[int]:
        """Workers that answer now."""
        with ThreadPoolExecutor(8) as pool:
            return {int(answer.text) for answer in pool.map(get, [f"{self.url}/pid"] * 16)}

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(20)


def project_environment(**environment: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "PROMETHEUS_", "DJANGO_"))}
    settings = {"DJANGO_SETTINGS_MODULE": "tests.monitoring.project.settings", "PYTHONPATH": str(ROOT)}
    return inherited | settings | environment


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own, in the smallest project."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=project_environment(**environment),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@contextmanager
def running_gunicorn(directory: Path, **environment: str) -> Iterator[Server]:
    port, log = free_port(), directory / "stdout"
    with log.open("wb") as stdout:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "gunicorn"),
                *("-c", "voicehelper/gunicorn.conf.py", "tests.monitoring.project.wsgi:application"),
            ],
            cwd=ROOT,
            stdout=stdout,
            env=project_environment(WEB_PORT=str(port), VOICEHELPER_DATA_DIR=str(directory / "data"), **environment),
        )
    with process:
        try:
            server = Server(process, f"http://127.0.0.1:{port}", directory / "data", log)
            wait_until(lambda: answers(f"{server.url}/livez") or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            yield server
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


@dataclass
class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP collector that keeps what it got: (resource attributes, span)."""

    endpoint: str = ""
    spans: list[tuple[dict[str, str], Any]] = field(default_factory=list)
    headers: dict[str, str | bytes] = field(default_factory=dict)

    def Export(self, request: Any, context: Any) -> Any:
        self.headers = {header.key: header.value for header in context.invocation_metadata()}
        for resource_spans in request.resource_spans:
            resource = {a.key: a.value.string_value for a in resource_spans.resource.attributes}
            for scope_spans in resource_spans.scope_spans:
                self.spans += [(resource, span) for span in scope_spans.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def trace_ids(self) -> set[str]:
        return {span.trace_id.hex() for _, span in self.spans}


@contextmanager
def running_receiver(credentials: grpc.ServerCredentials | None = None) -> Iterator[Receiver]:
    receiver = Receiver()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    receiver.endpoint = f"127.0.0.1:{port}"
    server.start()
    yield receiver
    server.stop(None).wait(10)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with running_receiver() as receiver:
        yield receiver
