"""OpenTelemetry traces: exported over OTLP/gRPC when enabled, ids for logs and events in any case."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from django.conf import settings
from opentelemetry import trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.instrumentation.django import DjangoInstrumentor
from opentelemetry.propagate import set_global_textmap
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from monitoring.conf import monitoring_settings, service_name
from monitoring.middleware import MonitoringMiddleware, span_started

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 3.0
"""How long a stopping process waits for the collector to take its last spans."""

# The probes and the scraper come every few seconds: their traces would drown the others.
_UNTRACED_URLS = r"^https?://[^/]+/(health|livez|readyz|metrics)\b"


@dataclass(frozen=True, kw_only=True)
class TracingConfig:
    """How to trace; the specification's fields.

    `endpoint`: `jaeger:4317` or `http://...` in plain text, `https://...` over TLS, empty for localhost:4317.
    `sampling_rate`: share of new traces that are exported, 0.0 to 1.0; a caller's decision is followed.
    """

    service_name: str
    service_version: str
    environment: str
    endpoint: str
    sampling_rate: float
    enabled: bool


_provider: TracerProvider | None = None
_is_exporting = False


def tracing_config() -> TracingConfig:
    """Read the configuration of this process from the MONITORING setting."""
    config = monitoring_settings()
    return TracingConfig(
        service_name=service_name(),
        service_version=config.service_version,
        environment=config.environment,
        endpoint=config.otlp_endpoint,
        sampling_rate=config.sampling_rate,
        enabled=config.tracing_enabled,
    )


def init_tracing(config: TracingConfig) -> Callable[[], None]:
    """Start tracing in this process; the returned callable stops it, sending the last spans in FLUSH_SECONDS.

    Call it after any fork: the exporter's thread and connection do not survive one. OpenTelemetry allows one
    provider a process: where there is one already, nothing is started and the returned callable does nothing.
    When not enabled, nothing is exported, but spans still have ids. This is the specification's InitTracing.
    """
    global _provider, _is_exporting
    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return lambda: None
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(config.sampling_rate if config.enabled else 0.0)),
        resource=Resource.create(
            {
                "service.name": config.service_name,
                "service.version": config.service_version,
                "deployment.environment": config.environment,
            }
        ),
        # The SDK's own exit handler would wait half a minute for a collector that is away.
        shutdown_on_exit=False,
    )
    if config.enabled:
        provider.add_span_processor(BatchSpanProcessor(_exporter(config.endpoint)))
    _provider, _is_exporting = provider, config.enabled
    trace.set_tracer_provider(provider)
    set_global_textmap(CompositePropagator([TraceContextTextMapPropagator(), W3CBaggagePropagator()]))

    def shutdown() -> None:
        flush = threading.Thread(target=provider.shutdown, name="trace-flush", daemon=True)
        flush.start()
        flush.join(FLUSH_SECONDS)
        if flush.is_alive():
            logger.warning("the last spans could not be exported within %s s", FLUSH_SECONDS)

    return shutdown


def may_record(traceparent: str = "") -> bool:
    """Whether a span that continues this trace (W3C; empty for a new one) can be recorded by this process.

    For whoever would make very many spans: it costs next to nothing, and where it is False a span would be for nobody.
    """
    provider = trace.get_tracer_provider()
    if provider is _provider:
        # Our sampler follows a caller that has decided not to record.
        return _is_exporting and not traceparent.endswith("-00")
    return isinstance(provider, TracerProvider)


def _exporter(endpoint: str) -> SpanExporter:
    # Imported here: gRPC takes long to import, and commands that do not export should not wait for it.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    # A bare host:port, as in the specification, has no scheme that would say whether to use TLS.
    insecure = True if endpoint and "://" not in endpoint else None
    return OTLPSpanExporter(endpoint=endpoint or None, insecure=insecure)


def instrument_requests() -> None:
    """Open a span for each request, probes and scrapes excepted; call before the request handler is built."""
    instrumentor = DjangoInstrumentor()
    if instrumentor.is_instrumented_by_opentelemetry:
        return
    monitoring_middleware = f"{MonitoringMiddleware.__module__}.{MonitoringMiddleware.__qualname__}"
    middleware = list(settings.MIDDLEWARE)
    # Just inside MonitoringMiddleware, so that requests which this instrumentation itself refuses (those with
    # a bad Host) are counted too; the hook hands the ids out to it.
    position = middleware.index(monitoring_middleware) + 1 if monitoring_middleware in middleware else 0
    instrumentor.instrument(middleware_position=position, request_hook=span_started, excluded_urls=_UNTRACED_URLS)
