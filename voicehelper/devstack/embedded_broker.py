"""The embedded broker as a process of the devstack: on a port that stays the same, beside the others."""

import socket
import sys
import time
from collections.abc import Sequence

from events_outbox.embedded_broker import HOST
from voicehelper.devstack import DevstackError
from voicehelper.devstack.child import Child


class EmbeddedBroker(Child):
    """The process. `start()` returns at once, `wait_until_ready()` when clients can connect."""

    kind = "embedded"

    def __init__(self, port: int, topics: Sequence[str], *, output: int) -> None:
        self.port = port
        self.bootstrap_servers = f"{HOST}:{port}"
        super().__init__(
            "kafka",
            [sys.executable, "-m", "events_outbox.embedded_broker", f"--port={port}", *topics],
            output=output,
            stop_seconds=5,
        )

    def wait_until_ready(self, timeout_seconds: float = 30) -> None:
        """Return when it accepts connections. Raises DevstackError when it does not in time."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            try:
                socket.create_connection((HOST, self.port), timeout=1).close()
                return
            except OSError as error:
                if not self.is_running() or time.monotonic() > deadline:
                    raise DevstackError(f"the embedded broker on port {self.port} does not start: {error}") from error
                time.sleep(0.02)
