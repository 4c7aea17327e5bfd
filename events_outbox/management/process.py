"""Running a long-lived command: signals, and several loops in one process."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Protocol

from django.db import connections

from monitoring.conf import thread_role

logger = logging.getLogger(__name__)


class Job(Protocol):
    """What goes on until it is told to stop. `stop()` is safe in a signal handler: it sets a plain flag."""

    def run(self) -> None: ...

    def stop(self) -> None: ...


def run_until_signalled(run: Callable[[], None], stop: Callable[[], None]) -> None:
    """Run until it ends or SIGTERM/SIGINT asks it to: the first signal calls `stop`, a second one exits at once."""

    def on_signal(number: int, _frame: FrameType | None) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, lambda number, _: os._exit(128 + number))
        stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    run()


class Together:
    """Jobs side by side, each in a thread of its own with its own database connection; alone, in the main thread.

    `on_end` hears the name of each that has ended. The first that fails stops the others.
    """

    def __init__(self, jobs: Mapping[str, Job], on_end: Callable[[str], None]) -> None:
        self._jobs = jobs
        self._on_end = on_end
        self._errors: list[BaseException] = []

    def run(self) -> None:
        """Return when all have ended. Raises what the first that failed has raised."""
        if len(self._jobs) == 1:
            for job in self._jobs.values():
                return job.run()
        threads = [threading.Thread(target=self._run, args=(name,), name=name) for name in self._jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def stop(self) -> None:
        for job in self._jobs.values():
            job.stop()

    def _run(self, name: str) -> None:
        try:
            with thread_role(name):  # in what it logs
                self._jobs[name].run()
        except BaseException as error:  # also SystemExit, of which a thread would make nothing
            logger.error("%s failed", name, extra={"error": f"{type(error).__name__}: {error}"})
            self._errors.append(error)
            self.stop()
        finally:
            connections.close_all()  # of this thread
            self._on_end(name)
