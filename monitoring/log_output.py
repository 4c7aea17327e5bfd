"""Output: whole lines, in whatever order threads and processes write them, to one file, pipe or terminal."""

import contextlib
import os
import select
import stat
import threading
import time
from collections import deque

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PATIENCE_SECONDS = 5.0
_LONGEST_PAUSE_SECONDS = 0.001


class Output:
    """Writes lines to a descriptor so that none is lost and none is torn by another one.

    - Threads: one writes at a time, and writes what the others have brought meanwhile.
    - Processes with the same pipe (gunicorn's workers): a pipe takes only PIPE_BUF (4096) bytes in one piece when it
      is nearly full, so each line is written under a lock on the pipe itself. The kernel takes that from a process
      that dies. One that stands still with it (SIGSTOP) is waited for `PATIENCE_SECONDS` while there is room in the
      pipe, and then no longer.
    - A reader that is slow, or stands still, is waited for. One that is gone, a full disk: lines are counted in
      `lost`, and the caller hears nothing of it.
    - A signal handler that logs in the middle of a line has its own line written behind that one.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.lost = 0
        self._lines: deque[bytes] = deque()
        self._lock = threading.RLock()
        self._is_writing = False
        self._is_torn = False
        self._patience_seconds = PATIENCE_SECONDS
        self._is_shared = False
        if fcntl is not None:
            try:
                mode = os.fstat(descriptor).st_mode
            except OSError:
                return
            # One write() to a file is one piece, and a terminal needs no more than that.
            self._is_shared = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)

    def forked(self) -> None:
        """Be ready for use in a child process, whatever the parent's threads were at when it was forked."""
        self._lines.clear()  # the parent's threads write them
        self._lock = threading.RLock()
        self._is_writing = self._is_torn = False

    def write(self, line: bytes) -> None:
        """Write a line, with its line feed. Returns when it is written or lost; raises nothing of its own."""
        self._lines.append(line)
        # Looked at again after the lock is given back: a signal handler may have brought one at the last moment.
        while self._lines:
            with self._lock:
                if self._is_writing:  # we are a signal handler on top of the one who writes, who goes on with ours
                    return
                self._is_writing = True
                try:
                    while self._lines:
                        self._write(self._lines.popleft())
                except IndexError:  # a signal handler took the last one
                    pass
                finally:
                    self._is_writing = False

    def _write(self, line: bytes) -> None:
        if self._is_torn:
            line = b"\n" + line  # what is left of the line before shall not spoil this one
        locked = self._is_shared and self._lock_pipe()
        counts: list[int] = []
        try:
            while True:
                # What was written is noted without a step of the interpreter in between: there a signal handler may
                # raise, and how much of the line is out would not be known.
                try:
                    counts.extend(map(os.write, (self.descriptor,), (line[sum(counts) :],)))
                except BlockingIOError:
                    self._wait_for_room(None)
                if sum(counts) == len(line):
                    break
            self._is_torn = False
        except OSError:
            self._is_torn = self._is_torn or bool(counts)
            self.lost += 1
        except BaseException:  # from a signal handler: the rest goes first the next time
            self._is_torn = False
            if rest := line[sum(counts) :]:
                self._lines.appendleft(rest)
            raise
        finally:
            if locked:
                self._unlock_pipe()

    def _wait_for_room(self, seconds: float | None) -> bool:
        poll = select.poll()
        poll.register(self.descriptor, select.POLLOUT)
        return bool(poll.poll(None if seconds is None else seconds * 1000))

    def _lock_pipe(self) -> bool:
        """Keep other processes off the pipe. False: it cannot be locked, or who has it stands still."""
        if self._try_lock():
            self._patience_seconds = PATIENCE_SECONDS
            return True
        pause = 0.00005  # seconds
        deadline = time.monotonic() + self._patience_seconds
        while self._is_shared and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            if self._try_lock():
                self._patience_seconds = PATIENCE_SECONDS
                return True
            if not self._wait_for_room(0):  # who has it waits for the reader, as we would
                deadline = time.monotonic() + self._patience_seconds
        self._patience_seconds = 0  # not so long for each line, until it is free again
        return False

    def _try_lock(self) -> bool:
        # A POSIX lock: it belongs to the process, also where the descriptor was inherited.
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # not of a kind that this system can lock
            self._is_shared = False
            return False
        return True

    def _unlock_pipe(self) -> None:
        with contextlib.suppress(OSError):  # closed meanwhile
            fcntl.lockf(self.descriptor, fcntl.LOCK_UN)


_outputs: dict[int, tuple[tuple[int, int], Output]] = {}
_outputs_lock = threading.RLock()


def output_to(descriptor: int) -> Output:
    """Return the one Output of this process to what the descriptor is now. Raises OSError when it is closed."""
    status = os.fstat(descriptor)
    file = status.st_dev, status.st_ino
    with _outputs_lock:  # two would not know of each other's lines
        known = _outputs.get(descriptor)
        if known is None or known[0] != file:
            known = _outputs[descriptor] = file, Output(descriptor)
        return known[1]


def _forked() -> None:
    global _outputs_lock
    _outputs_lock = threading.RLock()
    for _, output in _outputs.values():
        output.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
