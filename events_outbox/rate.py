"""How fast events go."""

import time
from collections import deque

RATE_SECONDS = 10.0


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
