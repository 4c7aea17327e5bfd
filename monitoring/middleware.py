"""MonitoringMiddleware: probes and scrapes answered, HTTP metrics, correlation id, access log."""

import asyncio
import logging
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import Token
from functools import lru_cache
from types import TracebackType
from typing import Any, NamedTuple, Self

from asgiref.sync import iscoroutinefunction, markcoroutinefunction, sync_to_async
from django.http import HttpRequest
from django.http.response import HttpResponse, HttpResponseBase, StreamingHttpResponse
from opentelemetry import trace
from opentelemetry.context import attach, detach, get_current
from opentelemetry.trace import Span
from prometheus_client import Counter, Histogram

from monitoring import context, views
from monitoring.conf import monitoring_settings, service_name
from monitoring.exemplars import exemplar_of
from monitoring.metrics import HTTP_REQUEST_SECONDS, HTTP_REQUESTS

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("monitoring.access")

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
CLIENT_CLOSED_REQUEST = 499
UNKNOWN = "/unknown"
# Of a stream that breaks: the client was told another status, but what it got of the answer is no success.
_FAILED_LATER = 500
_VIEWS: dict[str, Callable[[HttpRequest], HttpResponse]] = {
    "/health": views.health,
    "/livez": views.livez,
    "/readyz": views.readyz,
    "/metrics": views.metrics,
}
_WAITING_VIEWS = frozenset({views.readyz, views.metrics})
_CORRELATION_ID = re.compile(r"[ -~]{1,128}")
_META_KEY = "monitoring.observation"


class MonitoringMiddleware:
    """Counts and times each request once, gives it a correlation id and writes its access log line.

    Belongs first in MIDDLEWARE: what stands before it is not seen. It answers /health, /livez, /readyz and /metrics
    itself (setting PROBE_PREFIX), so that the hosts, redirects and sessions of those behind it are not asked of probes
    and scrapers. Works under WSGI and ASGI. A streaming response is recorded when it ends, so its duration includes
    the stream. Implements the specification's PrometheusMiddleware.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        self._is_async = iscoroutinefunction(get_response)
        if self._is_async:
            markcoroutinefunction(self)
        prefix = monitoring_settings().probe_prefix
        self._probes = {} if prefix is None else {prefix + path: view for path, view in _VIEWS.items()}
        _series(service_name(), "GET", None, 500)  # the rate of errors is 0, not unknown, before the first one

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        if self._is_async:
            return self._call_async(request)
        with _Observation(request) as observation:
            probe = self._probes.get(request.path_info)
            if probe is None:
                return observation.responded(self.get_response(request))
            observation.probe = request.path_info
            return observation.responded(probe(request))

    async def _call_async(self, request: HttpRequest) -> HttpResponseBase:
        with _Observation(request) as observation:
            probe = self._probes.get(request.path_info)
            if probe is None:
                return observation.responded(await self.get_response(request))
            observation.probe = request.path_info
            if probe in _WAITING_VIEWS:
                # In no request's thread: those wait for one another.
                return observation.responded(await sync_to_async(probe, thread_sensitive=False)(request))
            return observation.responded(probe(request))


def span_started(span: Span, request: HttpRequest) -> None:
    """OpenTelemetry's request hook: tell the request's observation its trace."""
    observation: _Observation | None = request.META.get(_META_KEY)
    if observation is not None:
        observation.use_trace(span)


class _Observation:
    """One request on its way through: sets the context, and records it once when it is over."""

    probe = ""
    """The path, where it is one that the middleware answers itself."""
    _status = 500  # of a request that ends in an exception
    _is_streaming = False
    _is_recorded = False
    _exemplar: dict[str, str] | None = None

    def __init__(self, request: HttpRequest) -> None:
        self._request = request
        self._log_extra: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        meta = self._request.META
        # Not request.headers, which is made of all of them.
        given: str = meta.get("HTTP_X_CORRELATION_ID") or meta.get("HTTP_X_REQUEST_ID") or ""
        self._is_given = _CORRELATION_ID.fullmatch(given) is not None
        self._correlation_id = given if self._is_given else _random_id()
        self._tokens: tuple[Token[str], Token[str], Token[Any]] = (
            context.correlation_id.set(self._correlation_id),
            context.tenant_id.set(""),
            context.event_id.set(""),
        )
        # Taken back at the end: a request that is torn out of its span leaves it behind as the current one,
        # and all later requests of the thread would join that trace.
        self._trace_token = attach(get_current())
        self._service = service_name()
        meta[_META_KEY] = self
        self.use_trace(trace.get_current_span())
        return self

    def use_trace(self, span: Span) -> None:
        """Log the request under this span, and correlate by its trace when the client gave no id."""
        ids = span.get_span_context()
        if not ids.is_valid:
            return
        self._log_extra["trace_id"] = trace_id = f"{ids.trace_id:032x}"
        self._log_extra["span_id"] = f"{ids.span_id:016x}"
        self._exemplar = exemplar_of(ids)
        if not self._is_given:
            self._correlation_id = trace_id
            context.correlation_id.set(trace_id)

    def responded(self, response: HttpResponseBase) -> HttpResponseBase:
        self._status = response.status_code
        response.headers["X-Correlation-ID"] = self._correlation_id
        if isinstance(response, StreamingHttpResponse):
            self._is_streaming = True
            self._record_at_end_of(response)
        return response

    def _record_at_end_of(self, response: StreamingHttpResponse) -> None:
        close = response.close

        # WSGI servers close the response when the last chunk is out, when a chunk fails and when the client has gone.
        def close_and_record() -> None:
            try:
                close()
            finally:
                self._record()

        response.close = close_and_record  # type: ignore[method-assign]
        # Under ASGI Django does not when a chunk fails. (A file goes its own way to the server: left as it is.)
        if response.is_async:
            response.streaming_content = self._async_chunks(response.streaming_content)
        elif getattr(response, "file_to_stream", None) is None:
            response.streaming_content = self._chunks(response.streaming_content)

    def _chunks(self, chunks: Any) -> Iterator[bytes]:
        try:
            yield from chunks
        except Exception:
            self._status = _FAILED_LATER
            raise
        finally:
            self._record()

    async def _async_chunks(self, chunks: Any) -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks:
                yield chunk
        except Exception:
            self._status = _FAILED_LATER
            raise
        finally:
            self._record()

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and issubclass(error, asyncio.CancelledError):
            self._status = CLIENT_CLOSED_REQUEST  # how ASGI servers stop a request whose client has gone
        # Kept for a streaming response, whose line is written when this context is gone.
        self._log_extra["correlation_id"] = self._correlation_id
        if tenant_id := context.tenant_id.get():
            self._log_extra["tenant_id"] = tenant_id
        if not self._is_streaming:
            self._record()
        self._request.META.pop(_META_KEY, None)  # or the two would keep each other alive until the collector comes
        detach(self._trace_token)
        correlation_id, tenant, event_id = self._tokens
        context.event_id.reset(event_id)
        context.tenant_id.reset(tenant)
        context.correlation_id.reset(correlation_id)

    def _record(self) -> None:
        if self._is_recorded:
            return
        self._is_recorded = True
        seconds = time.perf_counter() - self._started
        try:
            method = self._request.method if self._request.method in METHODS else "OTHER"
            match = self._request.resolver_match
            route = match.route if match is not None else self.probe[1:] or None
            series = _series(self._service, method, route, self._status)
            series.requests.inc()
            series.seconds.observe(seconds, self._exemplar)
            is_probe = self.probe or (match is not None and match.func in _VIEWS.values())
            level = logging.DEBUG if is_probe else logging.INFO
            if access_logger.isEnabledFor(level):
                extra = {
                    "method": method,
                    "path": series.path,
                    "status": self._status,
                    "duration_ms": round(seconds * 1000, 3),
                    **self._log_extra,
                }
                # Not log(), which would walk up the stack to find this line here.
                access_logger.handle(
                    access_logger.makeRecord(
                        access_logger.name, level, __file__, 0, series.message, (), None, "_record", extra
                    )
                )
        except Exception:  # a full disk under the log must not become a failed request
            logger.exception("a request could not be recorded")


class _Series(NamedTuple):
    """What all requests of the same kind have in common."""

    path: str
    message: str
    requests: Counter
    seconds: Histogram


@lru_cache(10_000)
def _series(service: str, method: str, route: str | None, status: int) -> _Series:
    path = _path_pattern(route)
    # A counter that is born with its first error shows no increase for it: it begins at 0, with the first request.
    HTTP_REQUESTS.labels(service, method, path, "500")
    return _Series(
        path=path,
        message=f"{method} {path} {status}",
        requests=HTTP_REQUESTS.labels(service, method, path, str(status)),
        seconds=HTTP_REQUEST_SECONDS.labels(service, method, path),
    )


def _path_pattern(route: str | None) -> str:
    """Return the path as in `/api/v1/conversations/<uuid:id>`; `/unknown` for one that matched no route (None)."""
    # Regular expressions of included URLs each begin with an anchor of their own.
    return UNKNOWN if route is None else "/" + route.removeprefix("^").replace("/^", "/")


def _random_id() -> str:
    """A UUID of version 4 as 32 digits, as uuid4().hex but without asking the system for each."""
    bits = random.getrandbits(128)
    return f"{bits & ~(0xF << 76 | 0b11 << 62) | (4 << 76 | 0b10 << 62):032x}"
