"""What this thread or task is working for: read by the log lines and by emitted events."""

from contextvars import ContextVar
from uuid import UUID

correlation_id: ContextVar[str] = ContextVar("correlation_id", default="")
tenant_id: ContextVar[str] = ContextVar("tenant_id", default="")
event_id: ContextVar[str | UUID] = ContextVar("event_id", default="")
traceparent: ContextVar[str] = ContextVar("traceparent", default="")
"""The trace (W3C) that the work belongs to where there is no span of its own, because none would be recorded."""
