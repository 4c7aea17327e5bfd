"""Milvus Lite as a process of the devstack: its files can be open in one process, and several of ours need them.

The others talk to it over gRPC, as to a Milvus server: see `voicehelper/knowledge/vectors.py`.
"""

import signal
import socket
import sys
import time
from pathlib import Path

from voicehelper.devstack import DevstackError
from voicehelper.devstack.child import Child

HOST = "127.0.0.1"


class MilvusLite(Child):
    """The process. `start()` returns at once, `wait_until_ready()` when clients can connect."""

    def __init__(self, data_dir: Path, port: int, *, output: int) -> None:
        self.port = port
        self.uri = f"http://{HOST}:{port}"
        # One worker: it promises nothing to writes at the same time.
        options = [f"--data-dir={data_dir}", f"--host={HOST}", f"--port={port}", "--max-workers=1"]
        super().__init__(
            "milvus",
            [sys.executable, "-m", "milvus_lite", "server", *options],
            output=output,
            env={"PYTHONUNBUFFERED": "1"},
            stop_signal=signal.SIGINT,  # it closes its files only at that
            stop_seconds=10,
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
                    raise DevstackError(f"Milvus Lite on port {self.port} does not start: {error}") from error
                time.sleep(0.02)
