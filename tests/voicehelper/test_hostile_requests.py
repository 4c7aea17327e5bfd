"""What no client should send: always a problem that says what is wrong, never a 5xx. Every endpoint is tried."""

import json
from base64 import b64encode
from io import BytesIO
from types import SimpleNamespace
from uuid import uuid4
from wsgiref.util import setup_testing_defaults

import pytest
from django.core.cache import caches
from rest_framework.test import APIClient

from tests.voicehelper.conftest import PASSWORD, assert_problem
from tests.voicehelper.endpoints import METHODS, PK, Endpoint, endpoints
from tests.voicehelper.knowledge.conftest import change, milvus, milvus_server  # noqa: F401
from voicehelper import wsgi
from voicehelper.assistant.conf import AssistantSettings
from voicehelper.conversations.services import create_conversation, send_message
from voicehelper.identity.services import create_token
from voicehelper.identity.views import TokenView
from voicehelper.knowledge.services import upload_document
from voicehelper.notifications.services import create_webhook, notify
from voicehelper.notifications.webhooks import secret_of

MISSING = "01936d2e-0000-7000-8000-000000000000"
JSON = "application/json"
ENDPOINTS = endpoints()
# Where a body is read: what it may hold. Documents take a form instead.
BODIES = {
    ("POST", "auth/token"): {"username": "alice", "password": PASSWORD},
    ("POST", "users"): {"username": "eve", "password": PASSWORD, "email": "eve@example.com", "role": "member"},
    ("PATCH", "users/<uuid:pk>"): {"role": "member", "is_active": True},
    ("POST", "tokens"): {"name": "t", "scopes": ["read"], "expires_at": None},
    ("POST", "tokens/<uuid:pk>/rotate"): {"grace_seconds": 1},
    ("POST", "conversations"): {"title": "Talk", "mode": "voice"},
    ("POST", "messages"): {"conversation_id": MISSING, "content": "x", "role": "user", "duration_ms": 1},
    ("POST", "webhooks"): {"url": "http://127.0.0.1:9/", "description": "x", "kinds": ["document.failed"]},
    ("PATCH", "webhooks/<uuid:pk>"): {"active": True, "description": "x", "kinds": []},
    ("PUT", "notification-preferences"): {
        "preferences": [{"kind": "document.failed", "channel": "email", "enabled": True}]
    },
}
NO_BODIES = {
    "conversations/<uuid:pk>/complete",
    "conversations/<uuid:pk>/fail",
    "conversations/<uuid:pk>/replies",
    "notifications/<uuid:pk>/read",
    "webhooks/<uuid:pk>/test",
    "webhooks/<uuid:pk>/rotate-secret",
}
DEEP = 200_000
# Raw bodies: content type, bytes, the status where a body is read.
RAW = {
    "no JSON": (JSON, b"{", 400),
    "nothing": (JSON, b"", 400),
    "not UTF-8": (JSON, b'{"title": "caf\xe9", "content": "\xff\xfe"}', 400),
    "UTF-16": (JSON, '{"title": "x"}'.encode("utf-16"), 400),
    "an unknown charset": ('application/json; charset="nonsense"', b"{}", 400),
    "deep lists": (JSON, b"[" * DEEP + b"]" * DEEP, 400),
    "deep objects": (JSON, b'{"title":' * DEEP + b"1" + b"}" * DEEP, 400),
    "deep within": (JSON, b'{"title":' + b"[" * 900 + b"]" * 900 + b"}", 400),
    "a list": (JSON, b"[]", 400),
    "a number": (JSON, b"1", 400),
    "null": (JSON, b"null", 400),
    "NaN": (JSON, b'{"title": NaN}', 400),
    "a large number": (JSON, b'{"duration_ms": 1' + b"0" * 5_000 + b"}", 400),
    "a NUL in a name": (JSON, b'{"\\u0000": 1}', 400),
    "a surrogate in a name": (JSON, b'{"\\ud800": 1}', 400),
    "text": ("text/plain", b"{}", 415),
    "a form": ("application/x-www-form-urlencoded", b"title=x", 415),
    "XML": ("application/xml", b"<a/>", 415),
    "no type": ("", b"{}", 415),
    "a type that is none": ("nonsense", b"{}", 415),
    "a form without a boundary": ("multipart/form-data", b"x", 415),
}
HOSTILE = {
    "NUL": "a\x00b",
    "a surrogate": "a\ud800",
    "a control character": "\x1b[2J",
    "a direction": "\u202ex",
    "long": "x" * 100_000,
    "empty": "",
    "blank": " \n",
    "null": None,
    "false": False,
    "a number": 10**30,
    "a longer number": 10**4_000,
    "a negative number": -(10**20),
    "a fraction": 1e308,
    "a list": [],
    "a list of lists": [[["x"]]],
    "an object": {"x": {"y": "z"}},
    "markup": "<script>alert(1)</script>",
    "SQL": "'; DROP TABLE x; --",
    "a date too far": "9999-12-31T23:59:59-23:59",
    "a date too early": "0001-01-01T00:00:00+23:59",
}
QUERIES = ("cursor", "limit", "q", "user_id", "from", "to", "mode", "model", "event_type", "since", "until", "format")
VALUES = {
    "NUL": "%00",
    "not UTF-8": "%ff%fe",
    "a surrogate": "%ed%a0%80",
    "half an escape": "%",
    "long": "x" * 4_000,
    "a large number": "9" * 5_000,
    "negative": "-1",
    "nothing": "",
    "a date too far": "9999-12-31",
    "a date too early": "0001-01-01",
    "a time too far": "9999-12-31T23:59:59-23:59",
    "no id": MISSING[:-1],
    "twice": "a&{name}=b",
    "as a list": "a&{name}[]=b",
}
# Cursors: base64 of what a made-up one may say.
CURSORS = ("p=%00", "p=x", "p=" + "9" * 40, "p=" + "9" * 5_000, "p=-1", "o=-1", "o=" + "9" * 40, "r=x&p=\ud7ff", "")
NO_IDS = (
    *("1", "x", "nope-nope", "%00", "%ff", "%ed%a0%80", "..%2f..", "'", "%0a", "x" * 3_000, "null", "-1"),
    *(MISSING[:-1], MISSING + "0", MISSING + "%0a", MISSING.replace("-", ""), "{" + MISSING + "}", MISSING + "%00"),
)


@pytest.fixture(autouse=True)
def quiet(settings):
    settings.ASSISTANT = AssistantSettings(offline_word_seconds=0, search="tests.no_such_module.search")
    for cache in caches.all():
        cache.clear()


@pytest.fixture
def client(api, alice) -> APIClient:
    return api(alice)


@pytest.fixture
def own(alice, bob) -> SimpleNamespace:
    """One of each kind that has an id."""
    conversation = create_conversation(user=alice, title="Talk", mode="voice")
    send_message(user=alice, conversation_id=conversation.id, content="Hello?")
    webhook = create_webhook(by=alice, url="http://127.0.0.1:9/")
    return SimpleNamespace(
        users=bob.id,
        tokens=create_token(user=alice, name="t", scopes=["read"]).token.id,
        conversations=conversation.id,
        documents=upload_document(user=alice, data=b"Elephants", file_name="notes.txt").id,
        notifications=notify(recipient=alice, kind="document.indexed", aggregate_id="x", subject="x").id,
        webhooks=webhook.id,
        secret=secret_of(webhook),
    )


def url_of(route: str, own: SimpleNamespace) -> str:
    return f"/api/v1/{route.replace(PK, str(getattr(own, route.split('/')[0], '')))}"


def send(client, method: str, url: str, body: bytes = b"", content_type: str = JSON, **headers: str):
    """Any request; a stream is read to its end."""
    answer = client.generic(method, url, body, content_type, headers=headers)
    if answer.streaming:
        list(answer.streaming_content)
    return answer


def wrong(answer) -> str:
    """What is wrong with an answer to a hostile request; empty: nothing."""
    if answer.status_code >= 500:
        return f"{answer.status_code}"
    if answer.status_code >= 400 and answer["Content-Type"] != "application/problem+json":
        return f"{answer.status_code} as {answer['Content-Type']}"
    return ""


def test_every_body_is_known():
    """A new endpoint is to be added above."""
    with_body = {(m, one.route) for one in ENDPOINTS for m in one.methods if m in ("POST", "PUT", "PATCH")}
    known = {*BODIES, ("POST", "documents"), *(("POST", route) for route in NO_BODIES)}
    assert with_body | {("POST", "auth/token")} == known


@pytest.mark.parametrize("accept", ["*/*", "application/json", "text/event-stream, application/json"])
def test_options(client, own, accept):
    for endpoint in ENDPOINTS:
        answer = send(client, "OPTIONS", url_of(endpoint.route, own), Accept=accept)
        assert (answer.status_code, answer["Content-Type"]) == (200, JSON), endpoint.route
        assert set(answer["Allow"].split(", ")) == endpoint.methods, endpoint.route
        assert own.secret not in json.dumps(answer.json())
        assert "vh_" not in json.dumps(answer.json())


def test_head_is_get_without_a_body(client, own):
    for endpoint in ENDPOINTS:
        if endpoint.route == "search":  # needs an index
            continue
        url = url_of(endpoint.route, own)
        get, head = send(client, "GET", url), send(client, "HEAD", url)
        assert get.status_code == head.status_code == (200 if "GET" in endpoint.methods else 405), endpoint.route
        assert head.content == b""
        for name in ("Content-Type", "Cache-Control", "Vary", "Allow", "ETag"):
            assert get.get(name) == head.get(name), (endpoint.route, name)


def test_methods_that_there_are_not(client, own):
    for endpoint in [*ENDPOINTS, Endpoint("auth/token", TokenView)]:
        for method in {*METHODS, "TRACE", "CONNECT", "PROPFIND", "X" * 100} - endpoint.methods:
            answer = send(client, method, url_of(endpoint.route, own))
            assert answer.status_code == 405, (method, endpoint.route)
            assert set(answer["Allow"].split(", ")) == endpoint.methods
            if method != "HEAD":
                assert_problem(answer, 405)


@pytest.mark.parametrize("path", ["", "v1", "v1/", "v2/me", "v1/nothing", "v1//me", "v1/me%00", "v1/%ff", "v1/ME"])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
def test_unknown_paths(client, path, method):
    assert_problem(send(client, method, f"/api/{path}"), 404)


def test_a_slash_at_the_end_is_another_path(client, own):
    for endpoint in ENDPOINTS:
        for method in ("GET", "POST"):
            assert_problem(send(client, method, url_of(endpoint.route, own) + "/"), 404)


def test_ids_that_are_none(client):
    for endpoint in ENDPOINTS:
        for no_id in NO_IDS if PK in endpoint.route else ():
            for method in endpoint.methods - {"HEAD"}:
                answer = send(client, method, f"/api/v1/{endpoint.route.replace(PK, no_id)}")
                assert_problem(answer, 404)


@pytest.mark.parametrize("raw", RAW.values(), ids=RAW)
def test_bodies_that_are_none(raw, client, own):
    content_type, body, status = raw
    for method, route in BODIES:
        # A change of nothing and a rotation without wishes are fine: so is a body of nothing.
        is_optional = method == "PATCH" or route.endswith("/rotate")
        caches["default"].clear()
        answer = send(client, method, url_of(route, own), body, content_type)
        case = f"{method} {route}: {answer.status_code} {answer.content[:200]!r}"
        assert answer.status_code == status or (is_optional and answer.status_code in (200, 201, 409)), case
        assert wrong(answer) == "", case
    for route in (*NO_BODIES, "documents"):
        answer = send(client, "POST", url_of(route, own), body, content_type)
        assert wrong(answer) == "", (route, answer.content[:200])


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_values_of_a_body(value, client, own):
    for (method, route), body in BODIES.items():
        for name in body:
            bad = json.dumps({**body, name: value}).encode()
            answer = send(client, method, url_of(route, own), bad)
            assert wrong(answer) == "", f"{method} {route}, {name}: {wrong(answer)}"
    for name in ("kind", "channel", "enabled"):
        one = {"kind": "document.failed", "channel": "email", "enabled": True, name: value}
        answer = send(client, "PUT", "/api/v1/notification-preferences", json.dumps({"preferences": [one]}).encode())
        assert wrong(answer) == "", name


BOUNDARY = "multipart/form-data; boundary=b"
FORMS = {
    "nothing": (BOUNDARY, b""),
    "no end": (BOUNDARY, b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.txt"\r\n\r\nabc'),
    "no boundary": ("multipart/form-data", b"abc"),
    "another boundary": (BOUNDARY, b"--c\r\n\r\nabc\r\n--c--"),
    "a long boundary": ("multipart/form-data; boundary=" + "b" * 500, b"abc"),
    "a boundary that is not ASCII": ("multipart/form-data; boundary=\xe4", b"abc"),
    "a bad encoding": (
        BOUNDARY,
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\nContent-Transfer-Encoding: base64\r\n\r\n'
        b"!!!\r\n--b--\r\n",
    ),
    "many fields": (
        BOUNDARY,
        b"".join(b'--b\r\nContent-Disposition: form-data; name="f%d"\r\n\r\nx\r\n' % i for i in range(1500)) + b"--b--",
    ),
}
FILE = b'--b\r\nContent-Disposition: form-data; name="file"; filename=%s\r\n%s\r\nElephants\r\n--b--\r\n'
NAMES = [
    b'"x\x00.txt"',
    b'"\xff\xfe.txt"',
    b'"../../x.txt"',
    b'""',
    b'"' + b"x" * 5_000 + b'.txt"',
    b"x",
    b'"a\\"b\'.txt"',
]


ENCODED = [b"name*=nope''x", b"name*=utf-8''%00", b"name*0*=x''y", b"name=file; filename*=nope''x.txt"]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms_that_are_none(form, client):
    answer = send(client, "POST", "/api/v1/documents", form[1], form[0])
    assert_problem(answer, answer.status_code)
    assert 400 <= answer.status_code < 500


def test_files_with_strange_names_and_types(client):
    for name in NAMES:
        answer = send(client, "POST", "/api/v1/documents", FILE % (name, b""), BOUNDARY)
        assert wrong(answer) == "", name
    for disposition in ENCODED:
        part = b"--b\r\nContent-Disposition: form-data; " + disposition + b"\r\n\r\nElephants\r\n--b--\r\n"
        answer = send(client, "POST", "/api/v1/documents", part, BOUNDARY)
        assert_problem(answer, 400)
    for kind in (b"\x00", b"\xff/\xff", b"x" * 5_000, b"text/plain; charset=nonsense", b"application/pdf", b"a/b/c"):
        answer = send(
            client, "POST", "/api/v1/documents", FILE % (b'"x.txt"', b"Content-Type: %s\r\n" % kind), BOUNDARY
        )
        assert wrong(answer) == "", kind


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_queries(value, client, own, milvus):  # noqa: F811
    for endpoint in ENDPOINTS:
        if "GET" in endpoint.methods:
            for name in QUERIES:
                answer = send(client, "GET", f"{url_of(endpoint.route, own)}?{name}={value.format(name=name)}")
                assert wrong(answer) == "", f"{endpoint.route}?{name}: {wrong(answer)}"


def test_made_up_cursors(client, own):
    for endpoint in ENDPOINTS:
        if "GET" in endpoint.methods and endpoint.route != "search":
            for cursor in CURSORS:
                text = b64encode(cursor.encode()).decode().replace("=", "%3D").replace("+", "%2B")
                answer = send(client, "GET", f"{url_of(endpoint.route, own)}?cursor={text}")
                assert wrong(answer) == "", f"{endpoint.route}, {cursor[:20]!r}: {wrong(answer)}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Accept", "nonsense"),
        ("Accept", "\xff"),
        ("Accept", "application/json; indent=99999999999"),
        ("Accept", "application/json; indent=-1"),
        ("Accept", ",".join(["a/b"] * 2_000)),
        ("Authorization", "Token"),
        ("Authorization", "Token \xff"),
        ("Authorization", "Bearer " + "x" * 5_000),
        ("Authorization", "Token vh_" + uuid4().hex + "_x"),
        ("Cookie", "sessionid=\x00; csrftoken=\xff"),
        ("Idempotency-Key", "\xff"),
        ("If-Match", "\x00"),
        ("If-None-Match", ","),
        ("If-Modified-Since", "nonsense"),
        ("If-Unmodified-Since", "Mon, 99 Jan 99999 00:00:00 GMT"),
        ("Range", "bytes=5-1"),
        ("Content-Length", "nonsense"),
        ("Content-Encoding", "gzip"),
        ("X-HTTP-Method-Override", "DELETE"),
        ("X-Correlation-ID", "\x00\xff"),
        ("X-Forwarded-Host", "evil.example.com"),
    ],
)
def test_headers(name, value, client, own):
    for endpoint in ENDPOINTS:
        if endpoint.route == "search":
            continue
        for method in endpoint.methods & {"GET", "POST", "PATCH", "PUT"}:
            answer = send(client, method, url_of(endpoint.route, own), b"{}", **{name: value})
            assert wrong(answer) == "", f"{method} {endpoint.route}: {wrong(answer)}"


@pytest.mark.parametrize("encoded", ["charset*=nope''x", "charset*=utf-8''%00", "x*0*=%00''y"])
def test_a_content_type_that_cannot_be_read(encoded, db):
    """Django stumbles over it before any view: what the server calls is asked."""
    environ = {"REQUEST_METHOD": "POST", "PATH_INFO": "/api/v1/auth/token", "HTTP_HOST": "localhost"}
    environ |= {"CONTENT_TYPE": f"application/json; {encoded}", "CONTENT_LENGTH": "2", "wsgi.input": BytesIO(b"{}")}
    setup_testing_defaults(environ)
    answers = []
    body = b"".join(wsgi.application(environ, lambda status, headers: answers.append((status, dict(headers)))))
    [(status, headers)] = answers
    assert (status, headers["Content-Type"]) == ("415 Unsupported Media Type", "application/problem+json")
    assert json.loads(body)["status"] == 415
