"""Spans over real OTLP/gRPC: from the web server, from a worker, sampled, and with the collector away."""

import time

from .conftest import free_port, get, run_python, running_gunicorn, wait_until

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SAMPLED = f"00-{TRACE_ID}-b7ad6b7169203331-01"


def test_request_spans_arrive(tmp_path, receiver):
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{receiver.endpoint}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    with running_gunicorn(tmp_path, **environment) as server:
        assert get(server.url, traceparent=SAMPLED).json()["trace_id"] == TRACE_ID
        for path in ("/health", "/livez", "/readyz", "/metrics"):
            get(f"{server.url}{path}")
        get(f"{server.url}/fail")
        wait_until(lambda: len(receiver.spans) >= 2)
        assert server.stop() == 0
    [(resource, span)] = [one for one in receiver.spans if one[1].trace_id.hex() == TRACE_ID]
    assert resource.items() >= {"service.name": "project", "deployment.environment": "dev"}.items()
    assert span.parent_span_id.hex() == "b7ad6b7169203331"
    assert {one.name for _, one in receiver.spans} == {"GET", "GET fail"}  # probes and scrapes are not traced
    [failed] = [one for _, one in receiver.spans if one.name == "GET fail"]
    assert failed.status.code == failed.status.STATUS_CODE_ERROR
    [line] = [line for line in server.lines() if line["logger"] == "tests.monitoring.project.urls"]
    assert (line["trace_id"], line["span_id"]) == (TRACE_ID, span.span_id.hex())


def test_last_spans_of_a_stopping_web_server_arrive(tmp_path, receiver):
    # A delay that no test waits for: only the flush at the end can bring the span.
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "600000"}
    with running_gunicorn(tmp_path, **environment) as server:
        trace_id = get(server.url).json()["trace_id"]
        assert server.stop() == 0
    assert receiver.trace_ids() == {trace_id}


WORKER = """
import django
django.setup()
from opentelemetry import trace
from monitoring.worker import Worker
with Worker("relay", 0):
    with trace.get_tracer("test").start_as_current_span("publish"):
        pass
"""


def test_last_spans_of_a_worker_arrive_under_its_name(receiver):
    done = run_python(WORKER, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint, OTEL_BSP_SCHEDULE_DELAY="600000")
    assert (done.returncode, done.stderr) == (0, "")
    [(resource, span)] = receiver.spans
    assert (resource["service.name"], span.name) == ("project-relay", "publish")


SAMPLE = """
import sys
from opentelemetry import trace
from opentelemetry.propagate import extract
from monitoring.tracing import TracingConfig, init_tracing
stop = init_tracing(
    TracingConfig(
        service_name="sampled", service_version="1.2", environment="prod",
        endpoint=sys.argv[1], sampling_rate=float(sys.argv[2]), enabled=sys.argv[3] == "on",
    )
)
tracer = trace.get_tracer("test")
for _ in range(200):
    with tracer.start_as_current_span("root") as span:
        assert span.get_span_context().is_valid
parent = extract({"traceparent": sys.argv[4]})
with tracer.start_as_current_span("child", context=parent):
    pass
stop()
"""


def sampled(receiver, rate, enabled="on"):
    arguments = repr(["-", receiver.endpoint, str(rate), enabled, SAMPLED])
    done = run_python(f"import sys; sys.argv = {arguments}\n{SAMPLE}")
    assert (done.returncode, done.stderr) == (0, "")
    return [span.name for _, span in receiver.spans]


def test_sampling_rate_0_exports_only_what_a_caller_sampled(receiver):
    assert sampled(receiver, 0.0) == ["child"]


def test_sampling_rate_1_exports_everything(receiver):
    assert sorted(sampled(receiver, 1.0)) == ["child"] + ["root"] * 200
    assert (
        receiver.spans[0][0].items()
        >= {
            "service.name": "sampled",
            "service.version": "1.2",
            "deployment.environment": "prod",
        }.items()
    )


def test_sampling_rate_between_exports_a_part(receiver):
    roots = sampled(receiver, 0.5).count("root")
    assert 50 < roots < 150  # 100 expected, standard deviation 7


def test_disabled_exports_nothing_but_has_ids(receiver):
    assert sampled(receiver, 1.0, enabled="off") == []


def test_collector_away_neither_slows_nor_fails_anything(tmp_path):
    endpoint = f"http://127.0.0.1:{free_port()}"
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "50"}
    with running_gunicorn(tmp_path, **environment) as server:
        started = time.monotonic()
        for _ in range(50):
            answer = get(server.url)
            assert (answer.status, answer.json()["trace_id"] != "") == (200, True)
        assert time.monotonic() - started < 5
        wait_until(lambda: any(line["logger"].startswith("opentelemetry") for line in server.lines()))
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < 10
