"""What totals tell: rates, averages and quantiles of them."""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from .models import LATENCY_BUCKETS


def figures(totals: Mapping[str, int | Decimal]) -> dict[str, Any]:
    """The totals (MEASURES) as the API shows them.

    `success_rate`: completed of all that ended, 0 to 1. `latency_*`: of replies. Each of these is None where there was
    nothing. `cost_dollars` is exact, as text.
    """
    ended = totals["completed"] + totals["failed"]
    replies = totals["replies"]
    return {
        **{name: int(totals[name]) for name in ("conversations", "completed", "failed")},
        "success_rate": float(totals["completed"] / ended) if ended else None,
        **{name: int(totals[name]) for name in ("messages", "replies", "input_tokens", "output_tokens")},
        "cost_dollars": plain(totals["cost_dollars"]),
        "latency_average_seconds": round(float(totals["latency_seconds"] / replies), 6) if replies else None,
        "latency_p95_seconds": latency_quantile(totals, 0.95),
    }


def plain(amount: int | Decimal) -> str:
    """A decimal number in digits, without zeros at its end: "0.0125", "3", "0"."""
    return f"{Decimal(amount).normalize():f}" if amount else "0"


def latency_quantile(totals: Mapping[str, int | Decimal], quantile: float) -> float | None:
    """Estimate a quantile of the replies' latency in seconds from the histogram, as Prometheus does.

    Evenly spread within a bucket; of replies that took longer than its last bound it is only known that they did, and
    that bound is returned. None without replies.
    """
    counts = [int(totals[column]) for column, _ in LATENCY_BUCKETS]
    rank = quantile * sum(counts)
    if not rank:
        return None
    below, lower = 0, 0.0
    for count, (_, upper) in zip(counts, LATENCY_BUCKETS, strict=True):
        if upper == float("inf"):
            break
        if count and below + count >= rank:
            return round(lower + (upper - lower) * (rank - below) / count, 6)
        below, lower = below + count, upper
    return lower
