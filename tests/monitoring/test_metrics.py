"""Names, types, labels and buckets; and what a scrape gets."""

import re

import pytest
from django.test import Client
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.registry import Collector

from monitoring import metrics, shared_files

from .conftest import run_python, sample

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
        if collector in metrics._collectors:
            metrics._collectors.remove(collector)


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


def test_a_forgotten_series_is_gone():
    metrics.CONSUMER_LAG.labels("forgotten", "t", "0").set(5)
    shared_files.forget(metrics.CONSUMER_LAG, "forgotten", "t", "0")
    assert "forgotten" not in metrics.exposition()[0].decode()
