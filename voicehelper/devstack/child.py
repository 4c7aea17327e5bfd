"""A process of ours: started, watched, stopped, and never left behind."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from voicehelper.services import BASE_DIR


class Child:
    """A child process in a process group of its own, so that Ctrl-C reaches it only through `stop()`.

    On Linux the kernel sends it `stop_signal` when the *thread* that started it ends, however that happened:
    call `start()` from the main thread.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        output: int,
        env: Mapping[str, str] | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        stop_seconds: float = 10,
    ) -> None:
        """`output`: descriptor for its output. `stop_seconds`: how long `stop()` waits before it kills."""
        self.name = name
        self.command = [*_bound_to_this_process(stop_signal), *map(str, command)]
        self.output = output
        self.env = {**os.environ, **(env or {})}
        self.stop_signal = stop_signal
        self.stop_seconds = stop_seconds
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; a no-op while it runs."""
        if not self.is_running():
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                stderr=self.output,
                env=self.env,
                cwd=BASE_DIR,
                process_group=0,
            )

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def send_signal(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(number)

    def pause(self) -> None:
        """Freeze it, connections and all, as an overloaded machine does; `resume()` ends that."""
        self.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.send_signal(signal.SIGCONT)

    def ask_to_stop(self) -> None:
        """Send the stop signal and return at once."""
        if self.is_running():
            self.resume()  # a frozen process would not see the signal
            self.send_signal(self.stop_signal)

    def stop(self) -> bool:
        """Stop it and whatever it started. Returns False when it had to be killed."""
        if self.process is None:
            return True
        self.ask_to_stop()
        try:
            self.process.wait(self.stop_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return False
        self.kill()
        return True

    def kill(self) -> None:
        """End it, and whatever is left of what it started, at once (SIGKILL)."""
        self.kill_without_waiting()
        if self.process is not None:
            self.process.wait()

    def kill_without_waiting(self) -> None:
        """The same for a signal handler: `wait()` would hang if the signal came amidst another one."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)


def _bound_to_this_process(stop_signal: signal.Signals) -> list[str]:
    setpriv = shutil.which("setpriv")  # util-linux; without it (macOS) children outlive a `kill -9` of this process
    return [setpriv, "--pdeathsig", stop_signal.name.removeprefix("SIG")] if setpriv else []
