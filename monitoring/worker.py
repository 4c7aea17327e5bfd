"""Worker: what a long-running command (relay, consumer) needs to be observed."""

import errno
import http.server
import json
import logging
import socketserver
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self

from django.core.management.base import CommandError
from django.db import connections

from monitoring.conf import process_role
from monitoring.health import readiness
from monitoring.logging import log_end, log_to
from monitoring.metrics import exposition
from monitoring.tracing import init_tracing, tracing_config

logger = logging.getLogger(__name__)

STALE_AFTER_SECONDS = 30.0


class Worker:
    """Names the process `<service>-<role>`, traces it, serves /metrics, /health, /livez, /readyz on `port` (0: not).

    `with Worker("relay", 9101) as worker:` around the loop, `worker.tick()` in it: /livez turns 503 when there was no
    tick for `stale_after_seconds` (None: STALE_AFTER_SECONDS). Where several loops go round, `loops` names them, each
    ticks by its name, and one that does not is enough. /readyz says the same as the web's: whether the database answers
    and has its migrations. Raises CommandError on entry when the port cannot be had.
    """

    def __init__(
        self, role: str, port: int, *, loops: Sequence[str] = (), stale_after_seconds: float | None = None
    ) -> None:
        self.role = role
        self.port = port
        self.stale_after_seconds = STALE_AFTER_SECONDS if stale_after_seconds is None else stale_after_seconds
        self._loops = loops or [role]
        self._ticks: dict[str, float] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for loop in self._loops:
            self.tick(loop)
        with ExitStack() as stack:
            stack.enter_context(process_role(self.role))
            stack.callback(log_to, log_to("stdout"))
            if self.port:
                stack.callback(_serve(self).stop)
            stack.callback(init_tracing(tracing_config()))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, error: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Said here, in the worker's log and under its name: further up it is a command's traceback.
        if isinstance(value, Exception) and not isinstance(value, CommandError):
            log_end(value)
        self._stack.close()

    def tick(self, loop: str = "") -> None:
        """Say that the loop, the only one unless named, is going round."""
        self._ticks[loop or self.role] = time.monotonic()

    def miss(self, loop: str) -> None:
        """Say that the loop is known to be dead: it is stale at once, until it ticks again."""
        self._ticks[loop] = time.monotonic() - self.stale_after_seconds

    def done(self, loop: str) -> None:
        """Say that the loop has ended as it should: no more ticks are waited for."""
        self._ticks.pop(loop, None)

    def stale(self) -> dict[str, float]:
        """Return the loops that have not ticked for too long, with the seconds since they did."""
        now = time.monotonic()
        ages = {loop: now - ticked for loop, ticked in self._ticks.copy().items()}
        return {loop: seconds for loop, seconds in ages.items() if seconds >= self.stale_after_seconds}


def _serve(worker: Worker) -> "_Server":
    try:
        return _Server(worker)
    except OSError as error:
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be had ({error.strerror})"
        message = f"port {worker.port} for metrics {reason}: give another --metrics-port, or 0"
        raise CommandError(message) from error


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        super().__init__(("0.0.0.0", worker.port), _Handler)  # noqa: S104 Prometheus and probes come from outside
        self._thread = threading.Thread(target=self.serve_forever, args=(0.1,), name="metrics", daemon=True)
        self._thread.start()

    def server_bind(self) -> None:
        # Not HTTPServer's, which looks the host's name up and can hang on that for seconds.
        socketserver.TCPServer.server_bind(self)

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):  # those are the client's own
            logger.exception("a metrics or health request failed")


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    timeout = 5.0  # seconds a client may take to send its request

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            try:
                body, content_type = exposition(self.headers.get("Accept", ""))
            finally:
                connections.close_all()  # of this thread, which ends with the request
            self._answer(HTTPStatus.OK, body, content_type)
        elif path == "/health":
            self._answer_json(HTTPStatus.OK, {"status": "healthy"})
        elif path == "/livez":
            if stale := self.server.worker.stale():
                seconds = round(max(stale.values()), 1)
                answer = {"status": "stale", "seconds_since_tick": seconds, "loops": sorted(stale)}
                self._answer_json(HTTPStatus.SERVICE_UNAVAILABLE, answer)
            else:
                self._answer_json(HTTPStatus.OK, {"status": "alive"})
        elif path == "/readyz":
            if reasons := readiness.reasons_against():
                self._answer_json(HTTPStatus.SERVICE_UNAVAILABLE, {"status": "unready", "reasons": reasons})
            else:
                self._answer_json(HTTPStatus.OK, {"status": "ready"})
        else:
            self._answer_json(HTTPStatus.NOT_FOUND, {"status": "not found"})

    do_HEAD = do_GET

    def _answer_json(self, status: HTTPStatus, answer: dict[str, Any]) -> None:
        self._answer(status, json.dumps(answer).encode(), "application/json")

    def _answer(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)
