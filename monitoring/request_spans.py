"""RequestSpans: a span for each request, after OpenTelemetry's stable conventions for HTTP.

Not opentelemetry-instrumentation-django: it takes more time than the rest of a bare request, sees errors in 4xx
answers, tells queries with their values, and never ends the span of a request whose client has gone.
"""

import sys
from collections.abc import Awaitable, Callable, Mapping
from contextvars import Token
from functools import cache, lru_cache
from types import TracebackType
from typing import Any, Self

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.core.signals import got_request_exception
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from opentelemetry import propagate, trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.propagators.textmap import Getter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from monitoring.middleware import METHODS, span_started

_tracer = trace.get_tracer(__name__)

# The probes and the scraper come every few seconds: their traces would drown the others.
_UNTRACED = frozenset({"/health", "/livez", "/readyz", "/metrics"})
_META_KEY = "monitoring.span"


class RequestSpans:
    """Makes a span of each request, child of the caller's; `instrument_requests()` puts it into MIDDLEWARE.

    The span ends when the response leaves this middleware, that of a streaming one before it is streamed. 5xx answers
    are errors, with the exception that led to them. Of the query the names are told, not the values.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        self._is_async = iscoroutinefunction(get_response)
        if self._is_async:
            markcoroutinefunction(self)
        got_request_exception.connect(_note_exception, dispatch_uid="monitoring.request_spans")

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        if self._is_async:
            return self._call_async(request)
        if request.path_info in _UNTRACED:
            response: HttpResponseBase = self.get_response(request)
            return response
        with _RequestSpan(request) as span:
            return span.responded(self.get_response(request))

    async def _call_async(self, request: HttpRequest) -> HttpResponseBase:
        if request.path_info in _UNTRACED:
            response: HttpResponseBase = await self.get_response(request)
            return response
        with _RequestSpan(request) as span:
            return span.responded(await self.get_response(request))


class _RequestSpan:
    __slots__ = ("_request", "_span", "_token")

    _token: Token[Context]

    def __init__(self, request: HttpRequest) -> None:
        self._request = request

    def __enter__(self) -> Self:
        request = self._request
        parent = _parent(request.META)
        method = request.method if request.method in METHODS else "HTTP"
        # Under another span of this process the request is a part of that one's work.
        is_inner = parent is None and trace.get_current_span().get_span_context().is_valid
        span = self._span = _tracer.start_span(
            method or "HTTP", parent, SpanKind.INTERNAL if is_inner else SpanKind.SERVER
        )
        self._token = attach(trace.set_span_in_context(span, parent))
        if span.is_recording():
            request.META[_META_KEY] = span
        span_started(span, request)
        return self

    def responded(self, response: HttpResponseBase) -> HttpResponseBase:
        if self._span.is_recording():
            _describe(self._span, self._request, response.status_code)
        return response

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        detach(self._token)
        span = self._span
        if isinstance(error, Exception) and span.is_recording():
            _describe(span, self._request, 500)
            _fail(span, error)
        span.end()
        self._request.META.pop(_META_KEY, None)


def _describe(span: Span, request: HttpRequest, status: int) -> None:
    meta, match = request.META, request.resolver_match
    method = request.method or ""
    attributes: dict[str, Any] = {
        "http.request.method": method if method in METHODS else "_OTHER",
        "http.response.status_code": status,
        "url.scheme": request.scheme,
        "url.path": request.path,
    }
    if method not in METHODS:
        attributes["http.request.method_original"] = method[:100]
    if match is not None and match.route is not None:
        attributes["http.route"] = route = _pattern(match.route)
        span.update_name(f"{method if method in METHODS else 'HTTP'} {route}")
    if query := meta.get("QUERY_STRING"):
        attributes["url.query"] = _redacted(query)
    if address := meta.get("REMOTE_ADDR"):
        attributes["client.address"] = address
    if agent := meta.get("HTTP_USER_AGENT"):
        attributes["user_agent.original"] = agent
    if host := meta.get("HTTP_HOST"):
        attributes["server.address"] = host.rpartition(":")[0] if host[-1:].isdigit() and ":" in host else host
    if (protocol := meta.get("SERVER_PROTOCOL", "")).startswith("HTTP/"):
        attributes["network.protocol.version"] = protocol[5:]
    if status >= 500:
        attributes["error.type"] = str(status)
        if _META_KEY in meta:  # no exception has said more
            span.set_status(Status(StatusCode.ERROR))
    span.set_attributes(attributes)


@lru_cache(10_000)
def _pattern(route: str) -> str:
    """The route as in the `path` label of the metrics."""
    # Regular expressions of included URLs each begin with an anchor of their own.
    return "/" + route.removeprefix("^").replace("/^", "/")


def _redacted(query: str) -> str:
    """The names in a query only, as the conventions have it: values may be tokens, or what a user looked for."""
    return "&".join(f"{part.partition('=')[0]}=REDACTED" for part in query.split("&") if part)


def _note_exception(*, request: HttpRequest | None = None, **_: object) -> None:
    """Django's signal that an exception becomes a 500."""
    span = request.META.pop(_META_KEY, None) if request is not None else None
    error = sys.exception()
    if span is not None and isinstance(error, Exception):
        _fail(span, error)


def _fail(span: Span, error: Exception) -> None:
    span.record_exception(error)
    span.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {error}"))


class _Headers(Getter[Mapping[str, Any]]):
    """Reads headers out of Django's META, for the propagator."""

    def get(self, carrier: Mapping[str, Any], key: str) -> list[str] | None:
        value = carrier.get(_meta_name(key))
        return None if value is None else [value]

    def keys(self, carrier: Mapping[str, Any]) -> list[str]:
        return [name[5:].lower().replace("_", "-") for name in carrier if name.startswith("HTTP_")]


_HEADERS = _Headers()


def _meta_name(header: str) -> str:
    return f"HTTP_{header.upper().replace('-', '_')}"


def _parent(meta: Mapping[str, Any]) -> Context | None:
    """The caller's context; None where it sent none."""
    if trace.get_current_span().get_span_context().is_valid:
        return None
    if any(name in meta for name in _propagated()):
        return propagate.extract(meta, getter=_HEADERS)
    return None


@cache
def _propagated() -> list[str]:
    return [_meta_name(field) for field in propagate.get_global_textmap().fields]
