"""Worker: its port, its name, its log, its end."""

import http.client
import json
import signal
import socket
import subprocess
import sys
from contextlib import closing

import pytest
from django.core.management.base import CommandError
from django.db import connection
from django.db.migrations.recorder import MigrationRecorder
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector

from monitoring import logging, metrics, worker
from monitoring.conf import monitoring_settings, service_name
from monitoring.health import Readiness
from monitoring.worker import Worker

from .conftest import ROOT, answers, free_port, get, project_environment, sample, wait_until


def test_serves_metrics_and_health():
    port = free_port()
    metrics.OUTBOX_PUBLISHED.labels("worker-test").inc(3)
    with Worker("relay", port):
        url = f"http://127.0.0.1:{port}"
        answer = get(f"{url}/metrics")
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/plain")
        assert sample(answer.text, "outbox_events_published_total", topic="worker-test") == 3
        modern = get(f"{url}/metrics?x=1", Accept="application/openmetrics-text;version=1.0.0")
        assert modern.headers["Content-Type"].startswith("application/openmetrics-text")
        assert get(f"{url}/health").json() == {"status": "healthy"}
        assert get(f"{url}/livez").json() == {"status": "alive"}
        assert get(f"{url}/admin").status == 404
        # What only looks whether there is an answer.
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as client:
            client.request("HEAD", "/livez")
            answer = client.getresponse()
            assert (answer.status, answer.read()) == (200, b"")
    assert not answers(f"{url}/health")


def test_livez_is_503_without_ticks_and_200_again_after_one():
    port = free_port()
    with Worker("relay", port, stale_after_seconds=0.3) as worker:
        url = f"http://127.0.0.1:{port}/livez"
        assert get(url).status == 200
        wait_until(lambda: get(url).status == 503, seconds=5)
        assert get(url).json()["seconds_since_tick"] >= 0.3
        assert get(f"http://127.0.0.1:{port}/health").status == 200
        worker.tick()
        assert get(url).status == 200


@pytest.mark.django_db(transaction=True)
def test_readyz_is_the_same_as_the_webs(monkeypatch):
    monkeypatch.setattr(worker, "readiness", Readiness(fresh_seconds=0))
    recorder = MigrationRecorder(connection)
    last = ("contenttypes", "0002_remove_content_type_name")
    port = free_port()
    with Worker("relay", port):
        url = f"http://127.0.0.1:{port}/readyz"
        recorder.record_unapplied(*last)
        try:
            wait_until(lambda: "migrations are not applied" in get(url).text)
            assert (get(url).status, get(url).json()["status"]) == (503, "unready")
        finally:
            recorder.record_applied(*last)
        wait_until(lambda: get(url).status == 200)
        assert get(url).json() == {"status": "ready"}


def test_livez_is_503_when_one_of_several_loops_does_not_tick():
    port = free_port()
    with Worker("analytics+audit", port, loops=["analytics", "audit"], stale_after_seconds=0.3) as worker:
        url = f"http://127.0.0.1:{port}/livez"

        def status():
            worker.tick("analytics")
            return get(url).status

        assert status() == 200
        wait_until(lambda: status() == 503, seconds=5)
        assert get(url).json()["loops"] == ["audit"]
        worker.tick("audit")
        assert status() == 200
        worker.miss("audit")
        assert status() == 503
        worker.done("audit")
        assert status() == 200


def test_port_in_use_is_a_clear_error_and_leaves_nothing_behind():
    with closing(socket.create_server(("", 0))) as other:
        port = other.getsockname()[1]
        with pytest.raises(CommandError, match=f"port {port} for metrics is in use.*--metrics-port"):
            Worker("relay", port).__enter__()
    assert service_name() == monitoring_settings().service_name


def test_port_0_serves_nothing():
    with Worker("relay", 0) as worker:
        worker.tick()
        assert worker._stack  # entered


def test_name_and_log_stream_are_the_workers_while_it_works():
    name = monitoring_settings().service_name
    assert (service_name(), logging._stream_name) == (name, "stderr")
    with Worker("relay", 0):
        assert (service_name(), logging._stream_name) == (f"{name}-relay", "stdout")
    assert (service_name(), logging._stream_name) == (name, "stderr")


@pytest.mark.django_db(transaction=True)
def test_scrape_that_read_the_database_leaves_no_connection_open():
    used = []

    class FromDatabase(Collector):
        def collect(self):
            with connection.cursor() as cursor:
                cursor.execute("SELECT 42")
                used.append(connection._connections[connection._alias])
                yield GaugeMetricFamily("test_from_database", "From the database", cursor.fetchone()[0])

    collector = FromDatabase()
    metrics.register_collector(collector)
    try:
        port = free_port()
        with Worker("relay", port):
            text = get(f"http://127.0.0.1:{port}/metrics").text
    finally:
        metrics.unregister_collector(collector)
    assert sample(text, "test_from_database") == 42
    assert used[0] is not connection._connections[connection._alias]
    assert used[0].connection is None


WORK = """
import django, logging, signal, sys, time
django.setup()
from monitoring.worker import Worker
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append(_))
with Worker("relay", int(sys.argv[1])) as worker:
    logging.getLogger("loop").info("working")
    while not signals:
        worker.tick()
        time.sleep(0.05)
"""


def test_worker_process_logs_json_to_stdout_and_ends_when_told_to():
    port = free_port()
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", WORK, str(port)],
        env=project_environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/livez"))
        finally:
            process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, b"")
    [line] = [json.loads(line) for line in out.splitlines()]
    assert (line["message"], line["service"]) == ("working", "project-relay")
