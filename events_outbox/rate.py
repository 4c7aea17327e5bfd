"""How fast events go, and how often the relay looks for them."""

import time
from collections import deque

RATE_SECONDS = 10.0

GATHER = 10
"""Events that a relay that is not behind lets come together: a window has a price, however little is in it."""
GATHER_MAX_SECONDS = 0.05
_NEW_SHARE = 0.3
"""Of the rate of the last window in the rate gone by: the windows are small, and so their rates uneven."""


class Rate:
    """Counts events; their rate is that of about the last RATE_SECONDS. `per_second()` is to be asked often."""

    def __init__(self) -> None:
        self.total = 0
        self._totals = deque([(time.monotonic(), 0)])

    def count(self, events: int) -> None:
        self.total += events

    def per_second(self) -> float:
        now, total = time.monotonic(), self.total
        if now - self._totals[-1][0] >= 1:
            self._totals.append((now, total))
        while len(self._totals) > 1 and self._totals[1][0] < now - RATE_SECONDS:
            self._totals.popleft()
        since, total_then = self._totals[0]
        return (total - total_then) / max(now - since, 1.0)


class Pace:
    """How long a relay that is not behind pauses between two windows.

    While events come, so long that some GATHER of them are in the next window, at most GATHER_MAX_SECONDS; while none
    come, twice as long each time. All within `min_seconds` and `max_seconds`.
    """

    def __init__(self, min_seconds: float, max_seconds: float) -> None:
        self._min_seconds, self._max_seconds = min_seconds, max_seconds
        self._idle_seconds = min_seconds
        self._previous = self._began = time.monotonic() - GATHER_MAX_SECONDS
        self._per_second = 0.0

    def begin(self) -> None:
        """A window begins."""
        self._previous, self._began = self._began, time.monotonic()

    def pause_seconds(self, events: int) -> float:
        """The pause after the window that began last and had so many events."""
        since_previous = max(self._began - self._previous, self._min_seconds)
        self._per_second += _NEW_SHARE * (events / since_previous - self._per_second)
        if not events:
            pause_seconds = self._idle_seconds
            self._idle_seconds = min(self._idle_seconds * 2, self._max_seconds)
            return pause_seconds
        self._idle_seconds = self._min_seconds
        took = time.monotonic() - self._began
        gathers = min(GATHER / self._per_second - took, GATHER_MAX_SECONDS)
        return min(max(gathers, self._min_seconds), self._max_seconds)
