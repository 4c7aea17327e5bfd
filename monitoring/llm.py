"""LLM requests: time, tokens, cost, errors, and a span each; for an `openai` client see `monitoring.openai_client`.

Prices are those of MONITORING["LLM_PRICES"]. Nothing here reads what was said: no message is in a span, a log line or
a label. Spans follow OpenTelemetry's semantic conventions for generative AI.
"""

import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from monitoring import context
from monitoring.conf import monitoring_settings
from monitoring.failures import mark_failed
from monitoring.labels import bounded
from monitoring.metrics import LLM_COST_DOLLARS, LLM_ERRORS, LLM_REQUEST_SECONDS, LLM_TOKENS, LLM_UNPRICED

logger = logging.getLogger(__name__)
tracer = trace.get_tracer(__name__)

# Not the global propagator: it would tell the provider our baggage as well.
_propagator = TraceContextTextMapPropagator()
_VERSION = re.compile(r"[-@:](latest|\d{4}-\d{2}-\d{2}|\d{4,8})")
_unpriced: set[str] = set()


def record_llm_usage(
    *,
    model: str,
    provider: str,
    input_tokens: int,
    output_tokens: int,
    cost_dollars: float,
    tenant_id: str = "",
) -> None:
    """Count the tokens and the cost of one request: the specification's recordLLMUsage. Never raises.

    `tenant_id`: whom it was for; left out, the tenant of `monitoring.context`. For a request that is not made through
    `llm_request()`, which calls this by itself.
    """
    with failures_are_logged():
        labels = _labels(model, provider)
        _count_tokens(labels, input_tokens, output_tokens)
        _count_cost(labels, cost_dollars, tenant_id or context.tenant_id.get())


@contextmanager
def llm_request(
    *, model: str, provider: str, operation: str = "chat", server_address: str = "", server_port: int | None = None
) -> Iterator["LlmRequest"]:
    """Observe one request to a model: the block makes it, and tells what it used; for sync and async code.

        with llm_request(model="gpt-4o", provider="openai") as request:
            answer = ...
            request.used(input_tokens=answer.input_tokens, output_tokens=answer.output_tokens)

    An exception that leaves the block is counted in llm_request_errors_total; a task that is cancelled is not. Tokens
    and cost are counted when the block ends, also when it fails: what was used was used.
    """
    request = LlmRequest(
        model=model, provider=provider, operation=operation, server_address=server_address, server_port=server_port
    )
    with request.making():
        yield request
    request.end()


class LlmRequest:
    """One request from its start to `end()`, which counts it once."""

    def __init__(
        self,
        *,
        model: str,
        provider: str,
        operation: str = "chat",
        server_address: str = "",
        server_port: int | None = None,
        attributes: Mapping[str, AttributeValue] | None = None,
    ) -> None:
        self._model = model
        self._response_model = ""
        self._tenant_id = context.tenant_id.get()  # now: the end of a stream may be outside of the request
        self._input_tokens = self._output_tokens = self._cached_input_tokens = 0
        self._has_usage = self.has_ended = False
        self._cost_dollars: float | None = None
        self._labels = _labels(model, provider)
        with failures_are_logged():
            LLM_ERRORS.labels(*self._labels)  # begins at 0
        named = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": provider,
            "gen_ai.request.model": str(model)[:100],
            "server.address": server_address,
            "server.port": server_port,
            **(attributes or {}),
        }
        self.span = tracer.start_span(
            f"{operation} {self._labels[0]}",
            kind=SpanKind.CLIENT,
            attributes={name: value for name, value in named.items() if value not in (None, "")},
        )
        self._started = time.perf_counter()

    @contextmanager
    def making(self) -> Iterator[None]:
        """Make the span the current one while the request is made; an exception ends both."""
        try:
            with trace.use_span(self.span, record_exception=False, set_status_on_exception=False):
                yield
        except BaseException as error:
            self.end(error)
            raise

    @property
    def seconds(self) -> float:
        """Return how long it has been going on."""
        return time.perf_counter() - self._started

    @property
    def headers(self) -> dict[str, str]:
        """Return the trace for the provider: `traceparent`, and `tracestate` where there is one (W3C)."""
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, trace.set_span_in_context(self.span))
        return carrier

    def used(
        self,
        *,
        input_tokens: int,
        output_tokens: int = 0,
        cached_input_tokens: int = 0,
        cost_dollars: float | None = None,
    ) -> None:
        """Say what the request used; a second call replaces the first.

        `cached_input_tokens`: those of the input tokens that the provider had in its cache. `cost_dollars`: None for
        what LLM_PRICES makes of it.
        """
        self._has_usage = True
        self._input_tokens, self._output_tokens = input_tokens, output_tokens
        self._cached_input_tokens, self._cost_dollars = cached_input_tokens, cost_dollars

    def answered(self, *, model: str = "", finish_reasons: Sequence[str] = ()) -> None:
        """Say which model answered, if it was named, and why it stopped. Only for the span."""
        if model:
            self._response_model = str(model)[:100]
            self.span.set_attribute("gen_ai.response.model", self._response_model)
        if finish_reasons:
            self.span.set_attribute("gen_ai.response.finish_reasons", [str(one)[:50] for one in finish_reasons[:20]])

    def end(self, error: BaseException | str | None = None) -> None:
        """Count the request, with the error that ended it, and end the span. Only the first call counts."""
        if self.has_ended:
            return
        self.has_ended = True
        seconds = self.seconds
        with failures_are_logged():
            if isinstance(error, Exception | str):
                mark_failed(self.span, error)
                LLM_ERRORS.labels(*self._labels).inc()
            LLM_REQUEST_SECONDS.labels(*self._labels).observe(seconds)
            if self._has_usage:
                self._count_usage()
        self.span.end()

    def _count_usage(self) -> None:
        tokens = {
            "gen_ai.usage.input_tokens": self._input_tokens,
            "gen_ai.usage.output_tokens": self._output_tokens,
            "gen_ai.usage.cache_read.input_tokens": self._cached_input_tokens,
        }
        self.span.set_attributes({name: number for name, number in tokens.items() if number})
        _count_tokens(self._labels, self._input_tokens, self._output_tokens)
        cost = self._cost_dollars
        if cost is None:
            cost = self._cost_of_tokens()
        if cost is not None:
            _count_cost(self._labels, cost, self._tenant_id)

    def _cost_of_tokens(self) -> float | None:
        cost = cost_of(
            self._model,
            self._response_model,
            input_tokens=self._input_tokens,
            output_tokens=self._output_tokens,
            cached_input_tokens=self._cached_input_tokens,
        )
        if cost is None:
            LLM_UNPRICED.labels(*self._labels).inc()
            if self._labels[0] not in _unpriced:
                _unpriced.add(self._labels[0])
                logger.warning("LLM_PRICES has no price for the model %r: its cost is not counted", self._labels[0])
        return cost


def cost_of(
    model: str, response_model: str = "", *, input_tokens: int, output_tokens: int, cached_input_tokens: int = 0
) -> float | None:
    """Return what a request costs by LLM_PRICES, in dollars; None where it has no price.

    `response_model`: the model that answered; its price is taken where the one that was asked has none, as a deployment
    with a name of its own. `cached_input_tokens`: those of the input tokens that the provider had in its cache.
    """
    price = price_of(model) or price_of(response_model)
    if price is None:
        return None
    cached = min(cached_input_tokens, input_tokens)
    dollars = (
        (input_tokens - cached) * price["input"]
        + cached * price.get("cached_input", price["input"])
        + output_tokens * price["output"]
    )
    return dollars / 1_000_000


def price_of(model: str) -> Mapping[str, float] | None:
    """Return the price of a model, dollars per million tokens, from LLM_PRICES; None where it has none.

    The longest name in LLM_PRICES wins that is the model's, or all of it but a version: `-2024-08-06`, `-0613`,
    `-latest`. `gpt-4o` says nothing of `gpt-4o-mini`, which costs a fraction.
    """
    prices = monitoring_settings().llm_prices
    for name in sorted(prices, key=len, reverse=True):
        if model.startswith(name) and (model == name or _VERSION.fullmatch(model, len(name))):
            return prices[name]
    return None


def _labels(model: str, provider: str) -> tuple[str, str]:
    return bounded("model", model), bounded("provider", provider)


def _count_tokens(labels: tuple[str, str], input_tokens: int, output_tokens: int) -> None:
    LLM_TOKENS.labels(*labels, "input").inc(input_tokens)
    LLM_TOKENS.labels(*labels, "output").inc(output_tokens)


def _count_cost(labels: tuple[str, str], dollars: float, tenant_id: str) -> None:
    LLM_COST_DOLLARS.labels(*labels, bounded("tenant_id", tenant_id)).inc(dollars)


@contextmanager
def failures_are_logged() -> Iterator[None]:
    """Keep a failure of the recording in the block from the caller."""
    try:
        yield
    except Exception:  # a full disk under the shared metrics must not become a failed request
        logger.exception("an LLM request could not be recorded")
