"""Running a long-lived command: signals, health and metrics port."""

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from monitoring.worker import Worker


def run_until_signalled(
    role: str, metrics_port: int, make: Callable[[Callable[[], None]], Any], **options: Any
) -> None:
    """Make a job with the worker's tick, and run it until it ends or SIGTERM/SIGINT asks it to stop.

    The first signal calls the job's `stop()`, a second one ends the process at once. `metrics_port`: where
    /metrics and /livez are served; 0 for none.
    """
    with Worker(role, metrics_port) as worker:
        job = make(worker.tick)

        def on_signal(number: int, _frame: FrameType | None) -> None:
            signal.signal(number, lambda *_: os._exit(128 + number))
            job.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)
        job.run(**options)
