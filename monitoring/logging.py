"""One line format for web, relay, consumers, gunicorn and Django: JSON, or text for a terminal."""

import logging
import logging.config
import sys
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from opentelemetry import trace
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from monitoring import context
from monitoring.conf import monitoring_settings, service_name

# Django attaches the whole request to its error records; its text has the query string in it.
_NOT_EXTRA = {*RESERVED_ATTRS, "request"}


def _time(record: logging.LogRecord) -> str:
    """RFC 3339 in UTC with milliseconds."""
    time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    return time.replace("+00:00", "Z")


def _origin(record: logging.LogRecord) -> dict[str, str]:
    """What the line belongs to: ids of the trace, tenant, event and correlation, as far as there are any."""
    span = trace.get_current_span().get_span_context()
    ids = {
        "trace_id": trace.format_trace_id(span.trace_id)
        if span.is_valid
        else context.trace_headers.get().get("traceparent", "")[3:35],
        "span_id": trace.format_span_id(span.span_id) if span.is_valid else "",
        "tenant_id": context.tenant_id.get(),
        "event_id": str(context.event_id.get()),
        "correlation_id": context.correlation_id.get(),
    }
    return {name: value for name, value in ids.items() if value}


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in record.__dict__.items() if name not in _NOT_EXTRA}


class JsonLineFormatter(JsonFormatter):
    """One JSON object a line: time, level, logger, message, service, ids, the record's extra, exception."""

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        log_data |= {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "service": service_name(),
            **_origin(record),
            **_extra(record),
        }
        if exception := message_dict.pop("exc_info", None):
            log_data["exception"] = exception
        if stack := message_dict.pop("stack_info", None):
            log_data["stack"] = stack
        log_data |= message_dict


class TextLineFormatter(logging.Formatter):
    """`time LEVEL service logger: message name=value ...`, and tracebacks below, for people at a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        values = "".join(f" {name}={value}" for name, value in (_origin(record) | _extra(record)).items())
        origin = f"{_time(record)} {record.levelname:<7} {service_name()} {record.name}"
        return f"{origin}: {record.getMessage()}{values}"


StreamName = Literal["stdout", "stderr"]
_stream_name: StreamName = "stderr"


class ConsoleHandler(logging.StreamHandler[TextIO]):
    """Writes to what is stdout or stderr at that moment."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stdout if _stream_name == "stdout" else sys.stderr


def log_to(stream_name: StreamName) -> StreamName:
    """Choose where log lines go and return where they went: servers take stdout.

    Until then it is stderr, because the stdout of other commands carries their result.
    """
    global _stream_name
    previous, _stream_name = _stream_name, stream_name
    return previous


def configure_logging() -> None:
    """Give every logger of the process the line format and level of the MONITORING setting."""
    config = monitoring_settings()
    formatter = JsonLineFormatter if config.log_format == "json" else TextLineFormatter
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"line": {"()": formatter}},
            "handlers": {"console": {"()": ConsoleHandler, "formatter": "line"}},
            "root": {"level": config.log_level, "handlers": ["console"]},
            "loggers": {
                # Refused requests are in the access log; only failures need a line with a traceback.
                "django.request": {"level": "ERROR"},
                "django.security.DisallowedHost": {"level": "CRITICAL"},
                "django.server": {"level": "WARNING"},
                "gunicorn.error": {"level": config.log_level, "handlers": [], "propagate": True},
                "asyncio": {"level": "WARNING"},
                "opentelemetry": {"level": "WARNING"},
            },
        }
    )
    logging.captureWarnings(True)
