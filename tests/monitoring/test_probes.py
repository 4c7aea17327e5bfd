"""Where the middleware answers probes and scrapes, and what it does not ask of them."""

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.test import Client
from django.urls import include, path

from monitoring.conf import monitoring_settings

from .conftest import counted

PATHS = ("/health", "/livez", "/readyz", "/metrics")
urlpatterns = [path("own/", include("monitoring.urls"))]


@pytest.fixture
def prefix(settings):
    def set_prefix(prefix):
        settings.MONITORING = {**settings.MONITORING, "PROBE_PREFIX": prefix}

    return set_prefix


@pytest.mark.django_db
@pytest.mark.parametrize("probe", PATHS)
def test_answers_before_any_other_middleware(settings, probe):
    settings.SECURE_SSL_REDIRECT = True
    settings.MIDDLEWARE = [
        "monitoring.middleware.MonitoringMiddleware",
        "django.middleware.security.SecurityMiddleware",
        "django.middleware.common.CommonMiddleware",
    ]
    client = Client(headers={"host": "10.1.2.3:8000"})  # how a kubelet and Prometheus call it
    before = counted("http_requests_total", path=probe, status="200")
    assert client.get(probe).status_code == client.head(probe).status_code == 200
    assert counted("http_requests_total", path=probe, status="200") == before + 2
    # What the others say:
    assert client.get("/").status_code == 400
    assert Client().get("/").status_code == 301


@pytest.mark.parametrize("probe", PATHS)
def test_refuses_other_methods(probe):
    before = counted("http_requests_total", path=probe, status="405")
    answer = Client(enforce_csrf_checks=True).post(probe)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET, HEAD")
    assert counted("http_requests_total", path=probe, status="405") == before + 1


@pytest.mark.django_db
@pytest.mark.parametrize("probe", PATHS)
@pytest.mark.urls(__name__)
def test_prefix(prefix, probe):
    prefix("/internal/probes")
    before = counted("http_requests_total", path=f"/internal/probes{probe}", status="200")
    assert Client().get(f"/internal/probes{probe}").status_code == 200
    assert counted("http_requests_total", path=f"/internal/probes{probe}", status="200") == before + 1
    assert Client().get(probe).status_code == 404


@pytest.mark.django_db
@pytest.mark.parametrize("probe", PATHS)
@pytest.mark.urls(__name__)
def test_project_that_includes_the_urls_itself(prefix, caplog, probe):
    prefix(None)
    assert Client().get(probe).status_code == 404
    before = counted("http_requests_total", path=f"/own{probe}", status="200")
    caplog.set_level("INFO")
    caplog.clear()
    assert Client().get(f"/own{probe}").status_code == 200
    assert counted("http_requests_total", path=f"/own{probe}", status="200") == before + 1
    assert [record for record in caplog.records if record.name == "monitoring.access"] == []


@pytest.mark.parametrize("given", ["internal", "/", "/internal/"])
def test_prefix_that_would_answer_nowhere_is_refused(prefix, given):
    prefix(given)
    with pytest.raises(ImproperlyConfigured, match="PROBE_PREFIX"):
        monitoring_settings()
