"""The MONITORING setting, parsed once and strictly, and the name this process goes by."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from django.dispatch import receiver

from monitoring import otel_environment

SAMPLING_MODES = ("keep_failed", "ratio", "collector")


@dataclass(frozen=True, kw_only=True)
class MonitoringSettings:
    """`settings.MONITORING` with lower-case names; every key may be left out.

    `log_format`: `"json"`, `"text"`, or `"auto"`: text in a terminal, else JSON.
    `log_redact`: names of fields that are hidden in log lines, besides `monitoring.redaction.SECRET_NAMES`.
    `ready_databases`: aliases that /readyz asks; empty: all.
    `llm_prices`: model -> dollars per million tokens, `{"input": 2.5, "output": 10, "cached_input": 1.25}`; the last
    may be left out. A model's price is also that of its dated versions: `gpt-4o` of `gpt-4o-2024-08-06`.
    `probe_prefix`: the middleware answers /health, /livez, /readyz and /metrics below it, as in "/internal"; None: it
    does not, as for a project that includes `monitoring.urls` itself.
    `prometheus_url`: where Prometheus answers its HTTP API, as "http://prometheus:9090"; empty: there is none.
    `jaeger_url`: where people open Jaeger, as "https://jaeger.example.org"; empty: traces have no links.
    The rest: see `monitoring.tracing`, also for the standard OTEL_* variables that are read where a key is not given.
    """

    service_name: str = field(default_factory=otel_environment.service_name)
    service_version: str = field(default_factory=otel_environment.service_version)
    environment: str = field(default_factory=otel_environment.environment)
    log_format: str = "auto"
    log_level: str = "INFO"
    log_redact: Sequence[str] = ()
    ready_databases: Sequence[str] = ()
    probe_prefix: str | None = ""
    llm_prices: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    tracing_enabled: bool | None = None
    prometheus_url: str = ""
    jaeger_url: str = ""
    otlp_endpoint: str = ""
    otlp_certificate_file: str = ""
    otlp_client_certificate_file: str = ""
    otlp_client_key_file: str = ""
    otlp_headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    sampling_rate: float | None = None
    sampling_mode: str = "keep_failed"
    trace_exception_messages: bool = False

    def __post_init__(self) -> None:
        if self.log_format not in ("auto", "json", "text"):
            raise ImproperlyConfigured(f"LOG_FORMAT must be auto, json or text, not {self.log_format!r}")
        for name, value in (("LOG_REDACT", self.log_redact), ("READY_DATABASES", self.ready_databases)):
            if isinstance(value, str) or not all(isinstance(each, str) and each for each in value):
                raise ImproperlyConfigured(f"{name} must be a list of names, not {value!r}")
        if self.log_level not in logging.getLevelNamesMapping():
            raise ImproperlyConfigured(f"LOG_LEVEL must be a level such as INFO, not {self.log_level!r}")
        if self.probe_prefix and (self.probe_prefix[0] != "/" or self.probe_prefix[-1] == "/"):
            raise ImproperlyConfigured(f"PROBE_PREFIX must begin with / and not end with it: {self.probe_prefix!r}")
        if self.sampling_rate is not None and not 0.0 <= self.sampling_rate <= 1.0:
            raise ImproperlyConfigured(f"SAMPLING_RATE must be from 0.0 to 1.0, not {self.sampling_rate!r}")
        if self.sampling_mode not in SAMPLING_MODES:
            raise ImproperlyConfigured(f"SAMPLING_MODE is {self.sampling_mode!r}: use {', '.join(SAMPLING_MODES)}")
        for name, url in (("PROMETHEUS_URL", self.prometheus_url), ("JAEGER_URL", self.jaeger_url)):
            if url and (urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname):
                raise ImproperlyConfigured(f"{name} must begin with http:// or https:// and name a host")
        _check_llm_prices(self.llm_prices)


def _check_llm_prices(prices: object) -> None:
    if not isinstance(prices, Mapping):
        raise ImproperlyConfigured(f"LLM_PRICES must be a mapping of models, not {prices!r}")
    for model, price in prices.items():
        if (
            not isinstance(price, Mapping)
            or {*price, "cached_input"} != {"input", "output", "cached_input"}
            or not all(isinstance(dollars, int | float) and 0 <= dollars < math.inf for dollars in price.values())
        ):
            shape = 'dollars as "input", "output" and perhaps "cached_input"'
            raise ImproperlyConfigured(f"LLM_PRICES[{model!r}] must be {shape}, not {price!r}")


@cache
def monitoring_settings() -> MonitoringSettings:
    """Parse `settings.MONITORING`. Raises ImproperlyConfigured for an unknown key or a bad value."""
    given: dict[str, Any] = getattr(settings, "MONITORING", {})
    try:
        return MonitoringSettings(**{key.lower(): value for key, value in given.items()})
    except TypeError as error:
        raise ImproperlyConfigured(f"MONITORING: {error}") from error


@receiver(setting_changed)
def _forget_settings(*, setting: str, **_: object) -> None:
    if setting == "MONITORING":
        monitoring_settings.cache_clear()


_role = ""
_thread_role: ContextVar[str] = ContextVar("thread_role", default="")


def service_name() -> str:
    """Name of this process in metrics, logs and traces: `voicehelper`, in the relay `voicehelper-relay`.

    In a thread with a role of its own it is that one's.
    """
    name = monitoring_settings().service_name
    role = _thread_role.get() or _role
    return f"{name}-{role}" if role else name


@contextmanager
def process_role(role: str) -> Iterator[None]:
    """Make `service_name()` say which worker this process is, for the time of the block."""
    global _role
    previous, _role = _role, role
    try:
        yield
    finally:
        _role = previous


@contextmanager
def thread_role(role: str) -> Iterator[None]:
    """The same for this thread alone, in a process whose threads are different workers."""
    token = _thread_role.set(role)
    try:
        yield
    finally:
        _thread_role.reset(token)
