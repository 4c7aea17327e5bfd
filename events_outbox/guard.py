"""The failure guard of a consumer: a bad deploy must not drain a topic into the dead letters."""

from collections import deque
from itertools import repeat

from .policies import FailureGuard


class Guard:
    """Counts how many of the last events failed, by the rule of a `FailureGuard`; without one it never trips."""

    def __init__(self, rule: FailureGuard | None) -> None:
        self._most_failures = float("inf") if rule is None else rule.max_failed_share * rule.window_events
        self._failed: deque[bool] = deque(maxlen=rule.window_events if rule else 0)

    def note_handled(self, count: int) -> None:
        self._failed.extend(repeat(False, min(count, self._failed.maxlen or 0)))

    def note_failed(self, count: int) -> None:
        self._failed.extend(repeat(True, count))

    def would_trip(self, more_failures: int) -> bool:
        """Whether so many failures more would be too many."""
        return sum(self._failed) + more_failures > self._most_failures

    def is_tripped(self) -> bool:
        return self.would_trip(0)

    def reset(self) -> None:
        """Begin to count anew."""
        self._failed.clear()

    def __str__(self) -> str:
        return f"{sum(self._failed)} of the last {len(self._failed)} events failed"
