"""A `make up` of a test's own: all of the product as processes, with own data and own ports."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil

from voicehelper.devstack import supervisor
from voicehelper.services import BASE_DIR

UP = [sys.executable, "-m", "voicehelper.devstack", "up"]


def wait_for(condition: Callable[[], object], what: str, timeout_seconds: float = 30) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_seconds} s: {what}"
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def up_ports() -> dict[str, str]:
    """Free ports for a `make up`, as environment variables."""
    while True:
        first = random.SystemRandom().randrange(20_000, 32_000)
        if all(supervisor._is_free(port) for port in range(first, first + 12)):
            return {
                "WEB_PORT": str(first),
                "KAFKA_PORT": str(first + 1),
                "METRICS_PORT": str(first + 3),
                "PROMETHEUS_PORT": str(first + 11),
            }


class Stack:
    """A `make up` of its own: own data, own ports."""

    def __init__(self, directory: Path) -> None:
        self.data_dir = directory / "data"
        self.log = directory / "up.log"
        self.env = {**os.environ, **up_ports(), "VOICEHELPER_DATA_DIR": str(self.data_dir)}
        for name in ("DATABASE_URL", "KAFKA_BOOTSTRAP_SERVERS", "DJANGO_SETTINGS_MODULE", "MAKELEVEL"):
            self.env.pop(name, None)
        self.process: subprocess.Popen[bytes] | None = None
        self.pids: list[int] = []

    def start(self, *options: str) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*UP, *options], cwd=BASE_DIR, env=self.env, stdout=log, stderr=log)
        wait_for(
            lambda: "VoiceHelper runs" in self.log.read_text() or self.process.poll() is not None,
            "the banner",
            120,
        )
        assert self.process.poll() is None, self.log.read_text()
        self.pids = [process.pid for process in psutil.Process(self.process.pid).children(recursive=True)]

    def child(self, *words: str) -> psutil.Process | None:
        for process in psutil.Process(self.process.pid).children():
            try:
                if set(words) <= set(process.cmdline()):
                    return process
            except psutil.Error:
                continue
        return None

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)

    def assert_nothing_is_left(self) -> None:
        wait_for(lambda: all(is_gone(pid) for pid in self.pids), f"the end of {self.pids}")

    def token(self) -> str:
        return json.loads((self.data_dir / "demo.json").read_text())["users"][0]["token"]

    def request(self, path: str, body: dict[str, str] | None = None) -> tuple[int, str]:
        response = httpx.request(
            "POST" if body else "GET",
            f"http://127.0.0.1:{self.env['WEB_PORT']}{path}",
            json=body,
            headers={"Authorization": f"Token {self.token()}"},
            timeout=10,
        )
        return response.status_code, response.text

    def counted_conversations(self) -> int:
        return json.loads(self.request("/api/v1/analytics/summary")[1])["totals"]["conversations"]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=BASE_DIR, env=self.env, capture_output=True, text=True, timeout=60)
