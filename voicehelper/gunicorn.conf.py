"""The web server, `gunicorn -c voicehelper/gunicorn.conf.py`; values come from the environment."""

import os
import socket
from pathlib import Path
from typing import Any

from gunicorn.glogging import Logger

from voicehelper.services import DATA_DIR

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "voicehelper.settings")

_host = os.environ.get("WEB_HOST", "127.0.0.1")
_port = os.environ.get("WEB_PORT", "8000")
# Set before anything imports prometheus_client, which reads it then: the workers count in files they share.
_metrics_dir = Path(os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", str(DATA_DIR / "metrics" / _port)))

wsgi_app = "voicehelper.wsgi:application"
bind = f"[{_host}]:{_port}" if ":" in _host else f"{_host}:{_port}"
workers = int(os.environ.get("WEB_CONCURRENCY", "2"))
worker_class = "gthread"
threads = int(os.environ.get("WEB_THREADS", "8"))
graceful_timeout = 20
# A client that takes nothing for so long, and one that is gone without a word, is given up.
_send_timeout_seconds = float(os.environ.get("WEB_SEND_TIMEOUT_SECONDS", "30"))
# Each worker imports the application itself: no thread or connection of it has to survive a fork.
preload_app = False
control_socket_disable = True
# The access log is MonitoringMiddleware's.
accesslog = None


class JsonLogger(Logger):  # type: ignore[misc]
    """gunicorn's own messages in the line format of the rest, from its first one on."""

    def setup(self, cfg: Any) -> None:
        from monitoring.logging import configure_logging, log_to

        super().setup(cfg)
        log_to("stdout")
        configure_logging()


logger_class = JsonLogger


def on_starting(server: Any) -> None:
    """Start counting at zero: the files of an earlier run belong to processes that are gone."""
    if server.master_pid:  # takes over from a running one (SIGUSR2), whose workers still count
        return
    _metrics_dir.mkdir(parents=True, exist_ok=True)
    for file in _metrics_dir.glob("*.db"):
        file.unlink()


def when_ready(server: Any) -> None:
    # gunicorn itself waits for ever, and what is written to a client that does not read keeps a thread. Connections
    # inherit this from the socket that accepts them. Linux alone has it.
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        for listener in server.LISTENERS:
            milliseconds = round(_send_timeout_seconds * 1000)
            listener.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def post_worker_init(worker: Any) -> None:
    # Not post_fork: until the worker has its own signal handlers, which is later, a SIGTERM to it is lost.
    from monitoring.tracing import init_tracing, tracing_config

    worker.stop_tracing = init_tracing(tracing_config())


def worker_exit(server: Any, worker: Any) -> None:
    if hasattr(worker, "stop_tracing"):
        worker.stop_tracing()


def child_exit(server: Any, worker: Any) -> None:
    """Keep what a worker has counted that is gone, also one that was killed."""
    from monitoring import shared_files

    shared_files.bury(worker.pid)
