"""Settings of a project that has monitoring and no other application of this repository."""

import os

import dj_database_url

SECRET_KEY = "only-for-tests"
ALLOWED_HOSTS = ["127.0.0.1", "testserver"]
INSTALLED_APPS = ["django.contrib.contenttypes", "monitoring"]
MIDDLEWARE = [
    "monitoring.middleware.MonitoringMiddleware",
    "django.middleware.common.CommonMiddleware",
]
ROOT_URLCONF = "tests.monitoring.project.urls"
DATABASES = {"default": dj_database_url.parse(os.environ.get("PROJECT_DATABASE_URL", "sqlite://:memory:"))}
USE_TZ = True
LOGGING_CONFIG = None
MONITORING = {
    "SERVICE_NAME": "project",
    "LOG_FORMAT": os.environ.get("LOG_FORMAT", "json"),
    "SAMPLING_MODE": os.environ.get("SAMPLING_MODE", "keep_failed"),
    "TRACE_EXCEPTION_MESSAGES": "TRACE_EXCEPTION_MESSAGES" in os.environ,
}
