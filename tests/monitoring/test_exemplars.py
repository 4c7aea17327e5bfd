"""Exemplars lead from a bucket to a sampled trace, where OpenMetrics is asked for."""

import json
import subprocess

import pytest
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from monitoring import metrics
from monitoring.exemplars import observe

from .conftest import answers, free_port, get, run_python, running_gunicorn, wait_until

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
TRACE_ID, SPAN_ID = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331


def exemplars(text, name, **labels):
    """{bucket: (exemplar's labels, value)} of the histogram's series whose labels include those."""
    return {
        sample.labels["le"]: (sample.exemplar.labels, sample.exemplar.value)
        for family in parse_openmetrics(text)
        for sample in family.samples
        if sample.name == f"{name}_bucket" and sample.exemplar and labels.items() <= sample.labels.items()
    }


def observe_in_trace(flags, collection, seconds):
    ids = SpanContext(TRACE_ID, SPAN_ID, is_remote=False, trace_flags=TraceFlags(flags))
    with trace.use_span(NonRecordingSpan(ids)):
        observe(metrics.MILVUS_SEARCH_SECONDS.labels(collection), seconds)


def test_bucket_names_the_sampled_trace_that_fell_into_it():
    observe_in_trace(TraceFlags.SAMPLED, "exemplars", 0.007)
    observe_in_trace(TraceFlags.DEFAULT, "exemplars", 0.03)  # not exported: nobody could look at it
    observe(metrics.MILVUS_SEARCH_SECONDS.labels("exemplars"), 0.0005)  # without a trace
    text = metrics.exposition(OPENMETRICS)[0].decode()
    ids = {"trace_id": "0af7651916cd43dd8448eb211c80319c", "span_id": "b7ad6b7169203331"}
    assert exemplars(text, "milvus_search_duration_seconds", collection="exemplars") == {"0.01": (ids, 0.007)}


@pytest.mark.parametrize("accept", ["", "text/plain", "text/plain;version=1.0.0"])
def test_other_formats_have_none(accept):
    observe_in_trace(TraceFlags.SAMPLED, "plain", 0.007)
    assert b"0af7651916cd43dd" not in metrics.exposition(accept)[0]


SHARED = """
import django, json, os, sys
django.setup()
from tests.monitoring.test_exemplars import *
from monitoring import shared_files
if os.fork() == 0:
    observe_in_trace(TraceFlags.SAMPLED, "shared", 0.0004)
    os._exit(0)
os.wait()
observe_in_trace(TraceFlags.SAMPLED, "shared", 0.007)
text = metrics.exposition(OPENMETRICS)[0].decode()
print(json.dumps(exemplars(text, "milvus_search_duration_seconds", collection="shared")))
print("count", [line for line in text.splitlines() if line.startswith("milvus_search_duration_seconds_count")][0])
"""


def test_process_that_answers_for_all_adds_its_own(tmp_path):
    done = run_python(SHARED, PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    found, count = done.stdout.splitlines()
    ids = {"trace_id": "0af7651916cd43dd8448eb211c80319c", "span_id": "b7ad6b7169203331"}
    assert json.loads(found) == {"0.01": [ids, 0.007]}
    assert count == 'count milvus_search_duration_seconds_count{collection="shared"} 2.0'


@pytest.mark.needs_tool("prometheus")
def test_prometheus_finds_the_trace_of_a_request(tmp_path):
    trace_id, port = "1af7651916cd43dd8448eb211c80319c", free_port()
    with running_gunicorn(tmp_path, WEB_CONCURRENCY="1") as server:
        config = tmp_path / "prometheus.yml"
        config.write_text(f"""
global: {{scrape_interval: 1s, scrape_timeout: 1s}}
scrape_configs: [{{job_name: web, static_configs: [{{targets: ["{server.url.removeprefix("http://")}"]}}]}}]
""")
        command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]
        command += [f"--web.listen-address=127.0.0.1:{port}", "--enable-feature=exemplar-storage", "--log.level=error"]
        with subprocess.Popen(command) as prometheus:
            try:
                get(server.url, traceparent=f"00-{trace_id}-b7ad6b7169203331-01")
                query = "query=http_request_duration_seconds_bucket&start=0&end=9999999999"
                url = f"http://127.0.0.1:{port}/api/v1/query_exemplars?{query}"
                found = wait_until(lambda: answers(url) and get(url).json()["data"])
            finally:
                prometheus.kill()
    assert {one["seriesLabels"]["path"] for one in found} == {"/"}
    assert {one["labels"]["trace_id"] for series in found for one in series["exemplars"]} == {trace_id}
