"""The provider for whatever speaks OpenAI's chat completions: OpenAI, vLLM, Ollama, llama.cpp, gateways, ..."""

import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any, cast
from urllib.parse import urlsplit

import httpx2
import openai

from .conf import AssistantSettings
from .providers import FailureReason, Prompt, ProviderFailed, Usage

CONNECT_SECONDS = 5.0
ANSWER_MAX_BYTES = 32 * 2**20
"""Far more than a reply that is cut at REPLY_MAX_CHARS, each character an event of its own."""
_TRANSIENT = frozenset({408, 409, 425, 429})


class OpenAICompatible:
    """Asks the endpoint at `settings.base_url`, over a new connection each time: a reply is worth a handshake."""

    def __init__(self, settings: AssistantSettings) -> None:
        self._base_url, self._api_key = settings.base_url, settings.api_key
        self.name = settings.provider
        url = urlsplit(settings.base_url)
        self.server_address = url.hostname or ""
        self.server_port = url.port or (443 if url.scheme == "https" else 80)

    async def stream(
        self, prompt: Prompt, *, headers: Mapping[str, str], timeout_seconds: float
    ) -> AsyncGenerator[str | Usage, None]:
        client = openai.AsyncOpenAI(
            base_url=self._base_url,
            api_key=self._api_key or "none",  # the client insists on one
            max_retries=0,  # whoever asks us retries, and counts each attempt
            timeout=openai.Timeout(timeout_seconds, connect=min(timeout_seconds, CONNECT_SECONDS)),
            http_client=openai.DefaultAsyncHttpxClient(verify=_tls(), event_hooks={"response": [_bound]}),
        )
        usage = Usage()
        async with client:
            with _failures():
                stream: Any = await client.chat.completions.create(
                    model=prompt.model,
                    messages=_messages(prompt),
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_headers=dict(headers),
                )
            async with stream:
                while True:
                    # Not around the yield: what the caller raises there is not the provider's.
                    try:
                        with _failures():
                            chunk = await anext(stream, None)
                            text = _read(chunk, usage) if chunk is not None else None
                    except ProviderFailed:
                        if not usage.finish_reasons:
                            raise
                        text = None  # The reply is whole; only what it used may be missing.
                    if text is None:
                        break
                    if text:
                        yield text
        if not usage.finish_reasons and usage.output_tokens is None:
            # A stream that is cut between two chunks ends as if it were whole.
            raise ProviderFailed(FailureReason.ERROR, can_retry=True)
        yield usage


class _Bounded(httpx2.AsyncByteStream):
    """An answer's bytes up to ANSWER_MAX_BYTES: the client keeps a line, and a refusal, until it has all of it."""

    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = ANSWER_MAX_BYTES
        async for part in self._stream:
            left -= len(part)
            if left < 0:
                raise httpx2.ReadError("the answer is too large")
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _bound(response: httpx2.Response) -> None:
    response.stream = _Bounded(cast(httpx2.AsyncByteStream, response.stream))


def _messages(prompt: Prompt) -> Any:
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt.turns]
    return [{"role": "system", "content": prompt.system}, *turns]


def _read(chunk: Any, usage: Usage) -> str:
    """Return the text of a chunk, and note what else it says. The client does not check what a provider answers."""
    text = ""
    for choice in getattr(chunk, "choices", None) or ():
        content = getattr(choice.delta, "content", None)
        text += content if isinstance(content, str) else ""
        if choice.finish_reason:
            usage.finish_reasons.append(str(choice.finish_reason))
    usage.model = usage.model or str(getattr(chunk, "model", None) or "")
    if (told := getattr(chunk, "usage", None)) is not None:
        usage.input_tokens = _number(getattr(told, "prompt_tokens", None))
        usage.output_tokens = _number(getattr(told, "completion_tokens", None))
        cached = getattr(getattr(told, "prompt_tokens_details", None), "cached_tokens", None)
        usage.cached_input_tokens = _number(cached) or 0
    return text


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 <= value < 2**31 else None


@contextmanager
def _failures() -> Iterator[None]:
    """Turn what the client raises into ProviderFailed."""
    try:
        yield
    except openai.APITimeoutError as error:
        raise ProviderFailed(FailureReason.TIMEOUT, can_retry=True) from error
    except openai.APIStatusError as error:
        is_rate_limit = error.status_code == 429
        can_retry = error.status_code >= 500 or error.status_code in _TRANSIENT
        raise ProviderFailed(
            FailureReason.RATE_LIMITED if is_rate_limit else FailureReason.ERROR,
            can_retry=can_retry and error.code != "insufficient_quota",  # a 429 that waiting does not end
            retry_after_seconds=_retry_after_seconds(error.response.headers),
        ) from error
    except openai.APIError as error:  # no connection, a broken one, or an error amid the stream
        is_rate_limit = "rate_limit" in f"{error.code} {error.type}"
        reason = FailureReason.RATE_LIMITED if is_rate_limit else FailureReason.ERROR
        raise ProviderFailed(reason, can_retry=True) from error
    except httpx2.TimeoutException as error:  # amid the body of a refusal, where the client lets it through
        raise ProviderFailed(FailureReason.TIMEOUT, can_retry=True) from error
    except Exception as error:  # what it answers is not the protocol, whatever that makes the client raise
        raise ProviderFailed(FailureReason.ERROR, can_retry=True) from error


def _retry_after_seconds(headers: Mapping[str, str]) -> float:
    """Return how long to wait, from Retry-After (seconds or a date) or OpenAI's retry-after-ms; 0 for nonsense."""
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        elif "retry-after" in headers:
            text = headers["retry-after"].strip()
            try:
                seconds = float(text)
            except ValueError:
                seconds = parsedate_to_datetime(text).timestamp() - time.time()
        else:
            return 0
    except (ValueError, TypeError, OverflowError):
        return 0
    return seconds if 0 <= seconds < float("inf") else 0


@cache
def _tls() -> ssl.SSLContext:
    # Reading the authorities takes tens of milliseconds.
    return ssl.create_default_context()
