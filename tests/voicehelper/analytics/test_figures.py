"""Rates, averages and quantiles of totals."""

from decimal import Decimal

import pytest

from monitoring.metrics import LLM_BUCKETS_SECONDS
from voicehelper.analytics.figures import figures, latency_quantile, plain
from voicehelper.analytics.models import LATENCY_BUCKETS, MEASURES, DailyTotal

NOTHING = dict.fromkeys(MEASURES, 0)


def histogram(*counts: int) -> dict[str, int]:
    return {**NOTHING, **{column: count for (column, _), count in zip(LATENCY_BUCKETS, counts, strict=False)}}


def test_the_buckets_are_those_of_the_metric():
    assert tuple(seconds for _, seconds in LATENCY_BUCKETS)[:-1] == LLM_BUCKETS_SECONDS


def test_every_measure_is_a_column_and_every_column_a_measure():
    assert {field.name for field in DailyTotal._meta.concrete_fields} == {
        "id", "tenant_id", "day", "mode", "model", *MEASURES
    }  # fmt: skip


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((), None),
        ((10,), 0.095),
        ((0, 0, 10), 0.975),
        ((90, 10), 0.3),  # half-way in the bucket from 0.1 to 0.5
        ((95, 5), 0.1),
        ((1, 0, 0, 0, 0, 0, 0, 1), 30.0),
        ((0,) * 7 + (3,), 30.0),
        ((94, 0, 0, 0, 0, 0, 6), 10 + 20 / 6),
    ],
)
def test_p95(counts, expected):
    assert latency_quantile(histogram(*counts), 0.95) == (pytest.approx(expected) if expected else None)


def test_figures_of_nothing():
    shown = figures(NOTHING)
    assert {name for name, value in shown.items() if value is None} == {
        "success_rate", "latency_average_seconds", "latency_p95_seconds"
    }  # fmt: skip
    assert shown["cost_dollars"] == "0"


def test_figures():
    totals = {**histogram(1, 0, 1), "completed": 3, "failed": 1, "replies": 2, "latency_seconds": Decimal("0.9")}
    shown = figures({**totals, "cost_dollars": Decimal("12.340000000000")})
    assert (shown["success_rate"], shown["latency_average_seconds"], shown["cost_dollars"]) == (0.75, 0.45, "12.34")


@pytest.mark.parametrize(
    ("amount", "text"), [("0.000000000001", "0.000000000001"), ("1000", "1000"), ("0E-12", "0"), ("-0.50", "-0.5")]
)
def test_plain(amount, text):
    assert plain(Decimal(amount)) == text
