"""Many processes' lines on one output: each line whole, and behind the name of its process."""

import os
import select
import threading
from typing import TextIO

_COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95)  # ANSI foreground colours that read well on dark and on light


class LogStream:
    """`open(name)` gives a descriptor to hand to a process; what it writes there appears as `name | line`."""

    def __init__(self, output: TextIO, *, name_width: int) -> None:
        self._output = output
        self._in_colour = output.isatty() and "NO_COLOR" not in os.environ
        self._name_width = name_width
        self._lock = threading.Lock()
        self._pipes: list[tuple[int, threading.Thread]] = []

    def open(self, name: str) -> int:
        """A descriptor that stays valid, also for a process started anew, until `close()`."""
        read_end, write_end = os.pipe()
        colour = _COLOURS[len(self._pipes) % len(_COLOURS)]
        thread = threading.Thread(target=self._copy, args=(name, colour, read_end), name=f"log-{name}", daemon=True)
        thread.start()
        self._pipes.append((write_end, thread))
        return write_end

    def write(self, text: str) -> None:
        """A text of our own, as it is."""
        self._write(text.encode(errors="replace") + b"\n")

    def has_reader(self) -> bool:
        """False once the terminal is closed, or the program at the other end of a pipe has ended."""
        poller = select.poll()
        poller.register(self._output, 0)  # errors and hang-ups are reported without being asked for
        return not poller.poll(0)

    def close(self) -> None:
        """Show what the processes, all ended by now, wrote last."""
        for write_end, thread in self._pipes:
            os.close(write_end)
            thread.join(timeout=2)
        self._pipes.clear()

    def _copy(self, name: str, colour: int, read_end: int) -> None:
        prefix = f"{name:<{self._name_width}} | "
        if self._in_colour:
            prefix = f"\x1b[{colour}m{prefix}\x1b[0m"
        with open(read_end, "rb") as lines:
            for line in lines:
                self._write(prefix.encode() + line.rstrip(b"\r\n") + b"\n")

    def _write(self, line: bytes) -> None:
        with self._lock:
            try:
                self._output.buffer.write(line)
                self._output.buffer.flush()
            except OSError:
                pass  # the terminal or the pipe is gone: that must not keep us from stopping in order
