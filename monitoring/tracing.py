"""OpenTelemetry traces: exported over OTLP/gRPC when enabled, ids for logs and events in any case.

Configured by the MONITORING setting and, for each key that is not given there, the standard OTEL_* variable:

| MONITORING | else |
|---|---|
| SERVICE_NAME | OTEL_SERVICE_NAME, `service.name` in OTEL_RESOURCE_ATTRIBUTES, `django`; workers add their role |
| SERVICE_VERSION, ENVIRONMENT | `service.version`, `deployment.environment.name` in OTEL_RESOURCE_ATTRIBUTES; ENVIRONMENT: `dev` |
| TRACING_ENABLED | true where there is an endpoint and OTEL_TRACES_EXPORTER is not `none` |
| OTLP_ENDPOINT | OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, OTEL_EXPORTER_OTLP_ENDPOINT, localhost:4317 |
| OTLP_CERTIFICATE_FILE, OTLP_CLIENT_CERTIFICATE_FILE, OTLP_CLIENT_KEY_FILE | OTEL_EXPORTER_OTLP_[TRACES_]CERTIFICATE, ..._CLIENT_CERTIFICATE, ..._CLIENT_KEY |
| OTLP_HEADERS | OTEL_EXPORTER_OTLP_[TRACES_]HEADERS |
| SAMPLING_RATE | OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG; 1.0 in the environment `dev`, else 0.1 |
| SAMPLING_MODE | `keep_failed` |
| TRACE_EXCEPTION_MESSAGES | False |

Only variables: OTEL_EXPORTER_OTLP_[TRACES_]TIMEOUT (in seconds, as everywhere in Python), ..._COMPRESSION, ..._INSECURE,
OTEL_BSP_*, further OTEL_RESOURCE_ATTRIBUTES, OTEL_PROPAGATORS, and OTEL_SDK_DISABLED, which turns tracing off
whatever the setting says. A value that means nothing raises ImproperlyConfigured at the start of the process.
"""  # noqa: E501  (a table)

import os
import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter

from monitoring import otel_environment as env
from monitoring.conf import SAMPLING_MODES, monitoring_settings, service_name
from monitoring.middleware import MonitoringMiddleware
from monitoring.sampling import FailedTraces, ShareSampler, is_sampled
from monitoring.span_queue import SpanQueue
from monitoring.spans import answered_well, without_messages

_DEFAULT_ENDPOINT = "localhost:4317"
_HEADER_NAME = re.compile(r"[0-9a-z_.-]+")
_HEADER_VALUE = re.compile(r"[ -~]*")
# The probes and the scraper come every few seconds: their traces would drown the others.
_UNTRACED_URLS = r"^https?://[^/]+/(health|livez|readyz|metrics)\b"
_SAMPLERS = {  # the share of new traces; whether a caller's decision is followed
    "always_on": (1.0, False),
    "always_off": (0.0, False),
    "traceidratio": (None, False),
    "parentbased_always_on": (1.0, True),
    "parentbased_always_off": (0.0, True),
    "parentbased_traceidratio": (None, True),
}


@dataclass(frozen=True, kw_only=True)
class TracingConfig:
    """How to trace: the specification's fields, and what it leaves to production.

    `endpoint`: `jaeger:4317` or `http://...` in plain text, `https://...` over TLS, empty for localhost:4317.
    `sampling_rate`: share of new traces that are exported, 0.0 to 1.0; a caller's decision is followed, unless
    `follows_caller` is False.
    `sampling_mode`: "keep_failed" also exports every trace of which a span failed in this process, whoever decided
    not to sample it; "ratio" does not; "collector" exports everything, for a collector that chooses.
    `certificate_file`: CA that signed the collector's certificate, PEM; empty for those the system trusts. It makes
    a bare `host:port` speak TLS. `client_certificate_file` and `client_key_file`: for a collector that asks.
    `exception_messages`: whether exceptions leave the process with their text, which may hold what a user has written.
    `queue_size`, `batch_size`, `delay_seconds`: see `SpanQueue`.

    Raises ImproperlyConfigured for values that contradict each other, and files that cannot be used.
    """

    service_name: str
    service_version: str
    environment: str
    endpoint: str
    sampling_rate: float
    enabled: bool
    sampling_mode: str = "keep_failed"
    follows_caller: bool = True
    certificate_file: str = ""
    client_certificate_file: str = ""
    client_key_file: str = ""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout_seconds: float = 10.0
    compression: str = "none"
    exception_messages: bool = False
    queue_size: int = 2048
    batch_size: int = 512
    delay_seconds: float = 5.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.sampling_rate <= 1.0:
            raise ImproperlyConfigured(f"the sampling rate must be from 0.0 to 1.0, not {self.sampling_rate!r}")
        if self.sampling_mode not in SAMPLING_MODES:
            raise ImproperlyConfigured(f"the sampling mode is {self.sampling_mode!r}: use {', '.join(SAMPLING_MODES)}")
        if self.compression not in ("none", "gzip"):
            raise ImproperlyConfigured(f"the compression is {self.compression!r}: use gzip or none")
        if self.batch_size > self.queue_size:
            raise ImproperlyConfigured(f"batches of {self.batch_size} spans do not fit a queue of {self.queue_size}")
        if not self.enabled:
            return
        self._check_endpoint()
        for name, value in self.headers.items():
            if not _HEADER_NAME.fullmatch(name.lower()) or not _HEADER_VALUE.fullmatch(value):
                raise ImproperlyConfigured(f"the OTLP header {name!r} is not one that gRPC can send")
        self._check_files()

    def _check_endpoint(self) -> None:
        try:
            url = self._url
            usable = url.scheme in ("", "http", "https") and url.hostname and (url.port or url.scheme)
        except ValueError:
            usable = False
        if not usable or self._url.path.strip("/"):
            raise ImproperlyConfigured(
                f"the OTLP endpoint is {self.endpoint!r}: use host:port, http://... or https://..."
            )

    def _check_files(self) -> None:
        files = [self.certificate_file, self.client_certificate_file, self.client_key_file]
        if any(files) and not self.uses_tls:
            raise ImproperlyConfigured(f"there is a certificate, but the OTLP endpoint {self.endpoint!r} has no TLS")
        if bool(self.client_certificate_file) != bool(self.client_key_file):
            raise ImproperlyConfigured("an OTLP client certificate needs its key, and a key its certificate")
        checks = ssl.create_default_context()
        try:
            if self.certificate_file:
                checks.load_verify_locations(self.certificate_file)
            if self.client_certificate_file:
                checks.load_cert_chain(self.client_certificate_file, self.client_key_file, password="")
        except (OSError, ssl.SSLError, ValueError) as error:
            names = ", ".join(filter(None, files))
            raise ImproperlyConfigured(f"the OTLP certificates ({names}) cannot be used: {error}") from error

    @property
    def _url(self) -> Any:
        endpoint = self.endpoint or _DEFAULT_ENDPOINT
        return urlsplit(endpoint if "://" in endpoint else f"//{endpoint}")

    @property
    def uses_tls(self) -> bool:
        """By the endpoint's scheme; a bare host:port, as in the specification, where there is a certificate."""
        return bool(self._url.scheme == "https" or (not self._url.scheme and self.certificate_file))


_provider: TracerProvider | None = None
_config: TracingConfig | None = None
_failed_traces: FailedTraces | None = None


def tracing_config() -> TracingConfig:
    """The configuration of this process. Raises ImproperlyConfigured: see the module's table."""
    given = monitoring_settings()
    otlp, traces = "OTEL_EXPORTER_OTLP_", "OTEL_EXPORTER_OTLP_TRACES_"

    def variable(name: str) -> str:
        return env.text(traces + name, otlp + name)

    endpoint = given.otlp_endpoint or variable("ENDPOINT")
    protocol = variable("PROTOCOL")
    if protocol not in ("", "grpc"):
        raise ImproperlyConfigured(f"the OTLP protocol is {protocol!r}: spans are sent by grpc only")
    exporter = env.choice("OTEL_TRACES_EXPORTER", frozenset({"otlp", "none"}))
    enabled = bool(endpoint) and exporter != "none" if given.tracing_enabled is None else given.tracing_enabled
    enabled = not env.flag("OTEL_SDK_DISABLED") and enabled
    insecure = env.flag(traces + "INSECURE")
    insecure = env.flag(otlp + "INSECURE") if insecure is None else insecure
    if insecure is False and endpoint and "://" not in endpoint:
        endpoint = f"https://{endpoint}"
    certificate = given.otlp_certificate_file or variable("CERTIFICATE")
    rate, follows_caller = _share(given.sampling_rate, given.environment)
    compression = variable("COMPRESSION")
    queue_size = env.number("OTEL_BSP_MAX_QUEUE_SIZE", 2048, minimum=1, maximum=1_000_000)
    batch_default = min(512, queue_size)
    return TracingConfig(
        service_name=service_name(),
        service_version=given.service_version,
        environment=given.environment,
        endpoint=endpoint,
        sampling_rate=rate,
        enabled=enabled,
        sampling_mode=given.sampling_mode,
        follows_caller=follows_caller,
        certificate_file=certificate,
        client_certificate_file=given.otlp_client_certificate_file or variable("CLIENT_CERTIFICATE"),
        client_key_file=given.otlp_client_key_file or variable("CLIENT_KEY"),
        headers=given.otlp_headers or env.pairs(traces + "HEADERS", otlp + "HEADERS"),
        timeout_seconds=env.number(
            traces + "TIMEOUT" if env.text(traces + "TIMEOUT") else otlp + "TIMEOUT",
            10,
            minimum=0.001,
            maximum=600,
            unit="seconds",
        ),
        compression=compression.lower() or "none",
        exception_messages=given.trace_exception_messages,
        queue_size=int(queue_size),
        batch_size=int(env.number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", batch_default, minimum=1, maximum=1_000_000)),
        delay_seconds=env.number("OTEL_BSP_SCHEDULE_DELAY", 5000, minimum=1, maximum=3_600_000, unit="ms") / 1000,
    )


def _share(given: float | None, environment: str) -> tuple[float, bool]:
    """The share of new traces to sample, and whether callers are followed."""
    if given is not None:
        return given, True
    sampler = env.choice("OTEL_TRACES_SAMPLER", frozenset(_SAMPLERS))
    rate, follows_caller = _SAMPLERS[sampler or "parentbased_traceidratio"]
    if rate is None:
        # The standard's default with a sampler named is everything; without one it is ours.
        default = 1.0 if sampler or environment == "dev" else 0.1
        rate = env.number("OTEL_TRACES_SAMPLER_ARG", default, minimum=0.0, maximum=1.0)
    return rate, follows_caller


def init_tracing(config: TracingConfig) -> Callable[[], None]:
    """Start tracing in this process; the returned callable stops it, sending the last spans within FLUSH_SECONDS.

    May be called before a fork: each process makes its own thread and connection with its first span (gRPC's part in
    that is on by default; GRPC_ENABLE_FORK_SUPPORT=false would hang a child whose parent has sent). OpenTelemetry
    allows one provider a process: where there is one already, nothing is started and the returned callable does
    nothing. When not enabled, nothing is exported, but spans still have ids. This is the specification's InitTracing;
    W3C trace context and baggage are what OpenTelemetry propagates by itself, unless OTEL_PROPAGATORS is set.
    """
    global _provider, _config, _failed_traces
    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return lambda: None
    provider = TracerProvider(
        sampler=_sampler(config),
        resource=Resource.create(
            {
                "service.name": config.service_name,
                "service.version": config.service_version,
                "deployment.environment.name": config.environment,
                "deployment.environment": config.environment,  # its older name, the specification's
            }
        ),
        # SpanQueue has one, which does not wait for half a minute.
        shutdown_on_exit=False,
    )
    if config.enabled:
        queue = _queue(config)
        _failed_traces = FailedTraces(queue) if config.sampling_mode == "keep_failed" else None
        provider.add_span_processor(_failed_traces or queue)
    _provider, _config = provider, config
    trace.set_tracer_provider(provider)
    return provider.shutdown


def _sampler(config: TracingConfig) -> ShareSampler:
    if not config.enabled:
        return ShareSampler(0.0)
    if config.sampling_mode == "collector":
        return ShareSampler(1.0, follows_caller=False)
    return ShareSampler(
        config.sampling_rate,
        follows_caller=config.follows_caller,
        keeps_unsampled=config.sampling_mode == "keep_failed",
    )


def _queue(config: TracingConfig) -> SpanQueue:
    # Imported here: gRPC takes long to import, and commands that do not export should not wait for it.
    from opentelemetry.exporter.otlp.proto.grpc import trace_exporter  # noqa: F401

    def prepare(span: ReadableSpan) -> ReadableSpan:
        span = answered_well(span)
        return span if config.exception_messages else without_messages(span)

    return SpanQueue(
        lambda: _exporter(config),
        prepare,
        size=config.queue_size,
        batch_size=config.batch_size,
        delay_seconds=config.delay_seconds,
    )


def _exporter(config: TracingConfig) -> SpanExporter:
    from grpc import Compression, ssl_channel_credentials
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    def content(file: str) -> bytes | None:
        return Path(file).read_bytes() if file else None

    credentials = None
    if config.uses_tls:
        credentials = ssl_channel_credentials(
            content(config.certificate_file), content(config.client_key_file), content(config.client_certificate_file)
        )
    return OTLPSpanExporter(
        endpoint=config.endpoint or _DEFAULT_ENDPOINT,
        insecure=not config.uses_tls,
        credentials=credentials,
        # gRPC knows lower-case names only. Not empty: the exporter would read the variables itself.
        headers=tuple((name.lower(), value) for name, value in config.headers.items()),
        timeout=config.timeout_seconds,
        compression=Compression.Gzip if config.compression == "gzip" else Compression.NoCompression,
    )


def may_record(traceparent: str = "", *, if_failed: bool = True) -> bool:
    """Whether a span that continues this trace (W3C; empty for a new one) could be exported by this process.

    For whoever would make very many spans: it costs next to nothing, and where it is False a span would be for nobody.
    `if_failed`: also count a span that is exported only if it fails, or another one of its trace.
    """
    provider = trace.get_tracer_provider()
    if provider is not _provider or _config is None:
        return isinstance(provider, TracerProvider)  # somebody else's: who knows what its sampler does
    if not _config.enabled:
        return False
    if _config.sampling_mode == "collector" or (if_failed and _config.sampling_mode == "keep_failed"):
        return True
    if traceparent and _config.follows_caller:
        return is_sampled(traceparent)
    return _config.sampling_rate > 0


def trace_done(make: Callable[[Context | None], None]) -> None:
    """Have `make` make the span of something that is over, as a child of the current span, if that is recorded.

    `make` is given the parent's context, None for the current one. It is called now, or, where the span would only be
    held in case its trace fails, when that happens, maybe in another thread; or never.
    """
    current = trace.get_current_span()
    if current.is_recording() and not (
        _failed_traces is not None and _failed_traces.defer(current.get_span_context(), make)
    ):
        make(None)


def instrument_requests() -> None:
    """Open a span for each request, probes and scrapes excepted; call before the request handler is built."""
    # The stable HTTP conventions, unless the user has chosen; read once, when the first instrumentation starts.
    os.environ.setdefault("OTEL_SEMCONV_STABILITY_OPT_IN", "http")
    from opentelemetry.instrumentation.django import DjangoInstrumentor

    from monitoring.request_spans import request_ended, request_started

    instrumentor = DjangoInstrumentor()
    if instrumentor.is_instrumented_by_opentelemetry:
        return
    monitoring_middleware = f"{MonitoringMiddleware.__module__}.{MonitoringMiddleware.__qualname__}"
    middleware = list(settings.MIDDLEWARE)
    # Just inside MonitoringMiddleware, so that requests which this instrumentation itself refuses (those with
    # a bad Host) are counted too; the hook hands the ids out to it.
    position = middleware.index(monitoring_middleware) + 1 if monitoring_middleware in middleware else 0
    instrumentor.instrument(
        middleware_position=position,
        request_hook=request_started,
        response_hook=request_ended,
        excluded_urls=_UNTRACED_URLS,
    )
