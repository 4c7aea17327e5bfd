"""Bodies and queries are UTF-8, whatever charset a request names."""

import asyncio
import io
import json
import time

import pytest
from django.core.handlers.asgi import ASGIHandler

from voicehelper.parsers import Utf8ASGIRequest
from voicehelper.wsgi import application as wsgi

LOGIN = "/api/v1/auth/token"
pytestmark = pytest.mark.django_db


def ask_wsgi(path: str, query: bytes, content_type: str, body: bytes) -> tuple[int, dict]:
    environ = {
        "REQUEST_METHOD": "POST",
        "PATH_INFO": path,
        "QUERY_STRING": query.decode("latin-1"),
        "CONTENT_TYPE": content_type,
        "CONTENT_LENGTH": str(len(body)),
        "HTTP_HOST": "localhost",
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(body),
    }
    statuses = []
    answer = wsgi(environ, lambda status, headers: statuses.append(int(status.split()[0])))
    return statuses[0], json.loads(b"".join(answer))


def ask_asgi(path: str, query: bytes, content_type: str, body: bytes) -> tuple[int, dict]:
    headers = {"host": "localhost", "content-type": content_type, "content-length": str(len(body))}
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": query,
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    sent, waiting = [], [{"type": "http.request", "body": body}]

    async def receive():
        return waiting.pop() if waiting else await asyncio.Future()

    async def send(message):
        sent.append(message)

    asgi = ASGIHandler()  # that of voicehelper.asgi, which also begins to trace
    asgi.request_class = Utf8ASGIRequest
    asyncio.run(asgi(scope, receive, send))
    return sent[0]["status"], json.loads(b"".join(message["body"] for message in sent[1:]))


@pytest.mark.parametrize("ask", [ask_wsgi, ask_asgi])
@pytest.mark.parametrize("charset", ["zlib", "base64", "rot13", "undefined", "punycode", "utf-16", "nonsense"])
def test_no_charset_changes_what_is_read(ask, charset):
    content_type = f"application/json; charset={charset}"
    status, answer = ask(LOGIN, b"a=%e9%78", content_type, b'{"username": "\xc3\xa9"}')
    assert (status, list(answer["errors"])) == (400, ["password"])


@pytest.mark.parametrize("ask", [ask_wsgi, ask_asgi])
@pytest.mark.parametrize("encoded", ["charset*=nope''x", "charset*=utf-8''%00", "x*0*=%00''y"])
def test_a_content_type_that_cannot_be_read_is_none(ask, encoded):
    status, answer = ask(LOGIN, b"", f"application/json; {encoded}", b"{}")
    assert (status, answer["status"]) == (415, 415)


@pytest.mark.parametrize("ask", [ask_wsgi, ask_asgi])
def test_no_charset_makes_a_body_take_minutes(ask):
    started = time.monotonic()
    status, _ = ask(LOGIN, b"", "application/json; charset=punycode", b"-" + b"a" * 2_000_000)  # quadratic for that
    assert status == 400
    assert time.monotonic() - started < 5


def test_json_is_nested_only_so_deep():
    status, answer = ask_wsgi(LOGIN, b"", "application/json", b"[" * 100_000)
    assert status == 400 and "nested too deeply" in answer["detail"]
