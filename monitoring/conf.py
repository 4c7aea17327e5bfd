"""The MONITORING setting, parsed once and strictly, and the name this process goes by."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from django.dispatch import receiver


@dataclass(frozen=True, kw_only=True)
class MonitoringSettings:
    """`settings.MONITORING` with lower-case names; every key may be left out.

    `otlp_endpoint`: where spans go, `host:port` or URL; empty is the exporter's own default, localhost:4317.
    `sampling_rate`: share of traces that are exported, 0.0 to 1.0.
    `log_format`: `"json"`, `"text"`, or `"auto"`: text in a terminal, else JSON.
    `log_redact`: names of fields that are hidden in log lines, besides `monitoring.redaction.SECRET_NAMES`.
    `ready_databases`: aliases that /readyz asks; empty: all.
    """

    service_name: str = "django"
    service_version: str = ""
    environment: str = "dev"
    log_format: str = "auto"
    log_level: str = "INFO"
    log_redact: Sequence[str] = ()
    ready_databases: Sequence[str] = ()
    tracing_enabled: bool = False
    otlp_endpoint: str = ""
    sampling_rate: float = 1.0

    def __post_init__(self) -> None:
        if self.log_format not in ("auto", "json", "text"):
            raise ImproperlyConfigured(f"LOG_FORMAT must be auto, json or text, not {self.log_format!r}")
        for name, value in (("LOG_REDACT", self.log_redact), ("READY_DATABASES", self.ready_databases)):
            if isinstance(value, str) or not all(isinstance(each, str) and each for each in value):
                raise ImproperlyConfigured(f"{name} must be a list of names, not {value!r}")
        if self.log_level not in logging.getLevelNamesMapping():
            raise ImproperlyConfigured(f"LOG_LEVEL must be a level such as INFO, not {self.log_level!r}")
        if not 0.0 <= self.sampling_rate <= 1.0:
            raise ImproperlyConfigured(f"SAMPLING_RATE must be from 0.0 to 1.0, not {self.sampling_rate!r}")


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
