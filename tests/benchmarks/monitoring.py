"""What being observed costs: a metric, a request, a trace, a scrape, and memory.

A bare request is one whose view does nothing. A typical request of the API is the mean of one that lists the messages
of a conversation and one that writes a message, with their PostgreSQL.
"""

import gc
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
from django.conf import settings
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.test import RequestFactory
from django.urls import path

from tests.benchmarks.bench import Bench
from tests.benchmarks.report import Row, median_and_spread, number, percentile
from voicehelper.services import BASE_DIR

MIDDLEWARE = "monitoring.middleware.MonitoringMiddleware"
OPENMETRICS = "application/openmetrics-text;version=1.0.0"
SERIES_A_ROUTE = 17  # two counters, a histogram's 13 buckets, its count and its sum
MESSAGES = 20
IN_A_ROW = 20


def bare(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"status": "ok"})


urlpatterns = [path("bare", bare)]


def run(bench: Bench) -> list[Row]:
    scale = bench.scale
    recording = bench.call(time_recording, rounds=scale.rounds, times=scale.recordings)
    requests = bench.call(time_bare_requests, rounds=scale.rounds, times=scale.requests)
    with bench.database() as outbox:
        typical = bench.call(time_typical_requests, url=outbox.url, times=scale.requests // 10)
        scrapes = [bench.call(time_scrapes, url=outbox.url, series=scale.series, times=scale.rounds)]
        shared = bench.services.data_dir / "metrics"
        shared.mkdir()
        environment = {"PROMETHEUS_MULTIPROC_DIR": str(shared)}
        bench.call(make_series, environment=environment, series=scale.series)  # its files stay
        scrapes.append(
            bench.call(time_scrapes, url=outbox.url, environment=environment, series=scale.series, times=scale.rounds)
        )
    memory = bench.call(measure_memory, series=scale.series)
    traced: list[dict[str, list[float]]] = []
    with _receiver() as endpoint:
        for _ in range(scale.rounds):
            round_ = {}
            for is_on in (False, True):
                arguments: dict[str, Any] = {"endpoint": endpoint, "is_on": is_on, "times": scale.requests}
                environment = {"TRACING_ENABLED": str(is_on).lower(), "OTEL_TRACES_SAMPLER_ARG": "0.1"}
                round_[str(is_on)] = bench.call(time_traced_requests, environment=environment, **arguments)
            traced.append(round_)
    return [
        *_of_recording(recording),
        *_of_requests(requests, typical),
        *_of_tracing(traced),
        *_of_scrapes(scrapes, scale.series),
        Row(
            measure="memory of a series",
            value=memory["kilobytes"],
            unit="KB",
            must="<= 3",
            detail=f"resident set; {scale.series:,} series of requests as /metrics shows them, with what is kept "
            f"for them; a scrape adds {number(memory['scrape_megabytes'])} MB once, for its text",
        ),
    ]


def _of_recording(recording: dict[str, list[list[float]]]) -> list[Row]:
    rows = []
    for what, limit, label in (
        ("inc", 1, "counting"),
        ("observe", 2, "observing"),
        ("observe, sampled", None, "observing in a sampled trace, which becomes an exemplar,"),
    ):
        more, spread = median_and_spread([(ours - library) * 1e6 for library, ours in recording[what]])
        library_us = statistics.median(library for library, _ in recording[what]) * 1e6
        rows.append(
            Row(
                measure=f"{label} takes longer than prometheus_client's own by",
                value=more,
                unit="µs",
                must=None if limit is None else f"<= {limit}",
                baseline=f"labels().{what.partition(',')[0]}() of prometheus_client, {number(library_us)} µs",
                detail=f"{spread}; with the service's name, bounded() and, where observed, a look at the trace",
            )
        )
    return rows


def _of_requests(requests: dict[str, list[float]], typical: dict[str, Any]) -> list[Row]:
    adds, spread = median_and_spread([more * 1e6 for more in requests["adds"]])
    quiet, _ = median_and_spread([more * 1e6 for more in requests["adds without log"]])
    bare_us = statistics.median(requests["bare"]) * 1e6
    typical_us = typical["seconds"] * 1e6
    of_each = ", ".join(f"{name} {number(seconds * 1e3)} ms" for name, seconds in typical["of"].items())
    return [
        Row(
            measure="the middleware adds to a request",
            value=adds,
            unit="µs",
            must="<= 25",
            baseline=f"the same Django handler without it, a bare request: {number(bare_us)} µs",
            detail=f"{spread}; metrics, ids and the access log's line as JSON in a file; without that line "
            f"{number(quiet)} µs",
        ),
        Row(
            measure="the middleware's share of a typical request of the API",
            value=adds / typical_us * 100,
            unit="%",
            must="<= 1",
            baseline=f"the API without it, with PostgreSQL, {number(typical_us)} µs",
            detail=f"medians: {of_each}",
        ),
        Row(
            measure="recording of metrics: later answer of a request",
            value=adds / 1e3,
            unit="ms",
            claim=(None, 0.1),
            detail="as above, the access log's line included",
        ),
    ]


def _of_tracing(traced: list[dict[str, Any]]) -> list[Row]:
    def of(is_on: bool, share: float) -> list[float]:
        return [percentile(round_[str(is_on)]["seconds"], share) for round_ in traced]

    ratios = [on / off - 1 for off, on in zip(means(traced, False), means(traced, True), strict=True)]
    more, spread = median_and_spread([ratio * 100 for ratio in ratios])
    later, spread_later = median_and_spread(
        [(on - off) * 1e3 for off, on in zip(of(False, 0.99), of(True, 0.99), strict=True)]
    )
    mean_off, mean_on = (statistics.median(means(traced, is_on)) * 1e6 for is_on in (False, True))
    count = len(traced[0]["True"]["seconds"])
    return [
        Row(
            measure="tracing at 10 % adds to a bare request's time",
            value=more,
            unit="%",
            must="<= 10",
            baseline=f"the product's handler with all its middleware, tracing off: {number(mean_off)} µs",
            detail=f"{spread}; means of {count:,} requests; to a real OTLP receiver in another process",
        ),
        Row(
            measure="tracing at 10 %: 99th percentile of a bare request later by",
            value=later,
            unit="ms",
            must="<= 5",
            detail=spread_later,
        ),
        Row(
            measure="tracing at 10 %: later answer of a request",
            value=(mean_on - mean_off) / 1e3,
            unit="ms",
            claim=(None, 5),
            detail="in the mean",
        ),
    ]


def means(traced: list[dict[str, Any]], is_on: bool) -> list[float]:
    return [statistics.mean(round_[str(is_on)]["seconds"]) for round_ in traced]


def _of_scrapes(scrapes: list[dict[str, list[float]]], series: int) -> list[Row]:
    rows = []
    for must, where, took in (("<= 150", "one process", scrapes[0]), (None, "two workers' shared files", scrapes[1])):
        value, spread = median_and_spread([seconds * 1e3 for seconds in took["ours"]])
        library, _ = median_and_spread([seconds * 1e3 for seconds in took["library"]])
        rows.append(
            Row(
                measure=f"/metrics with {series:,} series, {where}",
                value=value,
                unit="ms",
                must=must,
                baseline=f"prometheus_client's own way, {number(library)} ms",
                detail=f"{spread}; OpenMetrics, as Prometheus asks for it, with what is read from the database",
            )
        )
    return rows


@contextmanager
def _receiver() -> Iterator[str]:
    """Where a collector listens, a process of its own. Raises RuntimeError if no span came."""
    command = [sys.executable, "-m", "tests.benchmarks.otlp_receiver"]
    with subprocess.Popen(command, cwd=BASE_DIR, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().strip()
            received = int(process.communicate("", 30)[0])
        finally:
            process.kill()
    if not received:
        raise RuntimeError("no span reached the collector")


# Jobs


def time_recording(rounds: int, times: int) -> dict[str, list[tuple[float, float]]]:
    """Job: seconds of prometheus_client's own and of ours, for each round."""
    from opentelemetry import trace
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags
    from prometheus_client import CollectorRegistry, Counter, Histogram

    from monitoring.conf import service_name
    from monitoring.exemplars import observe
    from monitoring.labels import bounded

    counter = Counter("bench_total", "Counted", ["service", "tenant_id"], registry=CollectorRegistry())
    histogram = Histogram("bench_seconds", "Observed", ["service", "tenant_id"], registry=CollectorRegistry())
    tenants = [f"tenant-{n}" for n in range(100)]

    def in_trace(flags: int, call: Callable[[], None]) -> Callable[[], None]:
        ids = SpanContext(1 << 127, 1 << 63, is_remote=False, trace_flags=TraceFlags(flags))

        def called() -> None:
            with trace.use_span(NonRecordingSpan(ids)):
                call()

        return called

    def inc() -> None:
        for tenant in tenants:
            counter.labels("voicehelper", tenant).inc()

    def our_inc() -> None:
        for tenant in tenants:
            counter.labels(service_name(), bounded("tenant_id", tenant)).inc()

    def library_observe() -> None:
        for tenant in tenants:
            histogram.labels("voicehelper", tenant).observe(0.01)

    def our_observe() -> None:
        for tenant in tenants:
            observe(histogram.labels(service_name(), bounded("tenant_id", tenant)), 0.01)

    calls = {
        "inc": (inc, our_inc),
        "observe": (library_observe, in_trace(TraceFlags.DEFAULT, our_observe)),
        "observe, sampled": (library_observe, in_trace(TraceFlags.SAMPLED, our_observe)),
    }
    result: dict[str, list[tuple[float, float]]] = {what: [] for what in calls}
    for _ in range(rounds):
        for what, both in calls.items():
            took: list[list[float]] = [[], []]
            for _ in range(times // len(tenants)):
                for place, call in enumerate(both):
                    started = time.perf_counter()
                    call()
                    took[place].append((time.perf_counter() - started) / len(tenants))
            result[what].append((statistics.median(took[0]), statistics.median(took[1])))
    return result


def time_bare_requests(rounds: int, times: int) -> dict[str, list[float]]:
    """Job: seconds of a bare request, and what the middleware adds to it, for each round. The log goes to a file."""
    import logging

    settings.ROOT_URLCONF = __name__
    without, with_it = _application([]), _application([MIDDLEWARE])
    level = logging.getLogger("monitoring.access")
    result: dict[str, list[float]] = {"bare": [], "adds": [], "adds without log": []}
    for round_ in range(rounds + 1):
        for what, at in (("adds", logging.INFO), ("adds without log", logging.ERROR)):
            level.setLevel(at)
            took = _time_in_turns([without, with_it], _environ("GET", "/bare"), times)
            if round_:  # the first warms up
                bare_seconds, observed = (statistics.median(seconds) for seconds in took)
                result[what].append(observed - bare_seconds)
                result["bare"].append(bare_seconds)
    return result


def time_typical_requests(times: int) -> dict[str, Any]:
    """Job: seconds of a typical request of the API without the middleware."""
    from voicehelper.conversations.services import create_conversation, send_message
    from voicehelper.identity.models import ApiToken
    from voicehelper.identity.services import create_tenant, register_user

    user = register_user(tenant=create_tenant(name="Bench"), username="alice", password="correct horse battery")
    conversation = create_conversation(user=user, title="Bench")
    for place in range(MESSAGES):
        send_message(user=user, conversation_id=conversation.id, content=f"What is the answer to question {place}?")
    token = {"HTTP_AUTHORIZATION": f"Token {ApiToken.objects.issue(user=user, name='bench').text}"}
    settings.TENANT_REQUESTS_PER_MINUTE = 10**9  # counted, and never too many
    body = json.dumps({"conversation_id": str(conversation.id), "content": "What is the answer?"}).encode()
    application = _application([name for name in settings.MIDDLEWARE if name.startswith(("django.", "whitenoise."))])
    took = {}
    for name, environ in (
        (f"{MESSAGES} messages read", _environ("GET", f"/api/v1/conversations/{conversation.id}/messages", **token)),
        ("a message written", _environ("POST", "/api/v1/messages", body, **token)),
    ):
        _time_in_turns([application], environ, times // 10)
        took[name] = statistics.median(_time_in_turns([application], environ, times)[0])
    return {"seconds": statistics.mean(took.values()), "of": took}


def time_traced_requests(endpoint: str, is_on: bool, times: int) -> dict[str, list[float]]:
    """Job: seconds of each bare request through the product's handler, with tracing at 10 % or off."""
    from monitoring.tracing import TracingConfig, init_tracing

    settings.ROOT_URLCONF = __name__
    stop = init_tracing(
        TracingConfig(
            service_name="bench",
            service_version="1",
            environment="bench",
            endpoint=endpoint,
            sampling_rate=0.1,
            enabled=is_on,
        )
    )
    application, environ = _application(settings.MIDDLEWARE), _environ("GET", "/bare")
    _time_in_turns([application], environ, times // 10)
    [seconds] = _time_in_turns([application], environ, times)
    stop()
    return {"seconds": seconds}


def make_series(series: int) -> None:
    """Job: as many as the requests of so many routes make; each of the middleware's kinds has a counter of errors."""
    from monitoring.middleware import _series

    for number_ in range(series // SERIES_A_ROUTE):
        made = _series("voicehelper", "GET", f"api/v1/things-{number_}/<uuid:id>", 200)
        made.requests.inc()
        made.seconds.observe(0.01)


def time_scrapes(series: int, times: int) -> dict[str, list[float]]:
    """Job: seconds of a scrape of so many series, ours and prometheus_client's."""
    from prometheus_client import REGISTRY, CollectorRegistry
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.multiprocess import MultiProcessCollector

    from monitoring import metrics, shared_files

    make_series(series)
    registry = REGISTRY
    if shared_files.are_used():
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
    encode, _ = choose_encoder(OPENMETRICS)
    took: dict[str, list[float]] = {"ours": [], "library": []}
    for _ in range(times):
        for name, scrape in (
            ("ours", lambda: metrics.exposition(OPENMETRICS)[0]),
            ("library", lambda: encode(registry)),
        ):
            started = time.perf_counter()
            lines = scrape().count(b"\n")
            took[name].append(time.perf_counter() - started)
            if lines < series:
                raise RuntimeError(f"only {lines} lines for {series} series")
    return took


def measure_memory(series: int) -> dict[str, float]:
    """Job: what the process grows by."""
    from monitoring import metrics

    make_series(SERIES_A_ROUTE)
    metrics.exposition()
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    make_series(series)
    gc.collect()
    after = process.memory_info().rss
    metrics.exposition()
    gc.collect()
    scrape = process.memory_info().rss - after
    return {"kilobytes": (after - before) / 1e3 / series, "scrape_megabytes": scrape / 1e6}


def _application(middleware: Sequence[str]) -> WSGIHandler:
    before, settings.MIDDLEWARE = settings.MIDDLEWARE, list(middleware)
    try:
        return WSGIHandler()
    finally:
        settings.MIDDLEWARE = before


def _environ(method: str, path: str, body: bytes = b"", **headers: str) -> dict[str, Any]:
    request = RequestFactory().generic(method, path, body, content_type="application/json", **headers)
    return request.environ | {"HTTP_HOST": "localhost", "body": body}


def _time_in_turns(applications: Sequence[WSGIHandler], environ: dict[str, Any], times: int) -> list[list[float]]:
    """Seconds of each of so many requests, for each application.

    In turns of IN_A_ROW: one after the other would each find the processor's caches full of the other's.
    """
    took: list[list[float]] = [[] for _ in applications]
    statuses = set()
    for _ in range(times // IN_A_ROW):
        for application, seconds in zip(applications, took, strict=True):
            for _ in range(IN_A_ROW):
                request = environ | {"wsgi.input": io.BytesIO(environ["body"])}
                started = time.perf_counter()
                response = application(request, lambda status, headers: statuses.add(status))
                response.close()
                seconds.append(time.perf_counter() - started)
    if not all(status.startswith("2") for status in statuses):
        raise RuntimeError(f"requests were answered with {statuses}")
    return took
