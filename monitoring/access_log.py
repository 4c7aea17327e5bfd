"""The access log: a line a request. What all requests of a kind have in common is made once, not for each of them."""

import json
import logging
import os
import threading
import time
from functools import cache, lru_cache
from typing import Any

from django.core.signals import setting_changed
from django.dispatch import receiver
from opentelemetry.trace import SpanContext

from monitoring.log_lines import line_fields, time_text
from monitoring.redaction import is_secret

access_logger = logging.getLogger("monitoring.access")

_IMPORTED = time.time()
_IDS = ("trace_id", "span_id", "tenant_id", "correlation_id")
_LONGEST = 4000


class RequestKind:
    """Requests of the same method, path and status."""

    def __init__(self, method: str, path: str, status: int) -> None:
        self.message = f"{method} {path} {status}"
        self.fields = {"method": method, "path": path, "status": status}

    def log(
        self, seconds: float, *, is_probe: bool, correlation_id: str, tenant_id: str, ids: SpanContext | None
    ) -> None:
        """Log one of them, at INFO, a probe at DEBUG. It may be over: nothing is taken from the context."""
        level = logging.DEBUG if is_probe else logging.INFO
        if not access_logger.isEnabledFor(level):
            return
        own: dict[str, Any] = {"duration_ms": round(seconds * 1000, 3), "correlation_id": correlation_id}
        if ids is not None:
            own["trace_id"], own["span_id"] = f"{ids.trace_id:032x}", f"{ids.span_id:016x}"
        if tenant_id:
            own["tenant_id"] = tenant_id
        if logging.getLogRecordFactory() is logging.LogRecord:
            access_logger.handle(_AccessRecord(level, self, own))
        else:  # of somebody who wants more in the records
            access_logger.log(level, self.message, extra=self.fields | own)


class _AccessRecord(logging.LogRecord):
    """As `Logger.log()` would make it, in a quarter of the time: that looks for its caller on the stack, for one."""

    __slots__ = ("_kind",)

    def __init__(self, level: int, kind: RequestKind, own: dict[str, Any]) -> None:
        self._kind = kind
        now, thread = time.time(), threading.current_thread()
        self.__dict__ = {
            **_standard_fields(level),
            "msg": kind.message,
            "created": now,
            "msecs": float(int(now * 1000) % 1000),
            "relativeCreated": (now - _IMPORTED) * 1000,
            "thread": thread.ident,
            "threadName": thread.name,
            **kind.fields,
            **own,
        }

    def json_line(self) -> str:
        """Return the line that the formatter would make of it; nothing when that takes more care."""
        fields = self.__dict__
        before, after = _around_ids(self._kind, fields["levelno"])
        correlation_id = fields["correlation_id"]
        tenant_id = fields.get("tenant_id", "")
        # Ids that a client has made up may be anything, a secret too.
        if not before or not f"{correlation_id}{tenant_id}".replace("-", "").isalnum():
            return ""
        trace = f'"trace_id":"{fields["trace_id"]}","span_id":"{fields["span_id"]}",' if "trace_id" in fields else ""
        tenant = f'"tenant_id":"{tenant_id}",' if tenant_id else ""
        return (
            f'{{"time":"{time_text(self)}",{before},{trace}{tenant}"correlation_id":"{correlation_id}",{after},'
            f'"duration_ms":{fields["duration_ms"]!r}}}'
        )


@cache
def _standard_fields(level: int) -> dict[str, Any]:
    return access_logger.makeRecord(access_logger.name, level, __file__, 0, "", (), None, "log").__dict__


os.register_at_fork(after_in_child=_standard_fields.cache_clear)  # the process's id is in it


@lru_cache(10_000)
def _around_ids(kind: RequestKind, level: int) -> tuple[str, str]:
    """JSON of what stands before the ids and after them; nothing when the line is long, or hides an id."""
    line = line_fields(_AccessRecord(level, kind, {}))
    after = {name: line.pop(name) for name in kind.fields}
    before = {name: value for name, value in line.items() if name not in ("time", "event_id", *_IDS)}
    texts = [json.dumps(fields, separators=(",", ":"))[1:-1] for fields in (before, after)]
    if sum(map(len, texts)) > _LONGEST or any(map(is_secret, (*_IDS, "duration_ms"))):
        return "", ""
    return texts[0], texts[1]


@receiver(setting_changed)
def _forget_settings(*, setting: str, **_: object) -> None:
    if setting == "MONITORING":
        _around_ids.cache_clear()
