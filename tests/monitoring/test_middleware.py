"""MonitoringMiddleware through real requests: metrics, correlation id, access log, under WSGI and ASGI."""

import asyncio
import logging
from uuid import UUID, uuid4

import pytest
from django.core.asgi import get_asgi_application
from django.test import AsyncClient, Client
from opentelemetry import trace
from prometheus_client import REGISTRY

from monitoring import context
from monitoring.conf import service_name

from .conftest import counted
from .project import urls

pytestmark = pytest.mark.urls("tests.monitoring.project.urls")


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
    assert len(new) <= 3
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
    for path in ("/health", "/livez", "/metrics"):
        client.get(path)
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


def test_async_request_whose_client_has_gone_is_no_server_error():
    messages = iter([{"type": "http.request", "body": b""}, {"type": "http.disconnect"}])
    urls.waiting.clear()

    async def receive():
        message = next(messages)
        while message["type"] == "http.disconnect" and not urls.waiting:
            await asyncio.sleep(0.01)
        return message

    async def send(message):
        raise AssertionError(f"nobody is there for {message}")

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/wait-for-ever",
        "query_string": b"",
        "headers": [(b"host", b"testserver")],
    }
    labels = {"path": "/wait-for-ever", "status": "499"}
    before = counted("http_requests_total", **labels)

    async def request():
        await asyncio.wait_for(get_asgi_application()(scope, receive, send), 10)

    asyncio.run(request())
    assert counted("http_requests_total", **labels) == before + 1
