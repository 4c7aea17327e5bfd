"""MonitoringMiddleware through real requests: metrics, correlation id, access log, under WSGI and ASGI."""

import asyncio
import gc
import logging
from pathlib import Path
from uuid import UUID, uuid4
from wsgiref.util import FileWrapper

import pytest
from django.conf.urls.i18n import i18n_patterns
from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import FileResponse, HttpResponse, StreamingHttpResponse
from django.test import AsyncClient, Client, RequestFactory
from django.urls import include, path, re_path
from opentelemetry import trace
from opentelemetry.context import attach
from opentelemetry.trace import NonRecordingSpan, SpanContext
from prometheus_client import REGISTRY
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from monitoring import context
from monitoring.conf import service_name

from .conftest import counted, run_python
from .project import urls

pytestmark = pytest.mark.urls(__name__)


def _failing():
    yield b"one"
    raise RuntimeError("this stream fails")


async def _failing_async():
    yield b"one"
    raise RuntimeError("this stream fails")


async def _for_ever():
    while True:
        yield b"more"
        await asyncio.sleep(0.01)


def _file(request):
    return FileResponse(Path(__file__).open("rb"))


def _ok(request, **_):
    return HttpResponse("ok")


def _torn(request):
    """As a request that is torn out of its span: it stays the current one."""
    ids = SpanContext(1, 1, is_remote=False)
    attach(trace.set_span_in_context(NonRecordingSpan(ids)))
    return HttpResponse("ok")


urlpatterns = [
    path("torn", _torn),
    *urls.urlpatterns,
    path("stream-fails", lambda request: StreamingHttpResponse(_failing())),
    path("stream-async-fails", lambda request: StreamingHttpResponse(_failing_async())),
    path("stream-async-for-ever", lambda request: StreamingHttpResponse(_for_ever())),
    path("file", _file),
    path("only-once", _ok),
    path("included/", include([re_path(r"^(?P<id>[0-9]+)$", _ok)])),
    re_path(r"^regex/", include([re_path(r"^included/(?P<id>[0-9]+)$", _ok)])),
    *i18n_patterns(path("about", _ok)),
]


@pytest.fixture
def client():
    return Client(raise_request_exception=False)


@pytest.mark.parametrize(
    ("method", "url", "path", "status"),
    [
        ("GET", "/", "/", "200"),
        ("POST", "/", "/", "200"),
        ("HEAD", "/", "/", "200"),
        ("OPTIONS", "/", "/", "200"),
        ("GET", f"/items/{uuid4()}", "/items/<uuid:id>", "200"),
        ("GET", "/old/17", "/old/[0-9]+$", "200"),
        ("GET", "/no/such/page", "/unknown", "404"),
        ("GET", "/fail", "/fail", "500"),
        ("GET", "/async", "/async", "200"),
        ("GET", "/health", "/health", "200"),
        ("POST", "/health", "/health", "405"),
    ],
)
def test_request_is_counted_once_under_its_route(client, method, url, path, status):
    labels = {"service": service_name(), "method": method, "path": path}
    requests = counted("http_requests_total", **labels)
    of_status = counted("http_requests_total", status=status, **labels)
    timed = counted("http_request_duration_seconds_count", **labels)

    assert client.generic(method, url).status_code == int(status)

    assert counted("http_requests_total", **labels) == requests + 1
    assert counted("http_requests_total", status=status, **labels) == of_status + 1
    assert counted("http_request_duration_seconds_count", **labels) == timed + 1


def test_exception_that_leaves_django_is_counted_once(settings):
    settings.DEBUG_PROPAGATE_EXCEPTIONS = True
    before = counted("http_requests_total", path="/fail", status="500")
    with pytest.raises(RuntimeError):
        Client().get("/fail")
    assert counted("http_requests_total", path="/fail", status="500") == before + 1
    assert context.correlation_id.get() == ""
    assert not trace.get_current_span().get_span_context().is_valid


@pytest.mark.django_db  # closing a response looks at the connections
def test_streaming_response_is_counted_once_when_it_has_been_sent(client):
    before = counted("http_requests_total", path="/stream")
    response = client.get("/stream")
    assert counted("http_requests_total", path="/stream") == before
    assert b"".join(response.streaming_content) == b"one two"
    response.close()
    response.close()
    assert counted("http_requests_total", path="/stream", status="200") == before + 1


@pytest.mark.django_db
def test_streaming_response_that_nobody_read_is_counted(client):
    before = counted("http_request_duration_seconds_count", path="/stream")
    client.get("/stream").close()
    assert counted("http_request_duration_seconds_count", path="/stream") == before + 1


@pytest.mark.django_db
def test_stream_that_fails_is_counted_once_as_failed(client):
    before = counted("http_requests_total", path="/stream-fails")
    response = client.get("/stream-fails")
    with pytest.raises(RuntimeError):
        list(response.streaming_content)
    response.close()
    assert counted("http_requests_total", path="/stream-fails", status="500") == before + 1
    assert counted("http_requests_total", path="/stream-fails") == before + 1


@pytest.mark.django_db
def test_file_is_left_to_the_server_and_counted():
    environ = RequestFactory().get("/file").environ | {"wsgi.file_wrapper": FileWrapper}
    before = counted("http_requests_total", path="/file", status="200")
    sent = get_wsgi_application()(environ, lambda status, headers: None)
    assert isinstance(sent, FileWrapper)
    assert b"".join(sent) == Path(__file__).read_bytes()
    sent.close()
    assert counted("http_requests_total", path="/file", status="200") == before + 1


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("/included/17", "/included/(?P<id>[0-9]+)$"),
        ("/regex/included/17", "/regex/included/(?P<id>[0-9]+)$"),
        ("/en-us/about", "/en-us/about"),
    ],
)
def test_path_of_nested_routes(client, url, path):
    before = counted("http_requests_total", path=path, status="200")
    assert client.get(url).status_code == 200
    assert counted("http_requests_total", path=path, status="200") == before + 1


def test_mount_point_is_not_in_the_path(client, settings):
    settings.FORCE_SCRIPT_NAME = "/mounted"
    before = counted("http_requests_total", path="/async"), counted("http_requests_total", path="/health")
    assert client.get("/async").status_code == 200
    assert client.get("/health").json() == {"status": "healthy"}
    after = counted("http_requests_total", path="/async"), counted("http_requests_total", path="/health")
    assert after == (before[0] + 1, before[1] + 1)


def test_errors_are_0_before_the_first_one(client):
    client.get("/only-once")
    text = client.get("/metrics").content.decode()
    labels = f'method="GET",path="%s",service="{service_name()}",status="500"'
    assert f"http_requests_total{{{labels % '/only-once'}}} 0.0" in text
    assert f"http_requests_total{{{labels % '/unknown'}}} " in text


def test_errors_are_0_from_the_start():
    scrape = "import django; django.setup(); from django.test import Client; print(Client().get('/metrics').text)"
    assert 'path="/unknown",service="project",status="500"} 0.0' in run_python(scrape).stdout


def test_request_in_a_sampled_trace_is_the_exemplar_of_its_bucket(client):
    trace_id = uuid4().hex
    client.get("/async", headers={"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"})
    unsampled = uuid4().hex
    client.get("/fail", headers={"traceparent": f"00-{unsampled}-b7ad6b7169203331-00"})
    text = client.get("/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0"}).content.decode()
    named = [
        (sample.labels["path"], set(sample.exemplar.labels))
        for family in parse_openmetrics(text)
        for sample in family.samples
        if sample.exemplar and sample.exemplar.labels["trace_id"] == trace_id
    ]
    assert named == [("/async", {"trace_id", "span_id"})]
    assert unsampled not in text


def test_request_for_another_host_is_counted(client):
    before = counted("http_requests_total", path="/unknown", status="400")
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert counted("http_requests_total", path="/unknown", status="400") == before + 1


def test_flood_of_odd_requests_makes_few_series(client):
    def series():
        return {
            tuple(sorted(sample.labels.items()))
            for family in REGISTRY.collect()
            for sample in family.samples
            if sample.name == "http_requests_total"
        }

    before = series()
    for number in range(100):
        client.get(f"/odd-{number}/{uuid4()}?{number}")
        client.get(f"/items/{uuid4()}")
        client.generic(f"ODD{number}", "/")
    new = series() - before
    assert len(new) <= 6  # /unknown, the route and the method, and the errors of each, which begin at 0
    assert counted("http_requests_total", method="OTHER", path="/") >= 100


def test_given_correlation_id_is_used_and_returned(client):
    response = client.get("/", headers={"X-Correlation-ID": "order 17", "X-Request-ID": "other"})
    assert response.headers["X-Correlation-ID"] == response.json()["correlation_id"] == "order 17"
    response = client.get("/", headers={"X-Request-ID": "from-the-proxy"})
    assert response.headers["X-Correlation-ID"] == response.json()["correlation_id"] == "from-the-proxy"
    assert client.get("/fail", headers={"X-Request-ID": "a"}).headers["X-Correlation-ID"] == "a"


def test_correlation_id_of_128_characters_is_the_longest(client):
    longest = "x" * 128
    assert client.get("/", headers={"X-Correlation-ID": longest}).headers["X-Correlation-ID"] == longest


@pytest.mark.parametrize("given", ["", "x" * 129, "naïve", "a\tb", "a\nb", "\x7f"])
def test_unusable_correlation_id_is_replaced_by_the_trace_id(client, given):
    response = client.get("/", headers={"X-Correlation-ID": given})
    assert response.headers["X-Correlation-ID"] == response.json()["trace_id"] != ""


def test_correlation_id_without_a_trace_is_random(client):
    # Probes are not traced.
    ids = {client.get("/health").headers["X-Correlation-ID"] for _ in range(2)}
    assert len(ids) == 2
    assert all(UUID(hex=one).version == 4 for one in ids)


def test_incoming_trace_is_continued(client):
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    response = client.get("/", headers={"traceparent": f"00-{trace_id}-b7ad6b7169203331-00"})
    assert response.json() == {"trace_id": trace_id, "correlation_id": trace_id}


def test_request_leaves_no_span_behind(client, settings):
    settings.MIDDLEWARE = ["monitoring.middleware.MonitoringMiddleware"]
    assert client.get("/torn").status_code == 200
    assert not trace.get_current_span().get_span_context().is_valid


def test_context_is_empty_after_a_request(client):
    client.get("/", headers={"X-Correlation-ID": "a"})
    assert (context.correlation_id.get(), context.tenant_id.get(), context.event_id.get()) == ("", "", "")


def test_access_log_line(client, caplog):
    caplog.set_level(logging.INFO)
    response = client.get(f"/items/{uuid4()}?secret=1", headers={"X-Correlation-ID": "abc"})
    [line] = [record for record in caplog.records if record.name == "monitoring.access"]
    assert line.getMessage() == "GET /items/<uuid:id> 200"
    assert (line.method, line.path, line.status) == ("GET", "/items/<uuid:id>", 200)
    assert (line.correlation_id, line.tenant_id) == ("abc", "tenant-of-alice")
    assert line.trace_id == response.json()["trace_id"]
    assert line.duration_ms > 0


def test_probes_are_not_in_the_access_log_at_info(client, caplog):
    caplog.set_level(logging.INFO)
    for probe in ("/health", "/livez", "/metrics"):
        client.get(probe)
    assert [record for record in caplog.records if record.name == "monitoring.access"] == []


def test_request_survives_a_failure_of_monitoring(client, caplog):
    response = client.get("/confuse")
    assert response.status_code == 200
    assert "a request could not be recorded" in caplog.messages


def test_async_requests():
    async def requests():
        client = AsyncClient(raise_request_exception=False)
        given = await client.get("/async", headers={"X-Correlation-ID": "abc"})
        traced = await client.get("/async")
        failed = await client.get("/fail")
        streamed = await client.get("/stream-async")
        before = counted("http_requests_total", path="/stream-async")
        chunks = [chunk async for chunk in streamed.streaming_content]
        streamed.close()
        after = counted("http_requests_total", path="/stream-async")
        return given, traced, failed, chunks, after - before, context.correlation_id.get()

    served = counted("http_requests_total", path="/async", status="200")
    failures = counted("http_requests_total", path="/fail", status="500")
    given, traced, failed, chunks, streams, left = asyncio.run(requests())

    assert given.json()["correlation_id"] == given.headers["X-Correlation-ID"] == "abc"
    assert traced.json()["trace_id"] == traced.headers["X-Correlation-ID"] != ""
    assert failed.status_code == 500
    assert counted("http_requests_total", path="/async", status="200") == served + 2
    assert counted("http_requests_total", path="/fail", status="500") == failures + 1
    assert (chunks, streams) == ([b"one ", b"two"], 1)
    assert left == ""


def asgi_request(path, *, until=lambda sent: False, fails_to_send=False):
    """Send a request through the ASGI application; the client goes away when `until(sent)`. Return what was sent."""
    sent = []
    messages = iter([{"type": "http.request", "body": b""}, {"type": "http.disconnect"}])

    async def receive():
        message = next(messages)
        while message["type"] == "http.disconnect" and not until(sent):
            await asyncio.sleep(0.01)
        return message

    async def send(message):
        sent.append(message)
        if fails_to_send and message["type"] == "http.response.body":
            raise ConnectionResetError

    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "query_string": b"",
        "headers": [(b"host", b"testserver")],
    }

    async def request():
        await asyncio.wait_for(get_asgi_application()(scope, receive, send), 10)

    try:
        asyncio.run(request())
    except (RuntimeError, ConnectionResetError) as error:  # what the server's log would show
        sent.append(type(error))
    return sent


@pytest.mark.parametrize("others", [[], ["whitenoise.middleware.WhiteNoiseMiddleware"]])  # which knows no async
def test_async_request_whose_client_has_gone_is_no_server_error(settings, others):
    settings.MIDDLEWARE = ["monitoring.middleware.MonitoringMiddleware", *others]
    urls.waiting.clear()
    before = counted("http_requests_total", path="/wait-for-ever", status="499")
    assert asgi_request("/wait-for-ever", until=lambda sent: urls.waiting) == []
    assert counted("http_requests_total", path="/wait-for-ever", status="499") == before + 1


@pytest.mark.django_db  # closing a response looks at the connections
@pytest.mark.parametrize(
    ("path", "status", "options"),
    [
        ("/stream-async", "200", {}),
        ("/stream", "200", {}),
        ("/stream-async-for-ever", "200", {"until": lambda sent: len(sent) > 3}),
        ("/stream-async-fails", "500", {}),
        ("/stream-fails", "500", {}),
        ("/stream-async-for-ever", "200", {"fails_to_send": True}),
        ("/file", "200", {}),
    ],
)
@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume synchronous iterators")
@pytest.mark.filterwarnings("ignore:.*SpooledTemporaryFile")  # Django leaves the body of a request that fails open
@pytest.mark.parametrize("others", [[], ["whitenoise.middleware.WhiteNoiseMiddleware"]])
def test_asgi_stream_is_counted_once_however_it_ends(settings, path, status, options, others):
    settings.MIDDLEWARE = ["monitoring.middleware.MonitoringMiddleware", *others]
    all_before, before = (
        counted("http_requests_total", path=path),
        counted("http_requests_total", path=path, status=status),
    )
    sent = asgi_request(path, **options)
    assert sent[0]["status"] == 200
    gc.collect()
    assert counted("http_requests_total", path=path, status=status) == before + 1
    assert counted("http_requests_total", path=path) == all_before + 1


@pytest.mark.django_db
@pytest.mark.parametrize("path", ["/health", "/livez", "/readyz", "/metrics"])
@pytest.mark.parametrize("others", [[], ["whitenoise.middleware.WhiteNoiseMiddleware"]])
def test_asgi_probes(settings, path, others):
    settings.MIDDLEWARE = ["monitoring.middleware.MonitoringMiddleware", *others]
    before = counted("http_requests_total", path=path, status="200")
    start, body, *_ = asgi_request(path)
    assert (start["status"], bool(body["body"])) == (200, True)
    assert counted("http_requests_total", path=path, status="200") == before + 1
