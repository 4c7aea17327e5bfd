"""The trace that an event belongs to, as its row and its Kafka headers carry it."""

from collections.abc import Iterable, Mapping

from opentelemetry import trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.trace import SpanContext
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_TRACE_CONTEXT = TraceContextTextMapPropagator()

W3C = CompositePropagator([_TRACE_CONTEXT, W3CBaggagePropagator()])
"""Always these, in row and record, whatever OTEL_PROPAGATORS chooses for requests: the columns are theirs."""


def span_contexts(carriers: Iterable[Mapping[str, str]], limit: int = 128) -> list[SpanContext]:
    """The spans that the carriers name, each once, `limit` at most: more links a span does not keep."""
    found: dict[str, SpanContext] = {}
    for carrier in carriers:
        traceparent = carrier.get("traceparent", "")
        if traceparent and traceparent not in found:
            ids = trace.get_current_span(_TRACE_CONTEXT.extract(carrier)).get_span_context()
            if ids.is_valid:
                found[traceparent] = ids
                if len(found) == limit:
                    break
    return list(found.values())
