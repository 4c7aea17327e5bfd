"""Whatever comes from outside, the number of series stays bounded."""

import logging
from uuid import uuid4

import pytest
from django.core.wsgi import get_wsgi_application
from django.test import RequestFactory
from prometheus_client import REGISTRY, CollectorRegistry, Counter

from monitoring import labels, metrics
from monitoring.labels import OTHER, bounded

FLOOD = 10_000


def series():
    return {(sample.name, *sorted(sample.labels.items())) for family in REGISTRY.collect() for sample in family.samples}


@pytest.fixture(autouse=True)
def forget_values(monkeypatch):
    monkeypatch.setattr(labels, "_seen", {})


@pytest.mark.django_db  # a request's end looks at the connections
@pytest.mark.urls("tests.monitoring.project.urls")
def test_flood_of_odd_requests(settings):
    settings.MIDDLEWARE = ["monitoring.middleware.MonitoringMiddleware", "django.middleware.common.CommonMiddleware"]
    logging.disable()
    try:
        application, factory = get_wsgi_application(), RequestFactory()
        before = series()
        for number in range(FLOOD):
            # Every path is new, and every method; some meet a route, some are no text.
            odd = (f"/odd-{number}", f"/items/{uuid4()}", f"/{number}/\udc80\n{{}}", f"/old/{number}")[number % 4]
            environ = factory.generic(f"ODD{number}", "/").environ
            environ |= {
                "PATH_INFO": odd.encode("utf-8", "surrogateescape").decode("latin-1"),
                "QUERY_STRING": f"tenant={number}",
                "HTTP_HOST": ("testserver", f"evil-{number}.example")[number % 3 == 0],
                "HTTP_X_CORRELATION_ID": f"id-{number}",
                "HTTP_X_TENANT_ID": f"tenant-{number}",
            }
            application(environ, lambda status, headers: None)
    finally:
        logging.disable(logging.NOTSET)
    # By the few routes that were met, the one method and the few statuses.
    assert len(series() - before) <= 4 * 20
    metrics.exposition()[0].decode()


@pytest.mark.parametrize("odd", ["tenant-{}", "{}" * 50, "\udc80{}", '\x00{}\n"\\', "{}é"])
def test_flood_of_odd_values(odd):
    counter = Counter("test_flood_total", "Flooded", ["event_type", "tenant_id"], registry=CollectorRegistry())
    for number in range(FLOOD):
        counter.labels(
            bounded("event_type", odd.replace("{}", str(number))), bounded("tenant_id", number, limit=7)
        ).inc()
    [family] = counter.collect()
    assert len(family.samples) <= 500 + 1
    assert len({sample.labels["tenant_id"] for sample in family.samples}) == 7 + 1
    assert sum(sample.value for sample in family.samples) == FLOOD  # nothing is lost
    assert all(len(sample.labels["event_type"].encode()) <= 200 for sample in family.samples)


def test_first_values_are_kept_and_later_ones_are_other():
    assert [bounded("x", value, limit=2) for value in ("a", "b", "c", "a", "b")] == ["a", "b", OTHER, "a", "b"]
    assert bounded("y", "c", limit=2) == "c"  # each label has its own
    assert bounded("x", "") == OTHER
    assert bounded("y", "\udc80") == bounded("y", "\udc80") == "?"
    assert bounded("y", "x" * 101) == "x" * 100
