"""What a consumer does when handlers fail: how often to try again, and when to stop draining a topic."""

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often and how patiently a failing event is tried again (specification, RetryHandler: 100, 200, 400 ms).

    `max_retries`: attempts after the first one; 0 for none. Retry n waits `initial_delay_seconds` times `multiplier`
    to the n-1, at most `max_delay_seconds`. `jitter`: up to this share of each delay, 0 to 1, is taken off at random,
    so that members which failed together do not try again together.

    Raises ValueError for a value out of range.
    """

    max_retries: int = 3
    initial_delay_seconds: float = 0.1
    multiplier: float = 2.0
    max_delay_seconds: float = 30.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        _check_int("RetryPolicy", "max_retries", self.max_retries, least=0)
        _check_number("RetryPolicy", "initial_delay_seconds", self.initial_delay_seconds, least=0)
        _check_number("RetryPolicy", "multiplier", self.multiplier, least=1)
        _check_number("RetryPolicy", "max_delay_seconds", self.max_delay_seconds, least=0)
        _check_number("RetryPolicy", "jitter", self.jitter, least=0, most=1)

    def delays_seconds(self) -> list[float]:
        """The pause before each retry; with jitter, others at each call."""
        delays = []
        delay = self.initial_delay_seconds
        for _ in range(self.max_retries):
            delay = min(delay, self.max_delay_seconds)
            delays.append(delay * (1 - self.jitter * random.random()))  # noqa: S311  (no secret)
            delay *= self.multiplier
        return delays


@dataclass(frozen=True, kw_only=True)
class FailureGuard:
    """Pauses a consumer of whose last `window_events` events more than the share `max_failed_share` failed.

    A bad deploy must not drain a topic into the dead letters. `max_failed_share`: 0 (one failure is enough) to
    below 1. Raises ValueError for a value out of range.
    """

    max_failed_share: float = 0.5
    window_events: int = 100

    def __post_init__(self) -> None:
        _check_int("FailureGuard", "window_events", self.window_events, least=1)
        _check_number("FailureGuard", "max_failed_share", self.max_failed_share, least=0)
        if self.max_failed_share >= 1:
            raise ValueError(
                f"FailureGuard: max_failed_share is {self.max_failed_share!r}, and no share is more than that: "
                "use one below 1, or guard=None for no guard"
            )


def _check_int(owner: str, name: str, value: int, *, least: int) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{owner}: {name} is {value!r}; it must be a whole number, at least {least}")


def _check_number(owner: str, name: str, value: float, *, least: float, most: float = math.inf) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most or math.isinf(value):
        wanted = f"at least {least}" if math.isinf(most) else f"from {least} to {most}"
        raise ValueError(f"{owner}: {name} is {value!r}; it must be a number, {wanted}")
