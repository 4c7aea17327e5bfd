"""The health check of containers, as a module and as a command, against real servers."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager

import pytest
from django.core.management import CommandError, call_command

from monitoring import healthcheck
from monitoring.healthcheck import Unhealthy, check
from monitoring.worker import Worker

from .conftest import ROOT, free_port, project_environment


@contextmanager
def serving(answer):
    """A server that lets `answer(handler)` answer; yields its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer(self)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/readyz"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def answering(status, body, **headers):
    def answer(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    return serving(answer)


def test_healthy_worker():
    port = free_port()
    with Worker("relay", port):
        assert check(f"http://127.0.0.1:{port}/livez") == "alive"
        assert check(f"http://127.0.0.1:{port}/health") == "healthy"


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (
            503,
            {"status": "unready", "reasons": ["no database", "2\nmigrations"]},
            "503: unready: no database, 2 migrations",
        ),
        (503, {"status": "stale", "loops": ["audit"]}, r"503: stale: loops \['audit'\]"),
        (500, b"<html>", "500$"),
        (301, b"", "301$"),
        (404, {"other": 1}, "404$"),
        (500, [1], "500$"),
    ],
)
def test_unhealthy(status, body, says):
    with (
        answering(status, body, Location="http://127.0.0.1:1/") as url,
        pytest.raises(Unhealthy, match=f"answered {says}"),
    ):
        check(url)


def test_any_page_with_200_is_healthy():
    with answering(200, b"<html>") as url:
        assert check(url) == "healthy"


def test_nothing_listens():
    with pytest.raises(Unhealthy, match=r"cannot be asked.*refused"):
        check(f"http://127.0.0.1:{free_port()}/readyz")


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/", "127.0.0.1:8000", "http://127.0.0.1:port/", "http://"])
def test_bad_url(url):
    with pytest.raises(Unhealthy):
        check(url)


def test_no_http():
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def answer():
            client, _ = server.accept()
            client.sendall(b"what?\n")
            client.close()

        threading.Thread(target=answer).start()
        with pytest.raises(Unhealthy, match="cannot be asked"):
            check(f"http://127.0.0.1:{server.getsockname()[1]}/")


def drip(handler):
    """A byte now and then, each of which starts a socket's time limit anew."""
    try:
        for _ in range(1000):
            handler.wfile.write(b"H")
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        pass


def test_server_that_hangs_or_drips():
    with closing(socket.create_server(("127.0.0.1", 0))) as silent, serving(drip) as dripping:
        for url in (f"http://127.0.0.1:{silent.getsockname()[1]}/", dripping):
            started = time.monotonic()
            with pytest.raises(Unhealthy, match=r"did not answer within 0\.3 s"):
                check(url, 0.3)
            assert time.monotonic() - started < 5


def test_no_proxy_is_asked(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with answering(200, {"status": "ready"}) as url:
        assert check(url) == "ready"


@pytest.mark.parametrize(
    ("given", "environment", "url"),
    [
        ({}, {}, "http://127.0.0.1:8000/readyz"),
        ({}, {"WEB_PORT": "8123", "WEB_HOST": "::"}, "http://127.0.0.1:8123/readyz"),
        ({}, {"WEB_HOST": "::1"}, "http://[::1]:8000/readyz"),
        ({"path": "health"}, {"WEB_HOST": "10.0.0.1"}, "http://10.0.0.1:8000/health"),
        ({"port": 9101, "path": "/livez"}, {"WEB_HOST": "10.0.0.1"}, "http://127.0.0.1:9101/livez"),
        ({"url": "http://web/x"}, {"WEB_PORT": "1"}, "http://web/x"),
    ],
)
def test_address(monkeypatch, given, environment, url):
    for name in ("WEB_PORT", "WEB_HOST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert healthcheck.address({"url": None, "port": None, "path": "/readyz"} | given) == url


def test_command(capsys):
    # No django_db mark: a query would fail this test.
    with answering(200, {"status": "ready"}) as url:
        call_command("healthcheck", url=url)
    assert capsys.readouterr().out == "ready\n"
    with pytest.raises(CommandError, match="refused"):
        call_command("healthcheck", "--port", str(free_port()), "--path", "/livez", "--timeout", "2")


MODULE = ("-m", "monitoring.healthcheck")
COMMAND = ("-m", "django", "healthcheck")


@pytest.mark.parametrize("command", [MODULE, COMMAND], ids=["module", "command"])
def test_exit_status_and_one_line(command):
    def run(port):
        done = subprocess.run(
            [sys.executable, *command, "--port", str(port)],
            env=project_environment(PROJECT_DATABASE_URL="postgresql://127.0.0.1:1/none"),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    with answering(200, {"status": "ready"}) as url:
        assert run(url.split(":")[2].split("/")[0]) == (0, "ready\n", "")
    with answering(503, {"status": "unready", "reasons": ["why"]}) as url:
        status, out, err = run(url.split(":")[2].split("/")[0])
    assert (status, out) == (1, "")
    assert err.endswith("/readyz answered 503: unready: why\n")
    assert err.count("\n") == 1


def test_module_starts_without_django():
    code = (
        "import sys, monitoring.healthcheck; print([name for name in sys.modules if name[:6] in ('django', 'opente')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ, check=True
    )
    assert done.stdout == "[]\n"
