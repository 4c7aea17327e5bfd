"""Interceptors for gRPC servers: requests are counted and timed, have a span and a correlation id.

    grpc.server(pool, interceptors=[MonitoringInterceptor()])
    grpc.aio.server(interceptors=[AioMonitoringInterceptor()])

Put it first: what an interceptor before it refuses is not seen. The series are the specification's
(UnaryServerInterceptor), here for streams as well; spans follow OpenTelemetry's conventions for gRPC. A client that
sends `traceparent` in its metadata is the parent: `stub.Method(request, metadata=list(headers.items()))` with the
`headers` that `opentelemetry.propagate.inject(headers)` filled; `x-correlation-id` likewise.
"""

import asyncio
import inspect
import logging
import re
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextvars import copy_context
from functools import cache
from types import TracebackType
from typing import Any, NamedTuple, Self

import grpc
from opentelemetry import trace
from opentelemetry.context import attach
from opentelemetry.propagate import extract
from opentelemetry.trace import SpanKind
from prometheus_client import Counter, Histogram

from monitoring import context
from monitoring.conf import service_name
from monitoring.failures import error_type, mark_failed
from monitoring.labels import bounded
from monitoring.metrics import GRPC_REQUEST_SECONDS, GRPC_REQUESTS

logger = logging.getLogger(__name__)
tracer = trace.get_tracer(__name__)

UNKNOWN_METHOD = "/unknown"
"""Label of methods that the server does not have: clients choose those."""

_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
_CORRELATION_ID = re.compile(r"[ -~]{1,128}")
# Those that tell of a fault of the server's; the others are answers to what the client did.
_SERVER_FAULTS = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)

Handler = Callable[[Any, Any], Any]
WhenOver = Callable[[Any, Callable[[], None]], None]
"""Has a function called when a request is over, whether or not its handler is: (servicer context, function)."""


class MonitoringInterceptor(grpc.ServerInterceptor):  # type: ignore[misc, unused-ignore]
    """Counts and times each request once, of any of the four kinds.

    The status is ERROR when the handler raises, aborts or sets a code other than OK, and when the client cancels or its
    deadline passes first; else OK. A request lasts until its handler is done, for a stream with its last message, or
    until the client has gone: a sync handler goes on then.
    """

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        try:
            handler = continuation(handler_call_details)
        except Exception as error:
            _refuse(handler_call_details, error)
            raise
        if handler is None:
            _refuse(handler_call_details)
            return None
        return _observed(handler, handler_call_details, _observed_sync)


class AioMonitoringInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc, unused-ignore]
    """MonitoringInterceptor for `grpc.aio` servers, whose handlers may be async, async generators or sync."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        try:
            handler = await continuation(handler_call_details)
        except Exception as error:
            _refuse(handler_call_details, error)
            raise
        if handler is None:
            _refuse(handler_call_details)
            return None
        return _observed(handler, handler_call_details, _observed_any)


def _observed(handler: Any, details: Any, observe: Callable[[Handler, str, Mapping[str, str], bool], Handler]) -> Any:
    """Return the method handler with its function observed."""
    kind = _KINDS[2 * handler.request_streaming + handler.response_streaming]
    function = observe(getattr(handler, kind), details.method, _metadata(details), handler.response_streaming)
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(function, handler.request_deserializer, handler.response_serializer)


def _add_callback(servicer_context: Any, function: Callable[[], None]) -> None:
    servicer_context.add_callback(function)


def _observed_sync(
    handle: Handler,
    method: str,
    metadata: Mapping[str, str],
    answers_stream: bool,
    when_over: WhenOver = _add_callback,
) -> Handler:
    # Each in a context of its own, which is left with the request: the threads are used again.
    def unary(request: Any, servicer_context: Any) -> Any:
        def run() -> Any:
            with _Call(method, metadata, servicer_context) as call:
                when_over(servicer_context, call.terminated)
                return handle(request, call.servicer_context)

        return copy_context().run(run)

    def stream(request: Any, servicer_context: Any) -> Iterator[Any]:
        def run() -> Iterator[Any]:
            with _Call(method, metadata, servicer_context) as call:
                when_over(servicer_context, call.terminated)
                yield from handle(request, call.servicer_context)

        own_context, responses = copy_context(), run()
        try:
            while True:
                try:
                    response = own_context.run(next, responses)
                except StopIteration:
                    return
                yield response
        finally:  # also when the client is gone, and nobody wants the rest
            own_context.run(responses.close)  # type: ignore[attr-defined]

    return stream if answers_stream else unary


def _observed_any(handle: Handler, method: str, metadata: Mapping[str, str], answers_stream: bool) -> Handler:
    if inspect.isasyncgenfunction(handle):

        async def generate(request: Any, servicer_context: Any) -> AsyncIterator[Any]:
            with _Call(method, metadata, servicer_context) as call:
                responses = handle(request, call.servicer_context)
                try:
                    async for response in responses:
                        yield response
                finally:
                    await responses.aclose()

        return generate
    if inspect.iscoroutinefunction(handle):

        async def answer(request: Any, servicer_context: Any) -> Any:
            with _Call(method, metadata, servicer_context) as call:
                return await handle(request, call.servicer_context)

        return answer
    # An aio server does not call back a sync handler whose client has gone. But it cancels the request's task, in which
    # interceptors run.
    task, loop = asyncio.current_task(), asyncio.get_running_loop()

    def when_over(servicer_context: Any, function: Callable[[], None]) -> None:
        if task is not None:
            loop.call_soon_threadsafe(task.add_done_callback, lambda done: function())

    return _observed_sync(handle, method, metadata, answers_stream, when_over)


class _Call:
    """One request: its context while the handler runs, and its record when it is over."""

    def __init__(self, method: str, metadata: Mapping[str, str], servicer_context: Any) -> None:
        self._method = method
        self._metadata = metadata
        self._lock = threading.Lock()
        self._has_ended = False
        # An aio server gives its sync handlers a context that does not tell the code.
        self.servicer_context = servicer_context if hasattr(servicer_context, "code") else _CodeKeeper(servicer_context)

    def __enter__(self) -> Self:
        # Nothing of this is taken back: gRPC, or the wrapper above, runs each request in a context of its own.
        self._started = time.perf_counter()
        self._span = _start_span(self._method.removeprefix("/"), self._metadata)
        attach(trace.set_span_in_context(self._span, extract(self._metadata)))
        context.correlation_id.set(_correlation_id(self._metadata, self._span))
        context.tenant_id.set("")
        context.event_id.set("")
        return self

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end(error, is_gone=False)

    def terminated(self) -> None:
        """Called in another thread: the request is over; if its handler is not, the client has gone."""
        self._end(None, is_gone=True)

    def _end(self, error: BaseException | None, *, is_gone: bool) -> None:
        with self._lock:
            if self._has_ended:
                return
            self._has_ended = True
        try:
            code = self._code(error, is_gone=is_gone)
            _record(bounded("grpc_method", self._method), code, time.perf_counter() - self._started)
            _end_span(self._span, code, error)
        except Exception:  # a full disk under the shared metrics must not become a failed request
            logger.exception("a gRPC request could not be recorded")

    def _code(self, error: BaseException | None, *, is_gone: bool) -> grpc.StatusCode:
        """Return the code that the client is answered, or would be if it were still there."""
        is_active = getattr(self.servicer_context, "is_active", None)
        # An async handler is cancelled when the client has gone, a stream closed.
        is_cancelled = error is not None and not isinstance(error, Exception)
        if is_gone or is_cancelled or (is_active is not None and not is_active()):
            remaining = self.servicer_context.time_remaining()
            is_late = remaining is not None and remaining <= 0
            return grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
        code: grpc.StatusCode = self.servicer_context.code() or grpc.StatusCode.OK
        return grpc.StatusCode.UNKNOWN if error is not None and code is grpc.StatusCode.OK else code


class _CodeKeeper:
    """A servicer context, which keeps the code that the handler sets."""

    def __init__(self, servicer_context: Any) -> None:
        self._servicer_context = servicer_context
        self._code: grpc.StatusCode | None = None

    def code(self) -> grpc.StatusCode | None:
        return self._code

    def set_code(self, code: grpc.StatusCode) -> None:
        self._code = code
        self._servicer_context.set_code(code)

    def abort(self, code: grpc.StatusCode, *args: Any, **kwargs: Any) -> Any:
        self._code = code
        return self._servicer_context.abort(code, *args, **kwargs)

    def abort_with_status(self, status: grpc.Status) -> Any:
        self._code = status.code
        return self._servicer_context.abort_with_status(status)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._servicer_context, name)


def _refuse(details: Any, error: Exception | None = None) -> None:
    """Record a request that has come to no handler: the server has no such method, or an interceptor failed."""
    try:
        span = _start_span(
            "_OTHER", _metadata(details), {"rpc.method_original": details.method[:100].removeprefix("/")}
        )
        code = grpc.StatusCode.UNKNOWN if error else grpc.StatusCode.UNIMPLEMENTED
        _record(UNKNOWN_METHOD, code, 0.0)
        _end_span(span, code, error)
    except Exception:
        logger.exception("a gRPC request could not be recorded")


def _metadata(details: Any) -> dict[str, str]:
    return {key: value for key, value in details.invocation_metadata or () if isinstance(value, str)}


def _correlation_id(metadata: Mapping[str, str], span: trace.Span) -> str:
    """Return the client's id if it is 1 to 128 printable ASCII characters, else that of the trace."""
    given = metadata.get("x-correlation-id", "")
    if _CORRELATION_ID.fullmatch(given):
        return given
    ids = span.get_span_context()
    return trace.format_trace_id(ids.trace_id) if ids.is_valid else uuid.uuid4().hex


def _start_span(method: str, metadata: Mapping[str, str], attributes: Mapping[str, str] | None = None) -> trace.Span:
    return tracer.start_span(
        "grpc" if method == "_OTHER" else method,
        context=extract(metadata),
        kind=SpanKind.SERVER,
        attributes={"rpc.system.name": "grpc", "rpc.method": method, **(attributes or {})},
    )


def _end_span(span: trace.Span, code: grpc.StatusCode, error: BaseException | None) -> None:
    span.set_attribute("rpc.response.status_code", code.name)
    if code in _SERVER_FAULTS:
        is_unforeseen = code is grpc.StatusCode.UNKNOWN and isinstance(error, Exception)
        mark_failed(span, error_type(error) if is_unforeseen and error else code.name)
    span.end()


class _Series(NamedTuple):
    ok: Counter
    error: Counter
    seconds: Histogram


@cache
def _series(service: str, method: str) -> _Series:
    """Both statuses are born together: a method that never failed has an error rate of 0, not none."""
    return _Series(
        GRPC_REQUESTS.labels(service, method, "OK"),
        GRPC_REQUESTS.labels(service, method, "ERROR"),
        GRPC_REQUEST_SECONDS.labels(service, method),
    )


def _record(method: str, code: grpc.StatusCode, seconds: float) -> None:
    series = _series(service_name(), method)
    (series.ok if code is grpc.StatusCode.OK else series.error).inc()
    series.seconds.observe(seconds)
