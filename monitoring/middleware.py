"""MonitoringMiddleware: probes and scrapes answered, HTTP metrics, correlation id, access log."""

import asyncio
import logging
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from asgiref.sync import iscoroutinefunction, markcoroutinefunction, sync_to_async
from django.http import HttpRequest
from django.http.response import HttpResponse, HttpResponseBase
from opentelemetry import trace
from opentelemetry.context import attach, get_current
from opentelemetry.trace import Span, SpanContext
from prometheus_client import Counter, Histogram

from monitoring import context, views
from monitoring.access_log import RequestKind
from monitoring.conf import monitoring_settings, service_name
from monitoring.exemplars import exemplar_of
from monitoring.metrics import HTTP_REQUEST_SECONDS, HTTP_REQUESTS

logger = logging.getLogger(__name__)

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
        self._service = service_name()
        prefix = monitoring_settings().probe_prefix
        self._probes = {} if prefix is None else {prefix + path: view for path, view in _VIEWS.items()}
        _series(self._service, "GET", None, 500)  # the rate of errors is 0, not unknown, before the first one

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        if self._is_async:
            return self._call_async(request)
        observation = _Observation(request, self._service)
        response: HttpResponseBase | None = None
        try:
            probe = self._probes.get(request.path_info)
            if probe is None:
                response = self.get_response(request)
            else:
                observation.probe = request.path_info
                response = probe(request)
            return response
        except asyncio.CancelledError:
            observation.status = (
                CLIENT_CLOSED_REQUEST  # as below: a middleware without async makes this run in a thread
            )
            raise
        finally:
            observation.end(request, response)

    async def _call_async(self, request: HttpRequest) -> HttpResponseBase:
        observation = _Observation(request, self._service)
        response: HttpResponseBase | None = None
        try:
            probe = self._probes.get(request.path_info)
            if probe is None:
                response = await self.get_response(request)
            else:
                observation.probe = request.path_info
                # In no request's thread: those wait for one another.
                is_quick = probe not in _WAITING_VIEWS
                response = probe(request) if is_quick else await sync_to_async(probe, thread_sensitive=False)(request)
            return response
        except asyncio.CancelledError:
            observation.status = CLIENT_CLOSED_REQUEST  # how ASGI servers stop a request whose client has gone
            raise
        finally:
            observation.end(request, response)


def span_started(span: Span, request: HttpRequest) -> None:
    """OpenTelemetry's request hook: tell the request's observation its trace."""
    observation: _Observation | None = request.META.get(_META_KEY)
    if observation is not None:
        observation.span = span
        observation.use_trace(span)


class _Observation:
    """One request on its way through: sets the context, and records it once when it is over.

    Each request pays for every line of this: `make bench ONLY=monitoring` says how much.
    """

    __slots__ = (
        "_before",
        "_correlation_id",
        "_is_given",
        "_is_recorded",
        "_match",
        "_method",
        "_outer",
        "_service",
        "_span_ids",
        "_started",
        "_tenant_id",
        "probe",
        "span",
        "status",
    )

    def __init__(self, request: HttpRequest, service: str) -> None:
        """Begin: the request comes in."""
        self._started = time.perf_counter()
        self._service = service
        self._span_ids: SpanContext | None = None
        self._is_recorded = False
        self.probe = ""
        """The path, where it is one that the middleware answers itself."""
        self.status = 500  # of a request that ends in an exception
        self.span: Span | None = None
        meta = request.META
        meta[_META_KEY] = self
        # Not request.headers, which is made of all of them.
        given: str = meta.get("HTTP_X_CORRELATION_ID") or meta.get("HTTP_X_REQUEST_ID") or ""
        self._is_given = given != "" and _CORRELATION_ID.fullmatch(given) is not None
        self._correlation_id = given if self._is_given else _random_id()
        self._before = context.correlation_id.get(), context.tenant_id.get(), context.event_id.get()
        context.correlation_id.set(self._correlation_id)
        if self._before[1] or self._before[2]:
            context.tenant_id.set("")
            context.event_id.set("")
        # Looked at again in the end: a request that is torn out of its span leaves it behind as the current one,
        # and all later requests of the thread would join that trace.
        self._outer = get_current()
        if self._outer:
            self.use_trace(trace.get_current_span())

    def use_trace(self, span: Span) -> None:
        """Log the request under this span, and correlate by its trace when the client gave no id."""
        ids = span.get_span_context()
        if not ids.is_valid:
            return
        self._span_ids = ids
        if not self._is_given:
            self._correlation_id = f"{ids.trace_id:032x}"
            context.correlation_id.set(self._correlation_id)

    def end(self, request: HttpRequest, response: HttpResponseBase | None) -> None:
        """The request leaves the middleware, with a response unless an exception has ended it."""
        # Kept for a stream, whose line is written when the context is gone.
        self._tenant_id = tenant_id = context.tenant_id.get()
        # Not the request itself: the two would keep each other alive until the collector comes.
        self._method, self._match = request.method, request.resolver_match
        if response is None:
            self._record()
            if self.span is not None and self.span.is_recording():
                # The instrumentation does not hear of a request whose client has gone: its trace would never end.
                self.span.end()
        else:
            self.status = response.status_code
            response.headers["X-Correlation-ID"] = self._correlation_id
            if response.streaming:
                self._record_at_end_of(response)
            else:
                self._record()
        if get_current() is not self._outer:
            attach(self._outer)
        before = self._before
        context.correlation_id.set(before[0])
        if tenant_id != before[1]:
            context.tenant_id.set(before[1])
        if context.event_id.get() != before[2]:
            context.event_id.set(before[2])

    def _record_at_end_of(self, response: Any) -> None:
        close = response.close

        # WSGI servers close the response when the last chunk is out, when a chunk fails and when the client has gone.
        def close_and_record() -> None:
            try:
                close()
            finally:
                self._record()

        response.close = close_and_record
        # Under ASGI Django does not when a chunk fails. (A file goes its own way to the server: left as it is.)
        if response.is_async:
            response.streaming_content = self._async_chunks(response.streaming_content)
        elif getattr(response, "file_to_stream", None) is None:
            response.streaming_content = self._chunks(response.streaming_content)

    def _chunks(self, chunks: Any) -> Iterator[bytes]:
        try:
            yield from chunks
        except Exception:
            self.status = _FAILED_LATER
            raise
        finally:
            self._record()

    async def _async_chunks(self, chunks: Any) -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks:
                yield chunk
        except Exception:
            self.status = _FAILED_LATER
            raise
        finally:
            self._record()

    def _record(self) -> None:
        if self._is_recorded:
            return
        self._is_recorded = True
        seconds = time.perf_counter() - self._started
        try:
            ids, match = self._span_ids, self._match
            method = self._method if self._method in METHODS else "OTHER"
            route = match.route if match is not None else self.probe[1:] or None
            series = _series(self._service, method, route, self.status)
            series.requests.inc()
            series.seconds.observe(seconds, ids and exemplar_of(ids))
            series.kind.log(
                seconds,
                is_probe=self.probe != "" or (match is not None and match.func in _VIEWS.values()),
                correlation_id=self._correlation_id,
                tenant_id=self._tenant_id,
                ids=ids,
            )
        except Exception:  # a full disk under the log must not become a failed request
            logger.exception("a request could not be recorded")


class _Series(NamedTuple):
    """What all requests of the same kind have in common."""

    requests: Counter
    seconds: Histogram
    kind: RequestKind


@lru_cache(10_000)
def _series(service: str, method: str, route: str | None, status: int) -> _Series:
    path = _path_pattern(route)
    # A counter that is born with its first error shows no increase for it: it begins at 0, with the first request.
    HTTP_REQUESTS.labels(service, method, path, "500")
    return _Series(
        requests=HTTP_REQUESTS.labels(service, method, path, str(status)),
        seconds=HTTP_REQUEST_SECONDS.labels(service, method, path),
        kind=RequestKind(method, path, status),
    )


def _path_pattern(route: str | None) -> str:
    """Return the path as in `/api/v1/conversations/<uuid:id>`; `/unknown` for one that matched no route (None)."""
    return UNKNOWN if route is None else "/" + route.removeprefix("^")


def _random_id() -> str:
    """A UUID of version 4 as 32 digits, as uuid4().hex but without asking the system for each."""
    bits = random.getrandbits(128)
    return f"{bits & ~(0xF << 76 | 0b11 << 62) | (4 << 76 | 0b10 << 62):032x}"
