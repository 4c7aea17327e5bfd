"""Metrics, traces, structured logs and health of a Django project and its worker processes.

Add `monitoring` to INSTALLED_APPS and `monitoring.middleware.MonitoringMiddleware` first in MIDDLEWARE: it also answers
/health, /livez, /readyz and /metrics. Worker processes wrap their loop in `monitoring.worker.Worker`.
"""
