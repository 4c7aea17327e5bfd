"""Exemplars: a histogram's buckets name a trace that fell into them, for whoever asks for OpenMetrics."""

import json
from collections.abc import Iterable
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import SpanContext
from prometheus_client import Histogram, values
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Exemplar


def observe(histogram: Histogram, amount: float) -> None:
    """Observe `amount` in the histogram (or its child, of `.labels()`), naming the current trace if it is sampled."""
    histogram.observe(amount, exemplar_of(trace.get_current_span().get_span_context()))


def exemplar_of(ids: SpanContext) -> dict[str, str] | None:
    """Return the exemplar's labels, `trace_id` and `span_id`; None for a trace not sampled: it leads nowhere."""
    if not ids.trace_flags & 1:
        return None
    return {"trace_id": f"{ids.trace_id:032x}", "span_id": f"{ids.span_id:016x}"}


# Processes that count into shared files keep their exemplars to themselves: prometheus_client drops them there. The
# one that answers the scrape adds its own to everybody's buckets. By key of the file: JSON of family, sample, labels.
_own: dict[str, Exemplar] = {}


def _keep(value: Any, exemplar: Exemplar) -> None:
    _own[value._key] = exemplar


if values.ValueClass._multiprocess:
    values.ValueClass.set_exemplar = _keep


def add_own(metrics: Iterable[Metric]) -> None:
    """Add this process's exemplars to what was read from shared files."""
    if not _own:
        return
    exemplars: dict[str, dict[tuple[str, frozenset[tuple[str, str]]], Exemplar]] = {}
    for key, exemplar in _own.copy().items():
        family, sample_name, labels, _ = json.loads(key)
        exemplars.setdefault(family, {})[sample_name, frozenset(labels.items())] = exemplar
    for metric in metrics:
        if of_family := exemplars.get(metric.name):
            metric.samples = [
                sample._replace(exemplar=of_family.get((sample.name, frozenset(sample.labels.items()))))
                for sample in metric.samples
            ]
