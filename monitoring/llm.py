"""LLM requests: time, tokens, cost, errors, and a span each; by hand, or with an `openai` client that is observed.

Prices are those of MONITORING["LLM_PRICES"]. Nothing here reads what was said: no message is in a span, a log line or
a label. Spans follow OpenTelemetry's semantic conventions for generative AI.
"""

import functools
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

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
    with _failures_are_logged():
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
        with _failures_are_logged():
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
        with _failures_are_logged():
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
        # A deployment may have a name of its own: then the model that answered tells.
        price = price_of(self._model) or price_of(self._response_model)
        if price is None:
            LLM_UNPRICED.labels(*self._labels).inc()
            if self._labels[0] not in _unpriced:
                _unpriced.add(self._labels[0])
                logger.warning("LLM_PRICES has no price for the model %r: its cost is not counted", self._labels[0])
            return None
        cached = min(self._cached_input_tokens, self._input_tokens)
        dollars = (
            (self._input_tokens - cached) * price["input"]
            + cached * price.get("cached_input", price["input"])
            + self._output_tokens * price["output"]
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
def _failures_are_logged() -> Iterator[None]:
    try:
        yield
    except Exception:  # a full disk under the shared metrics must not become a failed request
        logger.exception("an LLM request could not be recorded")


# --- The client of the package `openai` ---

_Client = TypeVar("_Client")
_RAW_RESPONSE_HEADER = "X-Stainless-Raw-Response"


def observe_openai(client: _Client, *, provider: str = "openai", ask_for_usage: bool = True) -> _Client:
    """Observe the chat completions and embeddings of an `openai.OpenAI` or `AsyncOpenAI`, and return that client.

    `provider`: who is at its `base_url`: the label, and gen_ai.provider.name. A request is one however often `openai`
    tries it, and carries a `traceparent`. A stream is measured to its end, or until it is closed or dropped. A provider
    tells what a stream used only when asked (`stream_options`), in a chunk more, which is kept from a caller that did
    not ask; `ask_for_usage=False` is for a provider that refuses the question. Where no usage is told, none is counted.

    Clients made by `with_options()` are new ones: observe those. `with_raw_response` is timed, and its tokens are
    counted unless it streams; other APIs (responses, audio) are not observed.
    """
    if getattr(client, "_is_observed", False):
        return client
    client._is_observed = True  # type: ignore[attr-defined]
    observe = functools.partial(_observe, client, provider=provider, ask_for_usage=ask_for_usage)
    chat: Any = client.chat.completions  # type: ignore[attr-defined]
    chat.create = observe("chat", chat.create)
    chat.parse = observe("chat", chat.parse)
    embeddings: Any = client.embeddings  # type: ignore[attr-defined]
    embeddings.create = observe("embeddings", embeddings.create)
    return client


def _observe(
    client: Any, operation: str, call: Callable[..., Any], *, provider: str, ask_for_usage: bool
) -> Callable[..., Any]:
    def begin(arguments: dict[str, Any]) -> _OpenAICall:
        return _OpenAICall(client, operation, arguments, provider=provider, ask_for_usage=ask_for_usage)

    if not hasattr(client, "__aenter__"):

        @functools.wraps(call)
        def observed(**arguments: Any) -> Any:
            begun = begin(arguments)
            with begun.request.making():
                answer = call(**begun.arguments)
            return begun.observe_answer(answer)

        return observed

    @functools.wraps(call)
    async def observed_async(**arguments: Any) -> Any:
        begun = begin(arguments)
        with begun.request.making():
            answer = await call(**begun.arguments)
        return begun.observe_answer(answer)

    return observed_async


class _OpenAICall:
    """One call of the client: the arguments it is made with, and what its answer says."""

    def __init__(
        self, client: Any, operation: str, arguments: dict[str, Any], *, provider: str, ask_for_usage: bool
    ) -> None:
        headers = dict(arguments.get("extra_headers") or {})
        self._is_raw = _RAW_RESPONSE_HEADER in headers
        self._is_whole = headers.get(_RAW_RESPONSE_HEADER) != "stream"
        self._is_stream = bool(arguments.get("stream"))
        told = {name: arguments.get(name) for name in ("max_tokens", "temperature", "top_p")}
        self.request = LlmRequest(
            model=str(arguments.get("model", "")),
            provider=provider,
            operation=operation,
            server_address=client.base_url.host,
            server_port=client.base_url.port or (443 if client.base_url.scheme == "https" else 80),
            attributes={
                **({"gen_ai.request.stream": True} if self._is_stream else {}),
                **{f"gen_ai.request.{name}": value for name, value in told.items() if isinstance(value, int | float)},
            },
        )
        self.arguments = {**arguments, "extra_headers": {**self.request.headers, **headers}}
        self._hides_usage = (
            ask_for_usage and self._is_stream and not self._is_raw and not _says_whether_usage_is_told(arguments)
        )
        if self._hides_usage:
            options = arguments.get("stream_options")
            options = options if isinstance(options, Mapping) else {}
            self.arguments["stream_options"] = {**options, "include_usage": True}

    def observe_answer(self, answer: Any) -> Any:
        """Read what the answer used, at its end, and return it for the caller."""
        if self._is_stream and not self._is_raw:
            stream = _AsyncStream if hasattr(answer, "__anext__") else _Stream
            return stream(answer, _Watch(self.request, hides_usage=self._hides_usage))
        with _failures_are_logged():
            if not self._is_raw:
                _read_answer(self.request, answer)
            elif self._is_whole and not self._is_stream:
                _read_answer(self.request, answer.parse())  # which keeps it for the caller
        self.request.end()
        return answer


def _says_whether_usage_is_told(arguments: Mapping[str, Any]) -> bool:
    options = arguments.get("stream_options")
    return "stream_options" in (arguments.get("extra_body") or {}) or (
        isinstance(options, Mapping) and "include_usage" in options
    )


def _read_answer(request: LlmRequest, answer: Any) -> None:
    choices = getattr(answer, "choices", None) or ()
    reasons = [choice.finish_reason for choice in choices if choice.finish_reason]
    request.answered(model=getattr(answer, "model", None) or "", finish_reasons=reasons)
    _read_usage(request, getattr(answer, "usage", None))


def _read_usage(request: LlmRequest, usage: Any) -> None:
    # The client does not check what a provider answers.
    input_tokens = _number(getattr(usage, "prompt_tokens", None))
    output_tokens = _number(getattr(usage, "completion_tokens", None))
    if input_tokens is not None or output_tokens is not None:
        cached = _number(getattr(getattr(usage, "prompt_tokens_details", None), "cached_tokens", None))
        request.used(input_tokens=input_tokens or 0, output_tokens=output_tokens or 0, cached_input_tokens=cached or 0)


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


class _Watch:
    """What a stream's chunks say, and when it ends: read to its end, broken, closed early or dropped."""

    def __init__(self, request: LlmRequest, *, hides_usage: bool) -> None:
        self.request = request
        self._hides_usage = hides_usage
        self._model = ""
        self._finish_reasons: dict[int, str] = {}
        self._usage: Any = None
        self._has_begun = self._is_reading = False

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around the step to the next chunk, which may be the stream's end."""
        self._is_reading = True
        try:
            yield
        except (StopIteration, StopAsyncIteration):
            # A stream that is cut between two chunks ends as if it were whole.
            is_whole = self._finish_reasons or self._usage is not None
            self.end(None if is_whole else "incomplete_stream")
            raise
        except BaseException as error:
            self.end(error)
            raise
        finally:
            self._is_reading = False

    def takes(self, chunk: Any) -> bool:
        """Note what the chunk says; True when it is there only because we asked for the usage."""
        is_ours = False
        with _failures_are_logged():
            if not self._has_begun:
                self._has_begun = True
                self.request.span.set_attribute("gen_ai.response.time_to_first_chunk", self.request.seconds)
            self._model = self._model or getattr(chunk, "model", None) or ""
            choices = getattr(chunk, "choices", None) or ()
            for choice in choices:
                if choice.finish_reason:
                    self._finish_reasons[choice.index] = choice.finish_reason
            if (usage := getattr(chunk, "usage", None)) is not None:
                self._usage = usage
                is_ours = self._hides_usage and not choices
        return is_ours

    def closed(self) -> None:
        """The response was closed: by the caller, unless a step is under way, whose outcome then tells."""
        if not self._is_reading:
            self.end()

    def end(self, error: BaseException | str | None = None) -> None:
        if self.request.has_ended:
            return
        with _failures_are_logged():
            reasons = [reason for _, reason in sorted(self._finish_reasons.items())]
            self.request.answered(model=self._model, finish_reasons=reasons)
            _read_usage(self.request, self._usage)
        self.request.end(error)


class _Stream:
    """`openai.Stream` for the caller, watched."""

    def __init__(self, stream: Any, watch: _Watch) -> None:
        self._stream = stream
        self._watch = watch
        # Everybody who closes a stream closes its response, also helpers that know nothing of this class.
        close = stream.response.close

        def close_watched() -> None:
            try:
                close()
            finally:
                watch.closed()

        stream.response.close = close_watched

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while True:
            with self._watch.reading():
                chunk = next(self._stream)
            if not self._watch.takes(chunk):
                return chunk

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __del__(self) -> None:
        self._watch.end()  # of a stream that was dropped; else it has ended

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _AsyncStream:
    """`openai.AsyncStream` for the caller, watched."""

    def __init__(self, stream: Any, watch: _Watch) -> None:
        self._stream = stream
        self._watch = watch
        close = stream.response.aclose

        async def close_watched() -> None:
            try:
                await close()
            finally:
                watch.closed()

        stream.response.aclose = close_watched

    def __aiter__(self) -> "_AsyncStream":
        return self

    async def __anext__(self) -> Any:
        while True:
            with self._watch.reading():
                chunk = await anext(self._stream)
            if not self._watch.takes(chunk):
                return chunk

    async def __aenter__(self) -> "_AsyncStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stream.close()

    def __del__(self) -> None:
        self._watch.end()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
