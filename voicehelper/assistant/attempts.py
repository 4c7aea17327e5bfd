"""One reply of a provider: asked again when it fails, within a bounded time; each attempt measured and priced."""

import asyncio
import itertools
import random
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from enum import Enum

from monitoring.llm import LlmRequest, cost_of

from .conf import AssistantSettings
from .providers import FailureReason, Prompt, Provider, ProviderFailed, Usage, approximate_tokens

REPLY_MAX_CHARS = 32_000
"""A longer reply is cut there, and the provider stopped."""
RETRY_DELAY_MAX_SECONDS = 8.0
_random = random.SystemRandom()


class Signal(Enum):
    """What happens beside text. RESTART: the text so far does not count, a new attempt begins. TICK: time passes."""

    RESTART = "restart"
    TICK = "tick"


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A whole reply. `cost_dollars`: None where LLM_PRICES has no price for the model."""

    content: str
    model: str
    input_tokens: int
    output_tokens: int
    cost_dollars: float | None


async def complete(
    provider: Provider,
    prompt: Prompt,
    settings: AssistantSettings,
    say: Callable[[str | Signal], None],
    *,
    conversation_id: str,
) -> Completion:
    """Have the provider reply, and `say` the text as it comes.

    An attempt that fails is repeated where that may help: at most `max_attempts` in all, after a delay that doubles and
    is jittered, not before the provider's Retry-After, and never past `reply_seconds`. Raises the last ProviderFailed.
    """
    now = asyncio.get_running_loop().time
    deadline = now() + settings.reply_seconds
    for number in itertools.count(1):
        attempt = _Attempt(provider, prompt, conversation_id)
        try:
            return await attempt.run(say, deadline=deadline, timeout_seconds=settings.timeout_seconds)
        except ProviderFailed as failure:
            delay = _delay_seconds(number, failure, settings)
            if not failure.can_retry or number >= settings.max_attempts or now() + delay >= deadline:
                raise
        if attempt.text:
            say(Signal.RESTART)
        await asyncio.sleep(delay)
    raise AssertionError("unreachable")


def _delay_seconds(number: int, failure: ProviderFailed, settings: AssistantSettings) -> float:
    delay = min(settings.retry_delay_seconds * 2 ** (number - 1), RETRY_DELAY_MAX_SECONDS)
    # At least half of it: a provider in trouble is not to be asked at once. Jitter also on top of a Retry-After, which
    # everybody who was refused has got alike.
    jittered: float = delay * _random.uniform(0.5, 1)
    return failure.retry_after_seconds + jittered


class _Attempt:
    """One request to the provider, counted once however it ends."""

    def __init__(self, provider: Provider, prompt: Prompt, conversation_id: str) -> None:
        self._provider, self._prompt = provider, prompt
        self._parts: list[str] = []
        self._usage = Usage()
        self._request = LlmRequest(
            model=prompt.model,
            provider=provider.name,
            server_address=provider.server_address,
            server_port=provider.server_port,
            attributes={"gen_ai.request.stream": True, "gen_ai.conversation.id": conversation_id},
        )

    @property
    def text(self) -> str:
        """What the provider has said so far."""
        return "".join(self._parts)

    async def run(self, say: Callable[[str | Signal], None], *, deadline: float, timeout_seconds: float) -> Completion:
        try:
            try:
                async with asyncio.timeout_at(deadline):
                    await self._read(say, timeout_seconds)
            except TimeoutError as error:
                raise ProviderFailed(FailureReason.TIMEOUT, can_retry=False) from error
            if not self.text.strip():
                raise ProviderFailed(FailureReason.ERROR, can_retry=True)
        except BaseException as error:
            # Also of a reply that nobody waits for any more, which is no error: what was used was used.
            if self._parts or self._usage.output_tokens is not None:
                self._count()
            cause = error.__cause__ if isinstance(error, ProviderFailed) else error
            self._request.end(cause or str(error))
            raise
        completion = self._count()
        self._request.end()
        return completion

    async def _read(self, say: Callable[[str | Signal], None], timeout_seconds: float) -> None:
        pieces = self._provider.stream(self._prompt, headers=self._request.headers, timeout_seconds=timeout_seconds)
        length = 0
        async with aclosing(pieces):
            async for piece in pieces:
                if isinstance(piece, Usage):
                    self._usage = piece
                    continue
                if not self._parts:
                    seconds = self._request.seconds
                    self._request.span.set_attribute("gen_ai.response.time_to_first_chunk", seconds)
                text = _storable(piece)[: REPLY_MAX_CHARS - length]
                length += len(text)
                self._parts.append(text)
                say(text)
                if length >= REPLY_MAX_CHARS:
                    self._usage.finish_reasons.append("length")
                    return

    def _count(self) -> Completion:
        """Tell metrics and span what was used: what the provider says, else an estimate."""
        usage, prompt = self._usage, self._prompt
        input_tokens, output_tokens = usage.input_tokens, usage.output_tokens
        if input_tokens is None:
            input_tokens = sum(map(approximate_tokens, (prompt.system, *(turn.content for turn in prompt.turns))))
        if output_tokens is None:
            output_tokens = approximate_tokens(self.text)
        cost = cost_of(
            prompt.model,
            usage.model,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            cached_input_tokens=usage.cached_input_tokens,
        )
        self._request.answered(model=usage.model, finish_reasons=usage.finish_reasons)
        self._request.used(
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            cached_input_tokens=usage.cached_input_tokens,
            cost_dollars=cost,
        )
        return Completion(
            content=self.text,
            model=prompt.model,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            cost_dollars=cost,
        )


def _storable(text: str) -> str:
    # PostgreSQL takes no NUL, UTF-8 no unpaired surrogate, and JSON may carry both.
    return text.replace("\x00", "").encode("utf-8", "replace").decode()
