"""What this thread or task is working for: read by the log lines and by emitted events."""

from collections.abc import Mapping
from contextvars import ContextVar
from uuid import UUID

correlation_id: ContextVar[str] = ContextVar("correlation_id", default="")
tenant_id: ContextVar[str] = ContextVar("tenant_id", default="")
event_id: ContextVar[str | UUID] = ContextVar("event_id", default="")
_NO_HEADERS: Mapping[str, str] = {}
trace_headers: ContextVar[Mapping[str, str]] = ContextVar("trace_headers", default=_NO_HEADERS)
"""Headers with the trace (W3C) that the work belongs to where it has no span of its own: none would be recorded."""
records_unsampled: ContextVar[bool] = ContextVar("records_unsampled", default=True)
"""False: the work is one of very many, done again if it fails. Only what is sampled is recorded of it."""
