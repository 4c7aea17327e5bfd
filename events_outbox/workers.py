"""Worker processes: the parent that keeps several of them going, and what each of them sees of its parent.

Between the parent and each worker there is a pair of sockets. The worker writes lines, `[kind, text]` in JSON: which
consumers tick, which are done, what it failed with. The parent writes one byte: stop. Either notices the other's
death by the end of what it reads. A signal would not do for stopping: service managers send one to all processes,
and a second one means "at once".
"""

import json
import logging
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Self

from monitoring import metrics, shared_files
from monitoring.worker import Worker

logger = logging.getLogger(__name__)

STOP_SECONDS = 20.0
"""How long a worker may take to stop before it is killed. Less than the 30 s of Kubernetes and docker-compose.yml."""
TICK_SECONDS = 1.0
LOOK_SECONDS = 0.2
FIRST_DELAY_SECONDS = 1.0
LONGEST_DELAY_SECONDS = 30.0
STABLE_AFTER_SECONDS = 60.0
"""A worker that ran so long before it died is started again with the shortest delay."""
_DIRECTORY_PREFIX = "consumer-workers-"


class WorkerFailed(Exception):
    """A worker said that it cannot go on, and that a new one could not either."""


class Workers:
    """Keeps `count` processes going that run this process's command line with `--supervised-by` added.

    `loops`: what goes round in each of them; `worker` hears of them as `<loop> in worker <number>`.
    """

    def __init__(self, count: int, loops: Sequence[str], worker: Worker, *, may_end: bool = False) -> None:
        """`may_end`: a worker that ends without an error is done, and not started again."""
        self._children = [_Child(number, loops, worker) for number in range(1, count + 1)]
        self._worker = worker
        self._may_end = may_end
        self._stopping = False  # a plain flag: it is set in a signal handler

    def stop(self) -> None:
        """Ask all to stop; safe in a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Return when all have ended, after `stop()` at the latest STOP_SECONDS later.

        Raises WorkerFailed, the others stopped as well, when one cannot go on.
        """
        with _shared_metrics() if self._worker.port else nullcontext():
            try:
                for child in self._children:
                    child.start()
                while not self._stopping and not all(child.is_done for child in self._children):
                    self._worker.tick()
                    _listen(self._children, LOOK_SECONDS)
                    for child in self._children:
                        self._look_after(child)
            finally:
                _end(self._children)

    def _look_after(self, child: "_Child") -> None:
        if child.restart_at is not None:
            if time.monotonic() >= child.restart_at:
                child.restart()
        elif not child.is_done and (status := child.poll()) is not None:
            if child.failure:
                raise WorkerFailed(child.failure)
            if status == 0 and self._may_end:
                child.finish()
            else:
                child.start_later(_how_it_ended(status))


class _Child:
    """One worker, through all the processes that it is in turn."""

    def __init__(self, number: int, loops: Sequence[str], worker: Worker) -> None:
        self.number = number
        self.process: subprocess.Popen[bytes] | None = None
        self.socket: socket.socket | None = None
        self.restart_at: float | None = None
        self.is_done = False
        self.failure = ""
        self._worker = worker
        self._names = {loop: f"{loop} in worker {number}" for loop in loops}
        self._unread = b""
        self._started_at = 0.0
        self._delay_seconds = FIRST_DELAY_SECONDS
        metrics.CONSUMER_WORKER_RESTARTS.labels(str(number))

    def start(self) -> None:
        self._started_at, self.restart_at, self._unread = time.monotonic(), None, b""
        for name in self._names.values():
            self._worker.tick(name)
        self.socket, theirs = socket.socketpair()
        self.socket.setblocking(False)
        with theirs:
            self.process = subprocess.Popen(  # noqa: S603 (the command line that this process was started with)
                _command(theirs.fileno()),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,  # Ctrl-C in a terminal is the parent's to hear
            )

    def restart(self) -> None:
        metrics.CONSUMER_WORKER_RESTARTS.labels(str(self.number)).inc()
        try:
            self.start()
        except OSError as error:  # no memory, no process, no descriptor to be had now
            self.start_later(f"not started: {error}")

    def start_later(self, how_it_ended: str) -> None:
        now = time.monotonic()
        if now - self._started_at > STABLE_AFTER_SECONDS:
            self._delay_seconds = FIRST_DELAY_SECONDS
        logger.error(
            "worker died, starting it again",
            extra={"worker": self.number, "ended": how_it_ended, "delay_seconds": self._delay_seconds},
        )
        for name in self._names.values():
            self._worker.miss(name)
        self.restart_at = now + self._delay_seconds
        self._delay_seconds = min(2 * self._delay_seconds, LONGEST_DELAY_SECONDS)

    def finish(self) -> None:
        self.is_done = True
        for name in self._names.values():
            self._worker.done(name)

    def poll(self) -> int | None:
        """Return the exit status once the process has ended, None while it runs."""
        status = self.process.poll() if self.process else None
        if status is not None and self.process:
            self.listen()  # to its last words
            if self.socket:
                self.socket.close()
            if shared_files.are_used():
                shared_files.bury(self.process.pid)
            self.process = self.socket = None
        return status

    def listen(self) -> None:
        """Take in what the process has written."""
        while self.socket is not None:
            try:
                read = self.socket.recv(65_536)
            except BlockingIOError:
                return
            except ConnectionError:
                read = b""
            if not read:  # it has ended, or is about to
                self.socket.close()
                self.socket = None
            *lines, self._unread = (self._unread + read).split(b"\n")
            for line in lines:
                self._hear(*json.loads(line))

    def _hear(self, kind: str, text: str) -> None:
        if kind == "failed":
            self.failure = text
        elif kind == "done":
            self._worker.done(self._names[text])
        else:
            self._worker.tick(self._names[text])

    def ask_to_stop(self) -> None:
        if self.process and self.socket:
            self.process.send_signal(signal.SIGCONT)  # a frozen one would not hear
            with suppress(OSError):
                self.socket.send(b"s")

    def kill(self) -> None:
        logger.error("worker did not stop in time, killing it", extra={"worker": self.number})
        if self.process:
            self.process.kill()
            self.process.wait()
            self.poll()


def _listen(children: Sequence[_Child], timeout_seconds: float) -> None:
    """Take in what the workers write, or wait so long for it."""
    with selectors.DefaultSelector() as selector:
        for child in children:
            if child.socket is not None:
                selector.register(child.socket, selectors.EVENT_READ, child)
        for key, _ in selector.select(timeout_seconds):
            key.data.listen()


def _end(children: Sequence[_Child]) -> None:
    """Stop all that run; kill those that have not ended after STOP_SECONDS."""
    for child in children:
        child.ask_to_stop()
    deadline = time.monotonic() + STOP_SECONDS
    while running := [child for child in children if child.process and child.poll() is None]:
        if time.monotonic() >= deadline:
            break
        _listen(children, LOOK_SECONDS)
    for child in running:
        child.kill()


def _command(descriptor: int) -> list[str]:
    """The command line of this process, with the option that makes it a worker behind the command's name."""
    at = len(sys.orig_argv) - len(sys.argv[2:])
    arguments = [*sys.orig_argv[1:at], f"--supervised-by={descriptor}", *sys.orig_argv[at:]]
    return [sys.executable, *arguments]


def _how_it_ended(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


@contextmanager
def _shared_metrics() -> Iterator[None]:
    """Workers count into files of a directory of their own, which this process's /metrics reads."""
    inherited = os.environ.get(shared_files.DIRECTORY)
    with tempfile.TemporaryDirectory(prefix=_DIRECTORY_PREFIX, ignore_cleanup_errors=True) as directory:
        os.environ[shared_files.DIRECTORY] = directory
        try:
            yield
        finally:
            os.environ.pop(shared_files.DIRECTORY)
            if inherited is not None:
                os.environ[shared_files.DIRECTORY] = inherited


class Parent:
    """The process that keeps this worker going."""

    def __init__(self, descriptor: int) -> None:
        """`descriptor`: of the socket that the parent has left open for this process."""
        self._socket = socket.socket(fileno=descriptor)
        self._socket.set_inheritable(False)  # what a handler starts shall not hold it open
        self._told: dict[str, float] = {}
        self._is_gone = False

    def tick(self, loop: str) -> None:
        """Pass a loop's tick on, at most once a second."""
        now = time.monotonic()
        if now - self._told.get(loop, float("-inf")) >= TICK_SECONDS:
            self._told[loop] = now
            self._tell("tick", loop)

    def done(self, loop: str) -> None:
        """Say that a loop has ended as it should."""
        self._tell("done", loop)

    def failed(self, message: str) -> None:
        """Say that this worker ends with an error that a new one would meet again."""
        self._tell("failed", message[:10_000])

    def _tell(self, *message: str) -> None:
        # A parent that is frozen must not freeze us, and one that is gone is noticed below.
        with suppress(OSError):
            self._socket.send(json.dumps(message).encode() + b"\n", socket.MSG_DONTWAIT)

    def obey(self, stop: Callable[[], None]) -> None:
        """From now on, call `stop` when the parent says so or is gone.

        This process ends STOP_SECONDS after the parent is gone, and at once when that happens while it is stopping.
        """
        threading.Thread(target=self._obey, args=(stop,), name="parent", daemon=True).start()

    def _obey(self, stop: Callable[[], None]) -> None:
        was_told = bool(self._read())
        stop()
        if was_told:
            self._read()
        else:
            logger.error("the parent process is gone, stopping")
        self._is_gone = True
        if not was_told:
            time.sleep(STOP_SECONDS)
        self._clean_up()
        os._exit(1)

    def _read(self) -> bytes:
        try:
            return self._socket.recv(1)
        except ConnectionError:
            return b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._clean_up()

    def _clean_up(self) -> None:
        """Remove what a parent that is gone could not: the directory of the shared metrics."""
        directory = Path(os.environ.get(shared_files.DIRECTORY, ""))
        if self._is_gone and directory.name.startswith(_DIRECTORY_PREFIX):
            shutil.rmtree(directory, ignore_errors=True)
