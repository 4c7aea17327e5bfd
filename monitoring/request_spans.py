"""What the spans of requests say beyond OpenTelemetry's instrumentation of Django, and what they must not say."""

from django.http import HttpRequest
from django.http.response import HttpResponseBase
from opentelemetry.trace import Span

from monitoring.middleware import METHODS, span_started

_WITH_QUERY = ("url.query", "url.full", "http.target", "http.url")  # stable conventions, and those before


def request_started(span: Span, request: HttpRequest) -> None:
    """Tell the request's metrics and log line its trace; take the values of the query off the span."""
    span_started(span, request)
    if (query := request.META.get("QUERY_STRING")) and span.is_recording():
        _redact(span, query)


def _redact(span: Span, query: str) -> None:
    """Keep the names in a query only, as the conventions have it: values may be tokens, or what a user looked for."""
    names = "&".join(f"{part.partition('=')[0]}=REDACTED" for part in query.split("&") if part)
    for key in _WITH_QUERY:
        value = getattr(span, "attributes", {}).get(key)
        if isinstance(value, str):
            start, mark, _ = value.rpartition("?") if key != "url.query" else ("", "", "")
            span.set_attribute(key, f"{start}{mark}{names}" if mark or key == "url.query" else value)


def request_ended(span: Span, request: HttpRequest, response: HttpResponseBase) -> None:
    """Name the span by the method and the route, the same pattern as the `path` label of the metrics."""
    match = request.resolver_match
    if match is None or match.route is None or not span.is_recording():
        return
    # Regular expressions of included URLs each begin with an anchor of their own.
    route = "/" + match.route.removeprefix("^").replace("/^", "/")
    method = request.method if request.method in METHODS else "HTTP"
    span.update_name(f"{method} {route}")
    span.set_attribute("http.route", route)
