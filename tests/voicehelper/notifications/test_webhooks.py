"""Where webhooks may lead, how they are signed, and what one attempt comes to."""

import contextlib
import socket
import ssl
import subprocess
import threading
import time
import uuid

import pytest
from django.conf import settings

from tests.voicehelper.notifications.servers import Receiver, is_signed
from voicehelper.notifications import webhooks
from voicehelper.notifications.models import Delivery, WebhookEndpoint
from voicehelper.notifications.outcomes import Outcome
from voicehelper.notifications.webhooks import AddressRefused, check_url, post, resolve, secret_of, secrets_of, sign

BODY = '{"type":"document.failed","data":{"title":"Grüße"}}'


def endpoint_to(url):
    return WebhookEndpoint(url=url, salt="a" * 64)


def delivery():
    return Delivery(id=uuid.uuid4(), body=BODY)


@pytest.fixture
def production(settings):
    settings.IS_DEV = False


# -- where they may lead

PUBLIC = [
    "https://example.com",
    "https://example.com/hook?a=b&c=%20",
    "https://example.com:8443/",
    "https://93.184.216.34/",
    "https://[2606:2800:220:1:248:1893:25c8:1946]/",
]
MALFORMED = [
    "",
    "example.com",
    "https://",
    "https:///path",
    "https://:443/",
    "https://example.com:0/",
    "https://example.com:99999/",
    "https://example.com:http/",
    "https://[::1",
    "https://user:secret@example.com/",
    "https://example.com@10.0.0.1/",
    "https://@example.com/",
    "https://example.com/#there",
    "https://example.com/a b",
    "https://example.com/\r\nHost: other",
    "https://example.com\\@other/",
    "https://exämple.com/",
    "https://example.com/\x00",
    "ftp://example.com/",
    "file:///etc/passwd",
    "javascript:alert(1)",
    "gopher://127.0.0.1:6379/",
]
NOT_PUBLIC = [
    "127.0.0.1",
    "127.8.8.8",
    "0.0.0.0",  # noqa: S104  (it is refused)
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "192.0.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "203.0.113.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "[::1]",
    "[::]",
    "[fe80::1]",
    "[fc00::1]",
    "[fd12:3456::1]",
    "[fec0::1]",
    "[ff02::1]",
    "[2001:db8::1]",
    "[::ffff:127.0.0.1]",
    "[::ffff:10.0.0.1]",
    "[::127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[64:ff9b::a00:1]",
    "[64:ff9b:1::1]",
    "[2002:7f00:1::]",
    "[2002:a00:1::]",
    "[2001:0:a00:1::]",
]
# To the resolver these are addresses as well.
DISGUISED = ["localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "10.1", "169.254.43518"]


@pytest.mark.parametrize("url", PUBLIC)
def test_a_public_https_url_will_do(production, url):
    assert check_url(url).geturl() == url


@pytest.mark.parametrize("url", MALFORMED)
@pytest.mark.parametrize("is_dev", [True, False])
def test_what_is_no_url_of_a_webhook(settings, url, is_dev):
    settings.IS_DEV = is_dev
    with pytest.raises(AddressRefused):
        check_url(url)


def test_plain_http_is_for_development(settings, production):
    with pytest.raises(AddressRefused, match="begin with https://"):
        check_url("http://example.com/")
    settings.IS_DEV = True
    check_url("http://127.0.0.1:8000/")


@pytest.mark.parametrize("host", NOT_PUBLIC)
def test_an_address_that_is_not_public_is_refused_at_once_and_when_sent_to(production, host):
    with pytest.raises(AddressRefused, match="public address"):
        check_url(f"https://{host}/")
    assert post(endpoint_to(f"https://{host}/"), delivery()) == Outcome("The host is not at a public address.")


@pytest.mark.parametrize("host", ["::ffff:93.184.216.34", "64:ff9b::5db8:d822"])
def test_a_public_address_behind_a_gateway_will_do(production, host):
    check_url(f"https://[{host}]/")


@pytest.mark.parametrize("host", DISGUISED)
def test_a_name_that_leads_to_one_is_refused_when_it_is_sent_to(production, host):
    with pytest.raises(AddressRefused, match="public address"):
        resolve(host, 443)
    assert post(endpoint_to(f"https://{host}/"), delivery()) == Outcome("The host is not at a public address.")


def test_one_address_that_is_not_public_is_enough_to_refuse(production, monkeypatch):
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 443)) for ip in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    with pytest.raises(AddressRefused):
        resolve("two-faced.example", 443)


def test_a_name_is_looked_up_once_so_that_it_cannot_lead_elsewhere_when_it_is_connected_to(monkeypatch, receiver):
    asked = []
    real = socket.getaddrinfo

    def rebinding(host, *arguments, **options):
        if host == "rebinding.example":
            asked.append(host)
            host = "127.0.0.1" if len(asked) == 1 else "127.0.0.99"
        return real(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    assert post(endpoint_to(f"http://rebinding.example:{receiver.port}/hook"), delivery()) == Outcome()
    assert asked == ["rebinding.example"]
    [(headers, _)] = receiver.requests
    assert headers["Host"] == f"rebinding.example:{receiver.port}"


def test_a_host_that_is_not_found_may_be_there_later(production):
    outcome = post(endpoint_to("https://nowhere.invalid/"), delivery())
    assert outcome.error.startswith("The host is not found") and outcome.may_try_again


# -- how they are signed


def test_a_signature_is_that_of_the_standard():
    # The example of the convention's documentation.
    signature = sign(
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        message_id="msg_p5jXN8AQM9LWM0D4loKWxJek",
        timestamp=1614265330,
        body=b'{"test": 2432232314}',
    )
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_what_is_posted_is_signed_and_told_apart(receiver):
    endpoint, sent = endpoint_to(receiver.url), delivery()
    assert post(endpoint, sent) == Outcome()
    [(headers, body)] = receiver.requests
    assert body.decode() == BODY
    assert headers["Content-Type"] == "application/json"
    assert headers["webhook-id"] == str(sent.id)
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 5
    assert is_signed(secret_of(endpoint), headers, body)
    assert not is_signed(secret_of(endpoint), headers, body + b" ")
    assert not is_signed(secret_of(WebhookEndpoint(salt="b" * 64)), headers, body)


def test_the_receiver_of_the_documentation_tells_what_is_ours(receiver):
    text = (settings.BASE_DIR / "docs/notifications.md").read_text()
    namespace = {}
    exec(text.partition("```python\n")[2].partition("```")[0], namespace)  # noqa: S102  (our own)
    is_ours, endpoint = namespace["is_ours"], endpoint_to(receiver.url)
    post(endpoint, delivery())
    [(headers, body)] = receiver.requests
    secret = secret_of(endpoint)
    assert is_ours(secret, headers, body)
    assert not is_ours(secret, headers, body + b" ")
    assert not is_ours(secret_of(WebhookEndpoint(salt="b" * 64)), headers, body)
    old = {**dict(headers), "webhook-timestamp": str(int(time.time()) - 400)}
    old["webhook-signature"] = sign(
        secret, message_id=old["webhook-id"], timestamp=int(old["webhook-timestamp"]), body=body
    )
    assert not is_ours(secret, old, body)


def test_a_secret_depends_on_the_salt_and_on_the_servers_key(settings):
    one = secret_of(WebhookEndpoint(salt="a" * 64))
    assert len(one) == len("whsec_") + 44 and one.startswith("whsec_")
    assert secret_of(WebhookEndpoint(salt="b" * 64)) != one
    old, settings.SECRET_KEY = settings.SECRET_KEY, "another key"
    assert secret_of(WebhookEndpoint(salt="a" * 64)) != one
    settings.SECRET_KEY_FALLBACKS = [old]
    assert one in secrets_of(WebhookEndpoint(salt="a" * 64))


# -- one attempt


@pytest.mark.parametrize("status", [200, 201, 204, 299])
def test_it_arrived(receiver, status):
    receiver.status = status
    assert post(endpoint_to(receiver.url), delivery()) == Outcome()


@pytest.mark.parametrize("status", [400, 401, 404, 408, 429, 500, 503])
def test_it_was_refused_and_may_be_tried_again(receiver, status):
    receiver.status, receiver.body = status, b"no\r\n\x00such thing"
    outcome = post(endpoint_to(receiver.url), delivery())
    assert outcome == Outcome(f"HTTP {status}: no such thing", may_try_again=True, is_receivers=True)


def test_a_long_answer_is_cut(receiver):
    receiver.status, receiver.body = 500, b"x" * 100_000
    assert len(post(endpoint_to(receiver.url), delivery()).error) <= len("HTTP 500: ") + 500


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(receiver, status):
    elsewhere = Receiver()
    try:
        receiver.status, receiver.headers = status, {"Location": elsewhere.url}
        outcome = post(endpoint_to(receiver.url), delivery())
        assert outcome.error == f"HTTP {status}: redirects are not followed"
        assert elsewhere.requests == []
    finally:
        elsewhere.close()


@pytest.mark.parametrize(
    ("value", "seconds"), [("7", 7), ("99999", 3600), ("-1", 0), ("soon", 0), ("", 0), ("9" * 99, 0), ("²", 0)]
)
def test_how_long_it_wants_to_be_left_alone(receiver, value, seconds):
    receiver.status, receiver.headers = 429, {"Retry-After": value}
    assert post(endpoint_to(receiver.url), delivery()).wait_seconds == seconds


def test_gone_means_nothing_more(receiver):
    receiver.status = 410
    assert post(endpoint_to(receiver.url), delivery()) == Outcome("HTTP 410", is_receivers=True, wants_no_more=True)


def test_one_that_does_not_answer_in_time_is_left(receiver, monkeypatch):
    monkeypatch.setattr(webhooks, "ANSWER_SECONDS", 0.3)
    receiver.hangs = True
    outcome = post(endpoint_to(receiver.url), delivery())
    assert outcome == Outcome("No answer within 0 s", may_try_again=True, is_receivers=True)


def test_one_that_answers_for_ever_is_left(receiver, monkeypatch):
    monkeypatch.setattr(webhooks, "ANSWER_SECONDS", 0.5)
    receiver.drips, receiver.headers = True, {"Content-Length": "100000"}
    receiver.status = 200
    assert post(endpoint_to(receiver.url), delivery()) == Outcome()  # that is all there is to know
    receiver.status = 500
    started = time.monotonic()
    outcome = post(endpoint_to(receiver.url), delivery())
    assert outcome.error.startswith("HTTP 500: x") and outcome.may_try_again
    assert 0.4 < time.monotonic() - started < 3


def test_one_that_is_not_there_may_be_there_later():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        outcome = post(endpoint_to(f"http://127.0.0.1:{taken.getsockname()[1]}/"), delivery())
    assert outcome.error.startswith("No answer: ConnectionRefusedError") and outcome.may_try_again


def test_an_address_that_is_dead_leaves_time_for_the_next(receiver, monkeypatch):
    monkeypatch.setattr(webhooks, "ANSWER_SECONDS", 2.0)
    monkeypatch.setattr(webhooks, "resolve", lambda host, port: ["127.0.0.2", "127.0.0.1"])
    with socket.socket() as deaf, contextlib.ExitStack() as callers:
        deaf.bind(("127.0.0.2", receiver.port))
        deaf.listen(0)
        for _ in range(3):  # more than it lets wait: further ones get no answer at all
            caller = callers.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(("127.0.0.2", receiver.port))
        assert post(endpoint_to(f"http://name.example:{receiver.port}/"), delivery()) == Outcome()
    assert len(receiver.requests) == 1


def test_one_that_does_not_speak_http():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)

        def babble():
            connection, _ = server.accept()
            with connection:
                connection.recv(100_000)
                connection.sendall(b"SSH-2.0-something\r\n")

        thread = threading.Thread(target=babble)
        thread.start()
        outcome = post(endpoint_to(f"http://127.0.0.1:{server.getsockname()[1]}/"), delivery())
        thread.join()
    assert outcome.error.startswith("No answer: BadStatusLine") and outcome.may_try_again


@pytest.mark.needs_tool("openssl")
def test_a_certificate_is_checked(receiver, tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    options = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost"]
    command = ["openssl", "req", *options, *names, "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    secure = Receiver()
    try:
        secure._server.socket = context.wrap_socket(secure._server.socket, server_side=True)
        url = f"https://localhost:{secure.port}/hook"
        stranger = post(endpoint_to(url), delivery())
        assert "CERTIFICATE_VERIFY_FAILED" in stranger.error and stranger.may_try_again
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert post(endpoint_to(url), delivery()) == Outcome()
        other_name = post(endpoint_to(url.replace("localhost", "127.0.0.1")), delivery())
        assert "CERTIFICATE_VERIFY_FAILED" in other_name.error
        assert len(secure.requests) == 1
    finally:
        secure.close()
