"""Log lines: what a line says, as JSON or as text. `log_line.schema.json` is the schema of the JSON ones.

Always there, in this order:

| field | |
|---|---|
| `time` | RFC 3339 in UTC, milliseconds |
| `level` | `DEBUG`, `INFO`, `WARNING`, `ERROR`, `CRITICAL` |
| `logger` | the logger's name, as in `monitoring.access` |
| `event` | what happened, the same for each time it does, to count and to search by: `event` of the record's `extra`, else the message before its arguments are put in (`"%s failed"`) |
| `message` | the same with the arguments |
| `service` | the process, as in `voicehelper-relay` |

Where there is one: `trace_id`, `span_id`, `tenant_id`, `event_id` (of the outbox event being handled), `correlation_id`,
then the record's `extra`, then `exception` and `stack`, texts of several lines. `truncated` is true where long texts lost
their middle, so that the line is no longer than MAX_LINE_BYTES.

An `extra` may give ids that are not those of the context. A name that the line has already becomes `extra_<name>`.
Secrets are hidden (`monitoring.redaction`). The contents of events and requests are no business of a log line.
"""  # noqa: E501 a table

import json
import logging
import time
import traceback
from collections.abc import Iterable, Mapping
from itertools import islice
from math import isfinite
from typing import Any

from django.core.signals import setting_changed
from django.dispatch import receiver
from opentelemetry import trace

from monitoring import context
from monitoring.conf import service_name
from monitoring.redaction import HIDDEN, cut, is_secret, redacted, redacted_text

MAX_LINE_BYTES = 16_000
"""Docker and containerd cut lines at 16 KiB, and half a JSON object is none."""

_LONGEST_EVENT = 200
_LONGEST_TEXTS = (6000, 2000, 500, 100)  # characters, tried one after the other until the line is short enough
# Django attaches the whole request to its error records; its text has the query string in it.
_STANDARD = len(logging.makeLogRecord({}).__dict__)
_NOT_EXTRA = frozenset(
    {*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName", "request", "color_message"}
)
_IDS = frozenset({"trace_id", "span_id", "tenant_id", "event_id", "correlation_id"})
_OWN = frozenset({"time", "level", "logger", "message", "service", "exception", "stack", "truncated"})
_MILLISECONDS = tuple(f".{number:03d}Z" for number in range(1000))
_second_and_text = (0, "1970-01-01T00:00:00")


def time_text(record: logging.LogRecord) -> str:
    """RFC 3339 in UTC with milliseconds."""
    global _second_and_text
    created = record.created
    second = int(created)
    known, text = _second_and_text
    if second != known:
        text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        _second_and_text = second, text
    return text + _MILLISECONDS[int((created - second) * 1000)]


def _origin(given: Mapping[str, Any]) -> dict[str, str]:
    """What the line belongs to: ids of the trace, tenant, event and correlation that are there and not given."""
    ids = {}
    if "trace_id" not in given:
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            ids["trace_id"] = trace.format_trace_id(span.trace_id)
            if "span_id" not in given:
                ids["span_id"] = trace.format_span_id(span.span_id)
        elif trace_id := context.trace_headers.get().get("traceparent", "")[3:35]:
            ids["trace_id"] = trace_id
    if "tenant_id" not in given and (tenant_id := context.tenant_id.get()):
        ids["tenant_id"] = tenant_id
    if "event_id" not in given and (event_id := context.event_id.get()):
        ids["event_id"] = str(event_id)
    if "correlation_id" not in given and (correlation_id := context.correlation_id.get()):
        ids["correlation_id"] = correlation_id
    return ids


def _extra(record: logging.LogRecord) -> Iterable[tuple[str, Any]]:
    """The attributes that come after the standard ones, which LogRecord always sets first; some are still no extra."""
    return islice(record.__dict__.items(), _STANDARD if type(record) is logging.LogRecord else 0, None)


def _event(record: logging.LogRecord) -> str:
    event = record.__dict__.get("event") or record.msg
    text = event if isinstance(event, str) else type(event).__name__
    return cut(text.partition("\n")[0], _LONGEST_EVENT)


def _message(record: logging.LogRecord) -> str:
    """The text, also where arguments do not fit it, and without the secrets in arguments that are mappings."""
    try:
        if args := record.args:
            if isinstance(args, Mapping):
                args = redacted(args)
            elif any(isinstance(each, Mapping | list | tuple) for each in args):
                args = tuple(redacted(each) if isinstance(each, Mapping | list | tuple) else each for each in args)
            return str(record.msg) % args
        return str(record.msg)
    except Exception:
        return f"{redacted(record.msg)} {redacted(record.args)}"


def _exception(record: logging.LogRecord) -> str:
    try:
        if record.exc_info:
            return "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
        return record.exc_text or ""  # of a record from another process
    except Exception as error:
        return f"{record.exc_info!r:.500}, whose traceback has no text: {type(error).__name__}"


def line_fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return the line's fields in their order, values fit for JSON and without secrets. Raises nothing."""
    line: dict[str, Any] = {
        "time": time_text(record),
        "level": str(record.levelname),
        "logger": str(record.name),
        "event": redacted_text(_event(record)),
        "message": redacted_text(_message(record)),
        "service": service_name(),
    }
    for given, value in (*_origin(record.__dict__).items(), *_extra(record)):
        if given in _NOT_EXTRA or given == "event" or (value is None and given in _IDS):
            continue
        shown = HIDDEN if is_secret(given) and value is not None else redacted(value)
        if given in _IDS:
            line[given] = str(shown)
        else:
            line[f"extra_{given}" if given in _OWN else given] = shown
    if exception := _exception(record):
        line["exception"] = redacted_text(exception)
    if record.stack_info:
        line["stack"] = redacted_text(record.stack_info)
    return line


_quoted = json.encoder.encode_basestring_ascii
_to_json = json.JSONEncoder(separators=(",", ":")).encode


def _bounded_json(line: dict[str, Any]) -> str:
    text = _to_json(line)
    if len(text) < MAX_LINE_BYTES:
        return text
    for most in _LONGEST_TEXTS:
        text = _to_json({name: _cut(value, most) for name, value in line.items()} | {"truncated": True})
        if len(text) < MAX_LINE_BYTES:
            return text
    kept = {name: _cut(line[name], 100) for name in ("time", "level", "logger", "event", "message", "service")}
    return _to_json(kept | {"truncated": True})


def _cut(value: Any, most: int) -> Any:
    if isinstance(value, str):
        return cut(value, most)
    if isinstance(value, dict | list):
        text = _to_json(value)
        return value if len(text) <= most else cut(text, most)
    return value


_quoted_names: dict[str, str] = {}
"""`,"name":` of the extra fields seen so far that need no care."""


@receiver(setting_changed)
def _forget_settings(*, setting: str, **_: object) -> None:
    if setting == "MONITORING":
        _quoted_names.clear()


def _quoted_name(name: str) -> str:
    """`,"name":`, or nothing where the field needs care."""
    if name in _NOT_EXTRA or name in _OWN or is_secret(name):
        return ""
    text = f",{_quoted(name)}:"
    if len(_quoted_names) < 1000:
        _quoted_names[name] = text
    return text


def _short_way(record: logging.LogRecord) -> str:
    """Return the line of a plain record, the same as the long way makes; nothing when it takes more care.

    This is what an access line costs each request.
    """
    event = message = record.msg
    if type(message) is not str or record.exc_info or record.exc_text or record.stack_info:
        return ""
    if args := record.args:
        if type(args) is not tuple:
            return ""
        for each in args:
            if type(each) is not str and type(each) is not int:
                return ""
        message = message % args
    fields = []
    for name, value in _extra(record):
        start = _quoted_names.get(name)
        if start is None:
            if name == "event":
                event = value
                continue
            start = _quoted_name(name)
            if not start:
                return ""
        kind = type(value)
        if kind is str:
            fields.append(start + _quoted(value))
        elif name in _IDS:
            return ""
        elif kind is int or (kind is float and isfinite(value)):
            fields.append(f"{start}{value!r}")
        else:
            return ""
    if type(event) is not str or not 0 < len(event) <= _LONGEST_EVENT:
        return ""
    said = message if event is record.msg else f"{event} {message}"
    ids = ""
    for name, value in _origin(record.__dict__).items():
        start = _quoted_names.get(name) or _quoted_name(name)
        if not start:
            return ""
        ids += start + _quoted(value)
    text = ids + "".join(fields)
    line = (
        f'{{"time":"{time_text(record)}","level":{_quoted(record.levelname)},"logger":{_quoted(record.name)}'
        f',"event":{_quoted(event)},"message":{_quoted(message)},"service":{_quoted(service_name())}{text}}}'
    )
    # Whatever `redacted_text()` may hide has one of these in it. Ids and paths have none, nor JSON itself.
    if (
        len(line) >= MAX_LINE_BYTES
        or "=" in line
        or "@" in line
        or "'" in line
        or "\\" in line
        or " " in text
        or ": " in said
        or "earer " in said
        or "asic " in said
    ):
        return ""
    return line


class JsonLineFormatter(logging.Formatter):
    """One JSON object a line. `format()` raises nothing, whatever the record holds."""

    def format(self, record: logging.LogRecord) -> str:
        try:
            # Some records are partly made beforehand (`monitoring.access_log`).
            line = record.json_line() if hasattr(record, "json_line") else _short_way(record)
        except Exception:  # the long way looks closer
            line = ""
        return line or self._carefully(record)

    def _carefully(self, record: logging.LogRecord) -> str:
        try:
            return _bounded_json(line_fields(record))
        except Exception as error:
            return _last_resort(record, error)


def _last_resort(record: logging.LogRecord, error: Exception) -> str:
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()),
        "level": str(record.levelname),
        "logger": str(record.name),
        "event": "log line without a text",
        "message": cut(f"{redacted(record.msg)}", 1000),
        "service": "",
        "error": type(error).__name__,
    }
    return _to_json(line)


_RESET, _DIM = "\x1b[0m", "\x1b[2m"
_COLOURS = {
    "DEBUG": "\x1b[2m",
    "INFO": "\x1b[32m",
    "WARNING": "\x1b[33m",
    "ERROR": "\x1b[31m",
    "CRITICAL": "\x1b[1;31m",
}
# A terminal acts upon them, and what is logged may come from anybody.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))} | {
    ord("\t"): "\t",
    ord("\n"): "\n    ",
}
_SHOWN_FIRST = frozenset({"time", "level", "logger", "event", "message", "service", "exception", "stack"})


class TextLineFormatter(logging.Formatter):
    """`time LEVEL service logger: message name=value ...`, and tracebacks below, for people at a terminal."""

    def __init__(self, *, in_colour: bool = False) -> None:
        super().__init__()
        self._in_colour = in_colour

    def format(self, record: logging.LogRecord) -> str:
        try:
            return self._text(line_fields(record))
        except Exception as error:
            return _last_resort(record, error)

    def _text(self, line: dict[str, Any]) -> str:
        shown = {name: str(value).translate(_CONTROLS) for name, value in line.items()}
        level = f"{shown['level']:<7}"
        origin = f"{shown['service']} {shown['logger']}:"
        given = "".join(f" {name}={value}" for name, value in shown.items() if name not in _SHOWN_FIRST)
        below = "".join(f"\n{line[name]}" for name in ("exception", "stack") if name in line)
        if self._in_colour:
            level = f"{_COLOURS.get(shown['level'], '')}{level}{_RESET}"
            origin = f"{_DIM}{origin}{_RESET}"
            given = f"{_DIM}{given}{_RESET}" if given else ""
        return f"{shown['time']} {level} {origin} {shown['message']}{given}{below.translate(_BELOW)}"


_BELOW = _CONTROLS | {ord("\n"): "\n"}
