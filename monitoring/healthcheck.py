"""Asks a process's health page and exits 0 or 1: `python -m monitoring.healthcheck`, for containers.

Needs no settings, no database and none of Django, so it takes a small part of the time that `manage.py healthcheck`
takes to do the same.
"""

import argparse
import http.client
import json
import os
import sys
import threading
from typing import Any
from urllib.parse import urlsplit

DEFAULT_PORT = 8000
TIMEOUT_SECONDS = 4.0
_LONGEST_ANSWER = 10_000


class Unhealthy(Exception):
    """The process is not well, or cannot be asked; the text says why in one line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="the whole address, instead of --port and --path")
    parser.add_argument("--port", type=int, help="of this machine (default: WEB_PORT, else 8000; relay: 9101)")
    parser.add_argument("--path", default="/readyz", help="/readyz (default), /livez or /health")
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT_SECONDS,
        metavar="SECONDS",
        help="for the whole answer (default: 4; /readyz itself takes up to 2)",
    )


def address(options: dict[str, Any]) -> str:
    """Return the URL that the options and the environment (WEB_HOST, WEB_PORT) name."""
    if options["url"]:
        return str(options["url"])
    port = options["port"]
    host = "127.0.0.1"
    if port is None:
        port = os.environ.get("WEB_PORT") or DEFAULT_PORT
        bound = os.environ.get("WEB_HOST", "")
        if bound not in ("", "0.0.0.0", "::"):  # noqa: S104 those are also reached by loopback
            host = f"[{bound}]" if ":" in bound else bound
    return f"http://{host}:{port}/{options['path'].removeprefix('/')}"


def check(url: str, timeout_seconds: float = TIMEOUT_SECONDS) -> str:
    """Return what a healthy process says of itself (`ready`). Raises Unhealthy, within the time, for anything else.

    No proxy is used, whatever the environment says, and no redirect is followed.
    """
    outcome: list[str | Exception] = []

    def ask() -> None:
        try:
            outcome.append(_ask(url, timeout_seconds))
        except Exception as error:
            outcome.append(error)

    # In a thread, because a socket's time limit begins anew with each byte, and looking up a name has none.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    if not outcome or isinstance(outcome[0], TimeoutError):
        raise Unhealthy(f"{url} did not answer within {timeout_seconds:g} s")
    answer = outcome[0]
    if isinstance(answer, str):
        return answer
    if isinstance(answer, Unhealthy):
        raise answer
    raise Unhealthy(f"{url} cannot be asked: {answer or type(answer).__name__}")


def _ask(url: str, timeout_seconds: float) -> str:
    parts = urlsplit(url)
    kind = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}.get(parts.scheme)
    if kind is None or not parts.hostname:
        raise Unhealthy(f"{url} is not an http URL")
    connection = kind(parts.hostname, parts.port, timeout=timeout_seconds)
    try:
        connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
        with connection.getresponse() as response:
            text = response.read(_LONGEST_ANSWER).decode(errors="replace")
    finally:
        connection.close()
    said = _said(text)
    if response.status != http.client.OK:
        raise Unhealthy(f"{url} answered {response.status}" + (f": {said}" if said else ""))
    return said or "healthy"


def _said(text: str) -> str:
    """The answer in a line: `unready: the database did not answer within 2.0 s`; empty for a page of another kind."""
    try:
        answer = json.loads(text)
        status = str(answer.pop("status"))
    except (ValueError, AttributeError, KeyError, TypeError):
        return ""
    details = answer.pop("reasons", None) or [f"{name} {value}" for name, value in answer.items()]
    shown = f"{status}: {', '.join(map(str, details))}" if details else status
    return " ".join(shown.split())[:1000]


def main() -> None:
    parser = argparse.ArgumentParser(prog="healthcheck", description=__doc__)
    add_arguments(parser)
    options = vars(parser.parse_args())
    try:
        said = check(address(options), options["timeout"])
    except Unhealthy as error:
        sys.exit(str(error))
    sys.stdout.write(f"{said}\n")


if __name__ == "__main__":
    main()
