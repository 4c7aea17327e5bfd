"""What this thread or task is working for: read by the log lines and by emitted events."""

from contextvars import ContextVar

correlation_id: ContextVar[str] = ContextVar("correlation_id", default="")
tenant_id: ContextVar[str] = ContextVar("tenant_id", default="")
event_id: ContextVar[str] = ContextVar("event_id", default="")
