"""gRPC interceptors: one contract for real servers, sync, aio, and aio with sync handlers."""

import asyncio
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import monitoring.grpc
from monitoring import context
from monitoring.conf import service_name
from monitoring.grpc import AioMonitoringInterceptor, MonitoringInterceptor

from .conftest import counted, wait_until

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = ("traceparent", f"00-{TRACE_ID}-{SPAN_ID}-01")
SECRET = "my account number is 4711"
KINDS = ["unary_unary", "unary_stream", "stream_unary", "stream_stream"]
OUTCOMES = {
    b"abort": ("NOT_FOUND", False),
    b"abort-internal": ("INTERNAL", True),
    b"set-code": ("PERMISSION_DENIED", False),
    b"raise": ("UNKNOWN", True),
}
_number = itertools.count()


def seen():
    """What a handler sees of its request: it answers with it."""
    span = trace.get_current_span().get_span_context()
    return f"{context.correlation_id.get()} {trace.format_trace_id(span.trace_id)} {context.tenant_id.get()}".encode()


class Service:
    """Does what the request says: the four kinds, each in a sync and an async form."""

    def __init__(self):
        self.waiting, self.may_go_on = threading.Event(), threading.Event()
        self.lines = []

    def act(self, request, servicer_context):
        """Return whether there is an answer."""
        context.tenant_id.set("alice's")
        if request == b"set-code":
            servicer_context.set_code(grpc.StatusCode.PERMISSION_DENIED)
        elif request == b"raise":
            raise RuntimeError(SECRET)
        elif request == b"wait":
            self.waiting.set()
            self.may_go_on.wait(20)

    def abort(self, request, servicer_context):
        codes = {b"abort": grpc.StatusCode.NOT_FOUND, b"abort-internal": grpc.StatusCode.INTERNAL}
        return servicer_context.abort(codes[request], SECRET) if request in codes else None

    def unary_unary(self, request, servicer_context):
        answer = seen()
        self.abort(request, servicer_context)
        self.act(request, servicer_context)
        return answer

    def unary_stream(self, request, servicer_context):
        # Before the first answer: an aio server cannot abort for a sync handler while an answer is on its way.
        self.abort(request, servicer_context)
        yield seen()
        self.act(request, servicer_context)
        yield b"last"

    def stream_unary(self, requests, servicer_context):
        return [self.unary_unary(request, servicer_context) for request in requests][-1]

    def stream_stream(self, requests, servicer_context):
        for request in requests:
            yield from self.unary_stream(request, servicer_context)

    async def a_act(self, request, servicer_context):
        if aborted := self.abort(request, servicer_context):
            await aborted
        if request == b"wait":
            self.waiting.set()
            await asyncio.Event().wait()
        self.act(request, servicer_context)

    async def a_unary_unary(self, request, servicer_context):
        answer = seen()
        await self.a_act(request, servicer_context)
        return answer

    async def a_unary_stream(self, request, servicer_context):
        yield seen()
        await self.a_act(request, servicer_context)
        yield b"last"

    async def a_stream_unary(self, requests, servicer_context):
        return [await self.a_unary_unary(request, servicer_context) async for request in requests][-1]

    async def a_stream_stream(self, requests, servicer_context):
        async for request in requests:
            async for answer in self.a_unary_stream(request, servicer_context):
                yield answer

    async def a_written_stream(self, request, servicer_context):
        await servicer_context.write(seen())
        await self.a_act(request, servicer_context)
        await servicer_context.write(b"last")

    def handlers(self, name, prefix=""):
        makers = {kind: getattr(grpc, f"{kind}_rpc_method_handler") for kind in KINDS}
        handlers = {kind: make(getattr(self, prefix + kind)) for kind, make in makers.items()}
        if prefix:
            handlers["written_stream"] = makers["unary_stream"](self.a_written_stream)
        return grpc.method_handlers_generic_handler(name, handlers)


class FailingInterceptor(grpc.ServerInterceptor):
    def intercept_service(self, continuation, handler_call_details):
        if handler_call_details.method == "/refused":
            raise RuntimeError(SECRET)
        return continuation(handler_call_details)


class AioFailingInterceptor(grpc.aio.ServerInterceptor):
    async def intercept_service(self, continuation, handler_call_details):
        return await FailingInterceptor().intercept_service(continuation, handler_call_details)


class SyncServer:
    prefix = ""

    def __init__(self):
        self.pool = ThreadPoolExecutor(4)
        self.server = grpc.server(self.pool, interceptors=[MonitoringInterceptor(), FailingInterceptor()])
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def add(self, service, name):
        self.server.add_generic_rpc_handlers((service.handlers(name),))

    def close(self):
        self.server.stop(None).wait(10)
        self.pool.shutdown()


class AioServer:
    prefix = "a_"

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.run(self.start())

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    async def start(self):
        self.server = grpc.aio.server(interceptors=[AioMonitoringInterceptor(), AioFailingInterceptor()])
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()

    def add(self, service, name):
        self.server.add_generic_rpc_handlers((service.handlers(name, self.prefix),))

    def close(self):
        self.run(self.server.stop(None))
        self.run(self.cancel_rest())
        self.run(self.loop.shutdown_default_executor())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def in_thread(self, function):
        return await self.loop.run_in_executor(None, function)

    async def cancel_rest(self):
        """A stream of a sync handler that its client has left keeps a thread waiting, for ever."""
        self.loop.set_exception_handler(lambda *_: None)
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)


class AioServerWithSyncHandlers(AioServer):
    prefix = ""


@pytest.fixture(scope="module", params=[SyncServer, AioServer, AioServerWithSyncHandlers])
def server(request):
    server = request.param()
    yield server
    server.close()


@pytest.fixture
def service(server):
    """A service under a name of its own, so that its series begin at nothing."""
    service = Service()
    service.name = f"test.Service{next(_number)}"
    server.add(service, service.name)
    yield service
    service.may_go_on.set()


@pytest.fixture
def client(server, service):
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield Client(channel, service.name)


class Client:
    def __init__(self, channel, service):
        self.channel, self.service = channel, service

    def call(self, kind, *requests, method=None, **options):
        """Call a method; return its call, which for a stream yields answers."""
        stub = getattr(self.channel, kind)(method or f"/{self.service}/{kind}")
        if kind.startswith("unary"):
            return stub(requests[0], **options) if kind.endswith("stream") else stub.future(requests[0], **options)
        return stub(iter(requests), **options) if kind.endswith("stream") else stub.future(iter(requests), **options)

    def answers(self, kind, *requests, **options):
        call = self.call(kind, *requests, **options)
        return list(call) if kind.endswith("stream") else [call.result(20)]


@pytest.fixture
def spans(monkeypatch):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(monitoring.grpc, "tracer", provider.get_tracer("test"))
    yield exporter.get_finished_spans
    provider.shutdown()


def requests(method):
    """[OK, ERROR, timed] of a method."""
    labels = {"service": service_name(), "method": method}
    statuses = [counted("grpc_requests_total", status=status, **labels) for status in ("OK", "ERROR")]
    return [*statuses, counted("grpc_request_duration_seconds_count", **labels)]


def eventually(method, expected):
    """A server may answer a little before its request is over."""
    wait_until(lambda: requests(method) == expected or requests(method)[2] > expected[2])
    assert requests(method) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_is_counted_and_has_a_span(client, service, spans, kind):
    metadata = [TRACEPARENT, ("x-correlation-id", "order 66"), ("binary-bin", b"\xff")]
    answers = client.answers(kind, b"go", metadata=metadata)
    assert answers[0].decode() == f"order 66 {TRACE_ID} "
    assert len(answers) == (2 if kind.endswith("stream") else 1)
    eventually(f"/{service.name}/{kind}", [1, 0, 1])
    [span] = wait_until(spans)
    assert (span.name, span.kind, span.status.is_unset) == (
        f"{service.name}/{kind}",
        trace.SpanKind.SERVER,
        True,
    )
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE_ID, SPAN_ID)
    assert dict(span.attributes) == {
        "rpc.system.name": "grpc",
        "rpc.method": f"{service.name}/{kind}",
        "rpc.response.status_code": "OK",
    }


def test_a_stream_is_one_request(client, service):
    assert len(client.answers("stream_stream", *[b"go"] * 5)) == 10
    assert len(client.answers("stream_unary", *[b"go"] * 5)) == 1
    for kind in ("stream_stream", "stream_unary"):
        eventually(f"/{service.name}/{kind}", [1, 0, 1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("request_", OUTCOMES)
def test_a_request_that_fails(client, service, spans, kind, request_):
    code, is_servers_fault = OUTCOMES[request_]
    with pytest.raises(grpc.RpcError) as raised:
        client.answers(kind, request_)
    assert raised.value.code().name == code
    eventually(f"/{service.name}/{kind}", [0, 1, 1])
    [span] = wait_until(spans)
    assert span.attributes["rpc.response.status_code"] == code
    assert (span.status.status_code is trace.StatusCode.ERROR) == is_servers_fault
    if is_servers_fault:
        assert span.attributes["error.type"] == ("RuntimeError" if request_ == b"raise" else code)
    assert SECRET not in span.to_json()


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_the_client_cancels(server, client, service, spans, kind):
    call = client.call(kind, b"wait")
    assert service.waiting.wait(20)
    assert requests(f"/{service.name}/{kind}") == [0, 0, 0]
    call.cancel()
    eventually(f"/{service.name}/{kind}", [0, 1, 1])  # though a sync handler still waits
    service.may_go_on.set()
    [span] = wait_until(spans)
    assert (span.attributes["rpc.response.status_code"], span.status.is_unset) == ("CANCELLED", True)


def test_a_request_whose_deadline_passes(server, client, service, spans):
    with pytest.raises(grpc.RpcError) as raised:
        client.answers("unary_unary", b"wait", timeout=0.2)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(f"/{service.name}/unary_unary", [0, 1, 1])
    [span] = wait_until(spans)
    assert span.attributes["error.type"] == "DEADLINE_EXCEEDED"


@pytest.mark.parametrize("server", [AioServer], indirect=True)
def test_a_handler_that_writes_its_stream(client, service):
    method = f"/{service.name}/written_stream"
    assert len(client.answers("unary_stream", b"go", method=method)) == 2
    with pytest.raises(grpc.RpcError):
        client.answers("unary_stream", b"abort", method=method)
    eventually(method, [1, 1, 2])


def test_methods_that_are_not_there_share_a_label(client, service, spans):
    before = requests("/unknown")
    for number in range(300):
        with pytest.raises(grpc.RpcError) as raised:
            client.answers("unary_unary", b"go", method=f"/odd.Service/{number}")
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
    eventually("/unknown", [before[0], before[1] + 300, before[2] + 300])
    assert requests("/odd.Service/1") == [0, 0, 0]
    span = wait_until(spans)[0]
    assert (span.name, span.attributes["rpc.method"], span.attributes["rpc.method_original"]) == (
        "grpc",
        "_OTHER",
        "odd.Service/0",
    )
    assert span.attributes["error.type"] == "UNIMPLEMENTED"


def test_a_request_that_a_later_interceptor_cannot_handle(client, service, spans):
    before = requests("/unknown")
    with pytest.raises(grpc.RpcError):
        client.answers("unary_unary", b"go", method="/refused")
    eventually("/unknown", [before[0], before[1] + 1, before[2] + 1])
    [span] = wait_until(spans)
    assert span.attributes["error.type"] == "RuntimeError"
    assert SECRET not in span.to_json()


@pytest.mark.parametrize("given", [None, "", "x" * 129])
def test_without_a_correlation_id_it_is_the_traces(client, given):
    metadata = [] if given is None else [("x-correlation-id", given)]
    [answer] = client.answers("unary_unary", b"go", metadata=metadata)
    correlation_id, trace_id, _ = answer.decode().split(" ")
    assert correlation_id == trace_id != TRACE_ID


def test_no_request_sees_the_context_of_another(client):
    for kind in KINDS:
        first = client.answers(kind, b"go", metadata=[TRACEPARENT, ("x-correlation-id", "first")])[0]
        second = client.answers(kind, b"go")[0]
        assert first.decode() == f"first {TRACE_ID} "
        correlation_id, trace_id, tenant_id = second.decode().split(" ")
        assert (trace_id != TRACE_ID, correlation_id, tenant_id) == (True, trace_id, "")


@pytest.mark.parametrize("server", [SyncServer], indirect=True)
def test_a_client_that_leaves_while_its_next_message_is_waited_for(client, service, spans):
    for _ in range(10):
        sent, done = threading.Event(), threading.Event()

        def messages(sent=sent, done=done):
            yield b"go"
            sent.set()
            done.wait(20)

        call = client.channel.stream_unary(f"/{service.name}/stream_unary").future(messages())
        sent.wait(20)
        call.cancel()
        done.set()
    eventually(f"/{service.name}/stream_unary", [0, 10, 10])
    assert {span.attributes["rpc.response.status_code"] for span in wait_until(spans)} == {"CANCELLED"}


@pytest.mark.parametrize("server", [AioServerWithSyncHandlers], indirect=True)
def test_threads_are_left_as_they_were(server, client):
    for kind in KINDS:
        client.answers(kind, b"go", metadata=[("x-correlation-id", "order 66")])
    left = [server.run(server.in_thread(context.correlation_id.get)) for _ in range(20)]
    assert set(left) == {""}


def test_recording_that_fails_fails_no_request(client, monkeypatch, caplog):
    monkeypatch.setattr(monitoring.grpc, "_series", lambda *labels: 1 / 0)
    for kind in KINDS:
        assert client.answers(kind, b"go")
    wait_until(lambda: "could not be recorded" in caplog.text)
