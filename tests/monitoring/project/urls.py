"""Views of every kind that monitoring has to see right."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Iterable, Iterator

from django.db import connection
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path, re_path
from opentelemetry import trace
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from monitoring import context
from monitoring.metrics import register_collector

logger = logging.getLogger(__name__)


def _seen() -> dict[str, str]:
    span = trace.get_current_span().get_span_context()
    return {
        "correlation_id": context.correlation_id.get(),
        "trace_id": trace.format_trace_id(span.trace_id) if span.is_valid else "",
    }


def show(request: HttpRequest) -> JsonResponse:
    context.tenant_id.set("tenant-of-alice")
    logger.info("showing", extra={"size": 3})
    return JsonResponse(_seen())


async def show_async(request: HttpRequest) -> JsonResponse:
    context.tenant_id.set("tenant-of-bob")
    logger.info("showing asynchronously")
    return JsonResponse(_seen())


waiting: list[HttpRequest] = []


async def wait_for_ever(request: HttpRequest) -> HttpResponse:
    waiting.append(request)
    await asyncio.Event().wait()
    return HttpResponse()


def confuse(request: HttpRequest) -> JsonResponse:
    request.resolver_match = "not a match"  # type: ignore[assignment]
    return JsonResponse(_seen())


def pid(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(os.getpid()))


class ProjectState(Collector):
    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("project_items", "Items of the project", 7)


register_collector(ProjectState())


def fail(request: HttpRequest) -> HttpResponse:
    raise RuntimeError("this view fails")


def fail_after_query(request: HttpRequest) -> HttpResponse:
    with connection.cursor() as cursor:
        cursor.execute("CREATE TABLE IF NOT EXISTS django_content_type (id int)")
        cursor.execute("SELECT id FROM django_content_type WHERE id = %s", [1])
    raise RuntimeError("the secret that somebody wrote")


def missing(request: HttpRequest) -> HttpResponse:
    raise Http404("no such secret")


def stream(request: HttpRequest) -> StreamingHttpResponse:
    def chunks() -> Iterator[bytes]:
        yield b"one "
        yield b"two"

    return StreamingHttpResponse(chunks())


async def stream_async(request: HttpRequest) -> StreamingHttpResponse:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"one "
        yield b"two"

    return StreamingHttpResponse(chunks())


urlpatterns = [
    path("", show),
    path("items/<uuid:id>", lambda request, id: show(request), name="item"),
    path("async", show_async),
    path("wait-for-ever", wait_for_ever),
    path("confuse", confuse),
    path("pid", pid),
    path("fail", fail),
    path("fail-after-query", fail_after_query),
    path("missing/<int:number>", lambda request, number: missing(request)),
    path("stream", stream),
    path("stream-async", stream_async),
    re_path(r"^old/[0-9]+$", show),
]
