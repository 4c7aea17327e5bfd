"""observe_openai(): what a client of the package `openai` asks, sync or async, plain or streaming, as LLM requests.

The package is imported by whoever makes the client, not here.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from monitoring.llm import LlmRequest, failures_are_logged

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
        with failures_are_logged():
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
        with failures_are_logged():
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
        with failures_are_logged():
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
