"""Names, types, labels and buckets; and what a scrape gets."""

import math
import re
import socket
import threading
from contextlib import closing

import pytest
from django.test import Client
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    SummaryMetricFamily,
    UnknownMetricFamily,
)
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.registry import Collector

from monitoring import metrics, readers, shared_files, text_format

from .conftest import run_python, sample, wait_until

HANDLER = "consumer_handler_duration_seconds"
PARTITION = ("consumer", "topic", "partition")
SPECIFIED = [
    (metrics.HTTP_REQUESTS, "counter", "http_requests", ("service", "method", "path", "status")),
    (
        metrics.HTTP_REQUEST_SECONDS,
        "histogram",
        "http_request_duration_seconds",
        ("service", "method", "path"),
    ),
    (metrics.OUTBOX_PUBLISHED, "counter", "outbox_events_published", ("topic",)),
    (metrics.OUTBOX_PUBLISH_FAILURES, "counter", "outbox_publish_failures", ("topic", "reason")),
    (metrics.OUTBOX_PUBLISH_BATCH_SECONDS, "histogram", "outbox_publish_batch_duration_seconds", ()),
    (metrics.CONSUMER_WORKER_RESTARTS, "counter", "consumer_worker_restarts", ("worker",)),
    (metrics.OUTBOX_RELAY_LEADER, "gauge", "outbox_relay_leader", ()),
    (metrics.CONSUMER_HANDLED, "counter", "consumer_events_handled", ("consumer", "event_type")),
    (metrics.CONSUMER_DUPLICATES, "counter", "consumer_events_duplicate", ("consumer",)),
    (metrics.CONSUMER_SKIPPED, "counter", "consumer_events_skipped", ("consumer",)),
    (metrics.CONSUMER_RETRIES, "counter", "consumer_event_retries", ("consumer",)),
    (metrics.CONSUMER_DEAD_LETTERED, "counter", "consumer_events_dead_lettered", ("consumer", "reason")),
    (metrics.CONSUMER_HANDLER_SECONDS, "histogram", HANDLER, ("consumer", "handler")),
    (metrics.CONSUMER_LAG, "gauge", "consumer_lag_events", PARTITION),
    (metrics.CONSUMER_LAG_SECONDS, "gauge", "consumer_lag_seconds", PARTITION),
    (metrics.CONSUMER_GROUP_LAG, "gauge", "consumer_group_lag_events", PARTITION),
    (metrics.CONSUMER_GROUP_LAG_SECONDS, "gauge", "consumer_group_lag_seconds", PARTITION),
    (metrics.CONSUMER_GROUP_LAG_FAILURES, "counter", "consumer_group_lag_failures", ("consumer",)),
]


@pytest.mark.parametrize(("metric", "kind", "name", "labels"), SPECIFIED)
def test_metric_is_as_specified(metric, kind, name, labels):
    [family] = metric.collect()
    assert (family.type, family.name) == (kind, name)
    assert metric._labelnames == labels


@pytest.mark.django_db
def test_latency_buckets_are_the_specifications():
    client = Client()
    client.get("/health")
    body, _ = metrics.exposition()
    bounds = {
        one.labels["le"]
        for family in metrics.HTTP_REQUEST_SECONDS.collect()
        for one in family.samples
        if one.name.endswith("_bucket")
    }
    seconds = [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10]
    assert {float(bound) for bound in bounds} == {*seconds, float("inf")}
    assert b"http_request_duration_seconds_bucket" in body
    assert not re.search(rb"^\w+_created[ {]", body, re.MULTILINE)


class Pending(Collector):
    def collect(self):
        yield GaugeMetricFamily("test_pending_events", "Pending", 41)


class Broken(Collector):
    def collect(self):
        yield GaugeMetricFamily("test_half_read", "Half", 1)
        raise RuntimeError("the database is away")


@pytest.fixture
def registered():
    added = []

    def register(collector):
        metrics.register_collector(collector)
        added.append(collector)

    yield register
    for collector in added:
        metrics.unregister_collector(collector)


def test_registered_collector_is_exposed_once(registered):
    pending = Pending()
    registered(pending)
    registered(pending)
    text = metrics.exposition()[0].decode()
    assert text.count("\ntest_pending_events 41.0\n") == 1
    assert sample(text, "monitoring_collector_up", collector="Pending") == 1


def test_broken_collector_spoils_nothing_but_itself(registered):
    registered(Broken())
    registered(Pending())
    text = Client().get("/metrics").content.decode()
    assert sample(text, "monitoring_collector_up", collector="Pending") == 1
    assert 'monitoring_collector_up{collector="Broken"} 0.0' in text
    assert sample(text, "test_pending_events") == 41
    assert "test_half_read" not in text
    assert "http_requests_total" in text


class Hanging(Collector):
    def __init__(self):
        self.reads = 0
        self.goes_on = threading.Event()

    def collect(self):
        self.reads += 1
        self.goes_on.wait(20)
        yield GaugeMetricFamily("test_late", "Late", 1)


def test_collector_that_hangs_costs_a_bounded_time_and_one_thread(registered, monkeypatch):
    monkeypatch.setattr(readers, "READ_SECONDS", 0.05)
    hanging = Hanging()
    registered(hanging)
    registered(Pending())
    for _ in range(3):
        text = metrics.exposition()[0].decode()
        assert 'monitoring_collector_up{collector="Hanging"} 0.0' in text
        assert "test_late" not in text
        assert sample(text, "test_pending_events") == 41
    assert hanging.reads == 1
    hanging.goes_on.set()
    wait_until(lambda: sample(metrics.exposition()[0].decode(), "test_late") == 1)
    text = metrics.exposition()[0].decode()
    assert sample(text, "monitoring_collector_up", collector="Hanging") == 1
    assert hanging.reads > 1  # read anew for each scrape, again


SCRAPE = """
import django, threading, time
django.setup()
from django.db import connection
from django.test import Client
from prometheus_client.metrics_core import GaugeMetricFamily
from monitoring import metrics, readers
readers.READ_SECONDS = 0.5
class State:
    def collect(self):
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        yield GaugeMetricFamily("test_state", "State", 1)
metrics.register_collector(State())
started = time.monotonic()
for _ in range(3):
    text = Client().get("/metrics").content.decode()
is_down = 'monitoring_collector_up{collector="State"} 0.0' in text
print(time.monotonic() - started < 4, threading.active_count(), is_down)
"""


def test_database_that_hangs_does_not_hang_the_scrape():
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = f"postgresql://someone@127.0.0.1:{silent.getsockname()[1]}/none"
        done = run_python(SCRAPE, PROJECT_DATABASE_URL=url)
    assert done.stdout == "True 2 True\n", done.stderr


class Odd(Collector):
    """What prometheus_client's own metrics do not show, but collectors may."""

    def collect(self):
        yield GaugeMetricFamily("test_quotes", 'Back\\slash, "quotes",\nlines', labels=["a", "b"])
        gauge = GaugeMetricFamily("test_gauges", "Values", labels=["a"])
        for number, value in enumerate([0, -1, True, 1e6, 123456789.5, 1e21, 0.1, math.inf, -math.inf, math.nan]):
            gauge.add_metric([f'{number}\\"\n'], value)
        yield gauge
        timed = GaugeMetricFamily("test_timed", "With its time", labels=["a"])
        timed.add_metric(["timestamp"], 1, timestamp=1_790_000_000.5)
        yield timed
        counter = CounterMetricFamily("test_born", "Born", labels=["a"])
        counter.add_metric(["a"], 1, created=1_790_000_000.5)
        yield counter
        yield InfoMetricFamily("test_build", "Build", {"version": "1"})
        yield SummaryMetricFamily("test_summary", "Summary", count_value=1, sum_value=2)
        yield GaugeMetricFamily("test.dotted", "A name in UTF-8", 1)
        yield UnknownMetricFamily("test_unknown", "Unknown", 1)
        yield GaugeMetricFamily("test_unit_seconds", "With its unit", 1, unit="seconds")


@pytest.mark.parametrize(
    "accept",
    [
        "",
        "text/plain;version=1.0.0;escaping=allow-utf-8",
        "application/openmetrics-text;version=1.0.0",
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8",
        "application/openmetrics-text;version=1.0.0;escaping=dots",
        "application/openmetrics-text;version=1.0.0;escaping=values",
    ],
)
def test_text_is_what_prometheus_client_would_write(accept):
    registry = CollectorRegistry()
    registry.register(Odd())
    counted = Counter("test_counted_total", "Counted", ["a", "b"], registry=registry)
    counted.labels("x", "y").inc(3)
    seconds = Histogram("test_seconds", "Seconds", ["b", "z"], registry=registry)
    for value in (0.003, 0.5, 2_000_000):
        seconds.labels("x", "y").observe(value, {"trace_id": "abc"})
    library, content_type = choose_encoder(accept)
    assert text_format.encode(registry, accept) == (library(registry), content_type)


def test_what_cannot_be_written_is_left_out(caplog):
    class Bad(Collector):
        def collect(self):
            yield GaugeMetricFamily("test_surrogate", "No text", labels=["a"])
            family = GaugeMetricFamily("test_surrogate", "No text", labels=["a"])
            family.add_metric(["\udc80"], 1)
            yield family
            family = GaugeMetricFamily("test_no_number", "No number", labels=["a"])
            family.add_metric(["x"], "many")
            yield family
            yield GaugeMetricFamily("test_good", "Good", 1)

    text = text_format.encode(Bad(), "")[0].decode()
    assert 'test_surrogate{a="?"} 1.0' in text
    assert "test_no_number" not in text
    assert "test_good 1.0" in text
    assert "metric test_no_number cannot be written" in caplog.messages


def test_openmetrics_is_served_to_who_asks_for_it():
    Client().get("/health")
    plain = Client().get("/metrics")
    assert plain.headers["Content-Type"].startswith("text/plain")
    modern = Client().get("/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0,*/*;q=0.1"})
    assert modern.headers["Content-Type"].startswith("application/openmetrics-text")
    names = {family.name for family in parse_openmetrics(modern.content.decode())}
    assert {"http_requests", "http_request_duration_seconds"} <= names


def test_head_and_other_methods():
    assert Client().head("/metrics").status_code == 200
    assert Client().post("/metrics").status_code == 405


SHARED = """
import os, subprocess, sys
import django
django.setup()
from monitoring import metrics, shared_files
metrics.CONSUMER_LAG.labels("c", "t", "0").set(5)
metrics.CONSUMER_LAG.labels("c", "t", "1").set(6)
shared_files.forget(metrics.CONSUMER_LAG, "c", "t", "0")
metrics.CONSUMER_RETRIES.labels("c").inc(2)
metrics.CONSUMER_HANDLER_SECONDS.labels("c", "h").observe(1)
if sys.argv[1:]:
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "-c", os.environ["SHARED"]])
        assert child.wait() == 0
        shared_files.bury(child.pid)
    metrics.CONSUMER_LAG.labels("c", "t", "1").set(7)
    print(metrics.exposition()[0].decode())
"""


def test_processes_that_share_files_forget_series_and_keep_what_the_dead_have_counted(tmp_path):
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "SHARED": SHARED}
    text = run_python(f"import sys; sys.argv.append('parent')\n{SHARED}", **environment).stdout
    assert sample(text, "consumer_event_retries_total", consumer="c") == 6
    assert sample(text, "consumer_handler_duration_seconds_count", consumer="c") == 3
    assert 'consumer_lag_events{consumer="c",partition="1",topic="t"} 7.0' in text
    assert 'partition="0"' not in text
    assert len(list(tmp_path.glob("counter_*.db"))) == 2  # one of the living, one of all dead


MERGING = """
import fcntl, os, threading
import django
django.setup()
from pathlib import Path
from monitoring import metrics, shared_files
with (Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]) / "lock").open("a") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # as a process does that puts the files of the dead together
    scrape = threading.Thread(target=metrics.exposition)
    scrape.start()
    scrape.join(0.3)
    waited = scrape.is_alive()
    fcntl.flock(lock, fcntl.LOCK_UN)
    scrape.join(10)
    print(waited, scrape.is_alive())
"""


def test_scrape_reads_no_files_that_are_being_put_together(tmp_path):
    done = run_python(MERGING, PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    assert done.stdout == "True False\n", done.stderr


GAUGES = """
import os, subprocess, sys
import django
django.setup()
from prometheus_client import Gauge
from monitoring import metrics, shared_files
modes = ("all", "liveall", "sum", "livesum", "min", "max", "mostrecent")
gauges = {mode: Gauge(f"test_{mode}", "Gauge", multiprocess_mode=mode) for mode in modes}
for gauge in gauges.values():
    gauge.set(int(sys.argv[1])) if gauge is not gauges["mostrecent"] else gauge.set_to_current_time()
if sys.argv[1] == "5":
    for value in ("3", "7", "4"):
        child = subprocess.Popen([sys.executable, "-c", os.environ["GAUGES"], value])
        assert child.wait() == 0
        shared_files.bury(child.pid)
    print(metrics.exposition()[0].decode())
"""


def test_gauges_of_the_dead(tmp_path):
    """What is a sum, an extreme or the last of all is so also of the dead; what a process has is gone with it."""
    code = f"import sys; sys.argv.append('5')\n{GAUGES}"
    done = run_python(code, PROMETHEUS_MULTIPROC_DIR=str(tmp_path), GAUGES=GAUGES)
    values = {mode: sample(done.stdout, f"test_{mode}") for mode in ("all", "liveall", "livesum", "sum", "min", "max")}
    assert values == {"all": 5, "liveall": 5, "livesum": 5, "sum": 5 + 3 + 7 + 4, "min": 3, "max": 7}, done.stderr
    assert sample(done.stdout, "test_mostrecent") > 1e9


def test_a_forgotten_series_is_gone():
    metrics.CONSUMER_LAG.labels("forgotten", "t", "0").set(5)
    shared_files.forget(metrics.CONSUMER_LAG, "forgotten", "t", "0")
    assert "forgotten" not in metrics.exposition()[0].decode()
