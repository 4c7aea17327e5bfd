"""Spans over real OTLP/gRPC: from the web server, from a worker, sampled, and with the collector away."""

import time

import grpc
import pytest

from tests.secure_kafka import Certificates

from .conftest import free_port, get, run_python, running_gunicorn, running_receiver, wait_until

needs_openssl = pytest.mark.needs_tool("openssl")

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
ITEM = "0b0e7c7e-6b1f-4c6f-9d0b-2f4a4d1d9c55"
SAMPLED = f"00-{TRACE_ID}-b7ad6b7169203331-01"


def test_request_spans_arrive(tmp_path, receiver):
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{receiver.endpoint}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    with running_gunicorn(tmp_path, **environment) as server:
        item = f"{server.url}/items/{ITEM}?token=hush&page=2"
        assert get(item, traceparent=SAMPLED).json()["trace_id"] == TRACE_ID
        for path in ("/health", "/livez", "/readyz", "/metrics"):
            get(f"{server.url}{path}")
        get(f"{server.url}/fail")
        wait_until(lambda: len(receiver.spans) >= 2)
        assert server.stop() == 0
    [(resource, span)] = [one for one in receiver.spans if one[1].trace_id.hex() == TRACE_ID]
    assert (
        resource.items()
        >= {
            "service.name": "project",
            "deployment.environment.name": "dev",
            "deployment.environment": "dev",
        }.items()
    )
    assert resource["service.instance.id"]
    assert span.parent_span_id.hex() == "b7ad6b7169203331"
    assert (
        attributes_of(span).items()
        >= {
            "http.request.method": "GET",
            "http.response.status_code": 200,
            "http.route": "/items/<uuid:id>",
            "url.path": f"/items/{ITEM}",
            "url.query": "token=REDACTED&page=REDACTED",
            "url.scheme": "http",
        }.items()
    )
    assert "hush" not in str(receiver.spans)
    assert {one.name for _, one in receiver.spans} == {
        "GET /items/<uuid:id>",
        "GET /fail",
    }  # probes and scrapes are not traced
    [failed] = [one for _, one in receiver.spans if one.name == "GET /fail"]
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


REQUESTS = """
import sys, django
django.setup()
from django.test import Client
from monitoring.tracing import init_tracing, tracing_config
stop = init_tracing(tracing_config())
client = Client(raise_request_exception=False)
for number in range(200):
    headers = {"traceparent": f"00-{number + 1:032x}-{'cd' * 8}-00"} if number % 2 else {}
    client.get("/fail-after-query" if number % 20 < 2 else "/", headers=headers)
stop()
"""


def exported(receiver, code, **environment):
    """Run `code` in a process of its own and return the spans that came of it, by name."""
    done = run_python(code, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint, **environment)
    assert done.returncode == 0, done.stderr
    return {span.name: span for _, span in receiver.spans}


def attributes_of(one):
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in one.attributes}


@pytest.mark.parametrize("mode", ["keep_failed", "ratio", "collector"])
def test_all_failed_requests_are_kept_at_10_percent(receiver, mode):
    exported(receiver, REQUESTS, OTEL_TRACES_SAMPLER_ARG="0.1", SAMPLING_MODE=mode)
    by_trace = {}
    for _, span in receiver.spans:
        by_trace.setdefault(span.trace_id, []).append(span)
    failed = [spans for spans in by_trace.values() if any(span.name == "GET /fail-after-query" for span in spans)]
    fine = len(by_trace) - len(failed)
    if mode == "collector":
        assert (len(failed), fine) == (20, 180)
    elif mode == "ratio":
        assert len(failed) < 10 and 0 < fine < 30
    else:
        assert len(failed) == 20  # those that a caller did not sample, too
        assert 0 < fine < 30  # of the 90 that begin here; 9 expected, standard deviation 3
    for spans in failed:
        request = next(span for span in spans if span.kind == span.SPAN_KIND_SERVER)
        queries = [span for span in spans if span.kind == span.SPAN_KIND_CLIENT]
        assert {query.parent_span_id for query in queries} == {request.span_id}
        assert [query.name for query in queries] == ["CREATE django_content_type", "SELECT django_content_type"]


ONE_REQUEST = """
import sys, django
django.setup()
from django.test import Client
from monitoring.tracing import init_tracing, tracing_config
stop = init_tracing(tracing_config())
Client(raise_request_exception=False).get({path!r})
stop()
"""


@pytest.mark.parametrize("wanted", [False, True])
def test_the_text_of_exceptions_leaves_the_process_only_where_it_is_wanted(receiver, wanted):
    settings = {"TRACE_EXCEPTION_MESSAGES": "yes"} if wanted else {}
    span = exported(receiver, ONE_REQUEST.format(path="/fail-after-query"), **settings)["GET /fail-after-query"]
    [event] = span.events
    told = attributes_of(event)
    assert told["exception.type"] == "RuntimeError"
    assert "in fail_after_query" in told["exception.stacktrace"]
    assert ("somebody wrote" in str(receiver.spans)) is wanted
    assert span.status.message == ("RuntimeError: the secret that somebody wrote" if wanted else "RuntimeError")


def test_a_client_that_asks_for_what_is_not_there_is_no_error(receiver):
    span = exported(receiver, ONE_REQUEST.format(path="/missing/5"))["GET /missing/<int:number>"]
    assert span.status.code == span.status.STATUS_CODE_UNSET
    assert attributes_of(span)["http.response.status_code"] == 404
    assert exported(receiver, ONE_REQUEST.format(path="/no/such/page"))["GET"]


ASYNC_REQUEST = """
import asyncio, django
django.setup()
from django.test import AsyncClient
from monitoring.tracing import init_tracing, tracing_config
stop = init_tracing(tracing_config())
asyncio.run(AsyncClient().get("/async?token=hush&page=2"))
stop()
"""


def test_a_query_is_told_without_its_values_under_asgi_too(receiver):
    span = exported(receiver, ASYNC_REQUEST)["GET /async"]
    assert attributes_of(span)["url.query"] == "token=REDACTED&page=REDACTED"
    assert "hush" not in str(receiver.spans)


CANCELLED = """
import asyncio, django
django.setup()
from django.test import AsyncClient
from monitoring.tracing import init_tracing, tracing_config
from tests.monitoring.project.urls import waiting
stop = init_tracing(tracing_config())
async def main():
    request = asyncio.create_task(AsyncClient(raise_request_exception=False).get("/wait-for-ever"))
    while not waiting:
        await asyncio.sleep(0.01)
    request.cancel()
    await asyncio.wait([request])
    await AsyncClient(raise_request_exception=False).get("/fail")
asyncio.run(main())
stop()
"""


def test_the_span_of_a_request_whose_client_has_gone_ends(receiver):
    spans = exported(receiver, CANCELLED)
    [gone] = [span for span in spans.values() if attributes_of(span)["url.path"] == "/wait-for-ever"]
    assert gone.status.code == gone.status.STATUS_CODE_UNSET
    assert gone.trace_id != spans["GET /fail"].trace_id


def test_conventions_before_the_stable_ones_are_the_users_choice(receiver):
    span = exported(receiver, ASYNC_REQUEST, OTEL_SEMCONV_STABILITY_OPT_IN="http/dup")["GET /async"]
    assert attributes_of(span).items() >= {"http.method": "GET", "http.request.method": "GET"}.items()
    assert "hush" not in str(receiver.spans)


SPANS = """
import sys, django
django.setup()
from opentelemetry import trace
from monitoring.tracing import init_tracing, tracing_config
stop = init_tracing(tracing_config())
tracer = trace.get_tracer("test")
def span(name):
    tracer.start_span(name).end()
"""
FORK = (
    SPANS
    + """
import multiprocessing, os, threading, time
if sys.argv[1:] != ["preload"]:
    span("parent")
    assert trace.get_tracer_provider().force_flush(5000)
else:
    assert threading.active_count() == 1
held = tracer.start_span("held")
def work():
    span("child")
if {how!r} == "multiprocessing":
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(20)
    assert child.exitcode == 0
else:
    pid = os.fork()
    if pid == 0:
        work()
        stop()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
held.end()
span("parent after")
stop()
"""
)


@pytest.mark.parametrize("how", ["multiprocessing", "os.fork"])
@pytest.mark.parametrize("when", ["used", "preload"])
def test_spans_of_a_forked_process_arrive(receiver, how, when):
    code = f"import sys; sys.argv[1:] = [{when!r}]\n" + FORK.format(how=how)
    names = sorted(exported(receiver, code, OTEL_BSP_SCHEDULE_DELAY="600000"))
    assert names == ["child", "held", *(["parent"] if when == "used" else []), "parent after"]
    assert len(receiver.spans) == len(names)  # each once, though the child had a copy of what waited
    instances = {span.name: resource["service.instance.id"] for resource, span in receiver.spans}
    assert instances["child"] != instances["parent after"]


def test_spans_that_wait_when_a_process_just_ends_arrive(receiver):
    assert set(exported(receiver, SPANS + "span('last')", OTEL_BSP_SCHEDULE_DELAY="600000")) == {"last"}


AWAY = (
    SPANS
    + """
import time
started = time.monotonic()
for _ in range(5000):
    span("x")
assert time.monotonic() - started < 5
stop()
assert time.monotonic() - started < 10
from prometheus_client import REGISTRY
for reason in ("queue_full", "export_failed", "shutdown"):
    print(reason, int(REGISTRY.get_sample_value("tracing_spans_dropped_total", {"reason": reason})))
span("too late")
print("late", int(REGISTRY.get_sample_value("tracing_spans_dropped_total", {"reason": "shutdown"})))
"""
)


def test_what_a_collector_that_is_away_does_not_take_is_counted():
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"127.0.0.1:{free_port()}", "OTEL_BSP_MAX_QUEUE_SIZE": "600"}
    done = run_python(AWAY, **environment)
    assert done.returncode == 0, done.stderr
    counts = {name: int(count) for name, count in (line.split() for line in done.stdout.splitlines())}
    assert counts["queue_full"] >= 5000 - 600 - 512
    assert counts["queue_full"] + counts["export_failed"] + counts["shutdown"] == 5000
    assert counts["late"] == counts["shutdown"] + 1
    told = [line for line in done.stderr.splitlines() if "spans dropped" in line]
    assert len(told) == len([name for name in ("queue_full", "export_failed", "shutdown") if counts[name]])


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("certificates") / "made")


@pytest.fixture
def tls_receiver(certificates):
    key, certificate = certificates.server_keystore.with_name("server.key"), certificates.ca.with_name("server.pem")
    credentials = grpc.ssl_server_credentials(
        [(key.read_bytes(), certificate.read_bytes())], certificates.ca.read_bytes(), require_client_auth=True
    )
    with running_receiver(credentials) as receiver:
        yield receiver


def tls(certificates, **changes):
    return {
        "OTEL_EXPORTER_OTLP_CERTIFICATE": str(certificates.ca),
        "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": str(certificates.client_certificate),
        "OTEL_EXPORTER_OTLP_CLIENT_KEY": str(certificates.client_key),
        "OTEL_EXPORTER_OTLP_HEADERS": "Authorization=Bearer%20hush,x-tenant=t1",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
    } | changes


@needs_openssl
def test_tls_with_a_client_certificate_and_headers(tls_receiver, certificates):
    assert "one" in exported(tls_receiver, SPANS + "span('one'); stop()", **tls(certificates))
    assert tls_receiver.headers["authorization"] == "Bearer hush"
    assert tls_receiver.headers["x-tenant"] == "t1"


@needs_openssl
def test_a_collector_signed_by_another_authority_gets_nothing(tls_receiver, certificates):
    code = SPANS + "span('one'); stop(); print('alive')"
    environment = tls(certificates, OTEL_EXPORTER_OTLP_CERTIFICATE=str(certificates.other_ca))
    done = run_python(code, OTEL_EXPORTER_OTLP_ENDPOINT=tls_receiver.endpoint, **environment)
    assert (done.returncode, done.stdout, tls_receiver.spans) == (0, "alive\n", [])
    assert "spans dropped" in done.stderr
    assert "hush" not in done.stderr


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
