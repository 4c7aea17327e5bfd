"""Metrics, traces, structured logs and health of a Django project and its worker processes.

Add `monitoring` to INSTALLED_APPS, `monitoring.middleware.MonitoringMiddleware` first in MIDDLEWARE and
`monitoring.urls` to the root URLs. Worker processes wrap their loop in `monitoring.worker.Worker`.
"""
