"""MonitoringMiddleware: HTTP metrics, correlation id, access log."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from contextvars import Token
from types import TracebackType
from typing import Any, Self

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from opentelemetry import trace
from opentelemetry.context import attach, detach, get_current
from opentelemetry.trace import Span

from monitoring import context
from monitoring.conf import service_name
from monitoring.metrics import HTTP_REQUEST_SECONDS, HTTP_REQUESTS

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("monitoring.access")

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})
CLIENT_CLOSED_REQUEST = 499
_PROBES = frozenset({"/health", "/livez", "/readyz", "/metrics"})
_CORRELATION_ID = re.compile(r"[ -~]{1,128}")
_META_KEY = "monitoring.observation"


class MonitoringMiddleware:
    """Counts and times each request once, gives it a correlation id and writes its access log line.

    Belongs first in MIDDLEWARE: what stands before it is not seen. Works under WSGI and ASGI. A streaming
    response is recorded when it is closed, so its duration includes the stream. Implements the
    specification's PrometheusMiddleware.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        self._is_async = iscoroutinefunction(get_response)
        if self._is_async:
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        if self._is_async:
            return self._call_async(request)
        with _Observation(request) as observation:
            return observation.responded(self.get_response(request))

    async def _call_async(self, request: HttpRequest) -> HttpResponseBase:
        with _Observation(request) as observation:
            return observation.responded(await self.get_response(request))


def span_started(span: Span, request: HttpRequest) -> None:
    """OpenTelemetry's request hook: tell the request's observation its trace."""
    observation: _Observation | None = request.META.get(_META_KEY)
    if observation is not None:
        observation.use_trace(span)


class _Observation:
    """One request on its way through: sets the context, and records it once when it is over."""

    def __init__(self, request: HttpRequest) -> None:
        self._request = request
        self._status = 500  # of a request that ends in an exception
        self._recorded = False
        self._record_on_close = False
        self._log_extra: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        given = _given_correlation_id(self._request)
        self._names_correlation = not given
        self._correlation_id = given or uuid.uuid4().hex
        self._tokens: list[tuple[Any, Token[Any]]] = [
            (variable, variable.set(value))
            for variable, value in (
                (context.correlation_id, self._correlation_id),
                (context.tenant_id, ""),
                (context.event_id, ""),
            )
        ]
        # Taken back at the end: a request that is torn out of its span leaves it behind as the current one,
        # and all later requests of the thread would join that trace.
        self._trace_token = attach(get_current())
        self._request.META[_META_KEY] = self
        self.use_trace(trace.get_current_span())
        return self

    def use_trace(self, span: Span) -> None:
        """Log the request under this span, and correlate by its trace when the client gave no id."""
        ids = span.get_span_context()
        if not ids.is_valid:
            return
        self._log_extra = {
            "trace_id": trace.format_trace_id(ids.trace_id),
            "span_id": trace.format_span_id(ids.span_id),
        }
        if self._names_correlation:
            self._correlation_id = self._log_extra["trace_id"]
            context.correlation_id.set(self._correlation_id)

    def responded(self, response: HttpResponseBase) -> HttpResponseBase:
        self._status = response.status_code
        response.headers["X-Correlation-ID"] = self._correlation_id
        if response.streaming:
            self._record_on_close = True
            close = response.close

            # Every server closes the response when the last chunk is out or the client has gone.
            def close_and_record() -> None:
                try:
                    close()
                finally:
                    self._record()

            response.close = close_and_record  # type: ignore[method-assign]
        return response

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and issubclass(error, asyncio.CancelledError):
            self._status = CLIENT_CLOSED_REQUEST  # how ASGI servers stop a request whose client has gone
        # Kept for a streaming response, whose line is written when this context is gone.
        self._log_extra |= {"correlation_id": self._correlation_id}
        if tenant_id := context.tenant_id.get():
            self._log_extra |= {"tenant_id": tenant_id}
        if not self._record_on_close:
            self._record()
        detach(self._trace_token)
        for variable, token in self._tokens:
            variable.reset(token)

    def _record(self) -> None:
        if self._recorded:
            return
        self._recorded = True
        seconds = time.perf_counter() - self._started
        try:
            method = self._request.method if self._request.method in METHODS else "OTHER"
            path = _path_pattern(self._request)
            HTTP_REQUESTS.labels(service_name(), method, path, str(self._status)).inc()
            HTTP_REQUEST_SECONDS.labels(service_name(), method, path).observe(seconds)
            access_logger.log(
                logging.DEBUG if path in _PROBES else logging.INFO,
                "%s %s %s",
                method,
                path,
                self._status,
                extra={
                    "method": method,
                    "path": path,
                    "status": self._status,
                    "duration_ms": round(seconds * 1000, 3),
                    **self._log_extra,
                },
            )
        except Exception:  # a full disk under the shared metrics must not become a failed request
            logger.exception("a request could not be recorded")


def _given_correlation_id(request: HttpRequest) -> str:
    """Return the caller's id, empty when there is none or it is not 1 to 128 printable ASCII characters."""
    given = request.headers.get("X-Correlation-ID") or request.headers.get("X-Request-ID") or ""
    return given if _CORRELATION_ID.fullmatch(given) else ""


def _path_pattern(request: HttpRequest) -> str:
    """Return the route, as in `/api/v1/conversations/<uuid:id>`; `/unknown` for a path that matched none."""
    match = request.resolver_match
    return "/unknown" if match is None or match.route is None else "/" + match.route.removeprefix("^")
