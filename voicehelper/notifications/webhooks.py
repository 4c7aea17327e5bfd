"""Webhooks: where they may lead, how they are signed, and one attempt to post to one.

Signed as the Standard Webhooks convention has it (github.com/standard-webhooks/standard-webhooks): HMAC-SHA256 over
`<webhook-id>.<webhook-timestamp>.<body>`, in base64 behind "v1,", with the bytes behind "whsec_" as the key. The
receiver knows by `webhook-id` what it has seen already, and by `webhook-timestamp` (seconds since 1970) what is old.

A secret is not stored. It is derived from SECRET_KEY and the endpoint's salt, so no copy of the database tells it.
Where SECRET_KEY is replaced, what is sent is signed with the secrets of SECRET_KEY_FALLBACKS as well: rotate the
webhooks' secrets before the old key goes.
"""

import base64
import contextlib
import hashlib
import hmac
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from urllib.parse import SplitResult, urlsplit

from django.conf import settings
from django.utils import timezone
from django.utils.encoding import force_bytes

from .models import Delivery, WebhookEndpoint
from .outcomes import Outcome
from .texts import line

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

ROTATION_OVERLAP = timedelta(days=1)
"""So long after a rotation the old secret's signature is sent along."""
ANSWER_SECONDS = 10.0
"""How long one attempt may take in all, however slowly the receiver answers."""
KEPT_CHARS = 500
"""Of an answer that is an error."""
LONGEST_WAIT_SECONDS = 3600.0
"""That a receiver may ask for with Retry-After."""
USER_AGENT = "VoiceHelper-Webhooks/1"
_PREFIX = "whsec_"


class AddressRefused(Exception):
    """Nothing is sent there. The text says why, for whoever gave the address."""


# -- where they may lead


def check_url(url: str) -> SplitResult:
    """Return a webhook's URL in parts. Raises AddressRefused for one that nothing would be sent to.

    Outside development that is all but https, and addresses that are not public. What a name leads to is looked up
    when something is sent.
    """
    if not url.isascii() or not url.isprintable() or set(" \\\"'<>^`{|}") & set(url):
        raise AddressRefused("The URL has characters that must be encoded.")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise AddressRefused("This is not a URL.") from error
    schemes = ("https", "http") if settings.IS_DEV else ("https",)
    if parts.scheme not in schemes:
        raise AddressRefused(f"The URL must begin with {' or '.join(f'{scheme}://' for scheme in schemes)}.")
    if not host or port == 0:
        raise AddressRefused("The URL names no host.")
    if "@" in parts.netloc or parts.fragment:
        raise AddressRefused("The URL may hold neither a login nor a fragment.")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return parts
    _check_address(address)
    return parts


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host, of which one is connected to: looked up once, it cannot lead elsewhere later.

    Raises AddressRefused when one of them is not public, OSError when the host is not found.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(socket_address[0]) for *_, socket_address in found))
    for address in addresses:
        _check_address(ipaddress.ip_address(address))
    return addresses


def _check_address(address: Address) -> None:
    """Raise AddressRefused unless it is a public one; in development every one will do."""
    if settings.IS_DEV:
        return
    for one in [*_embedded(address)] or [address]:
        is_site_local = isinstance(one, ipaddress.IPv6Address) and one.is_site_local  # to Python that is global
        if not one.is_global or one.is_multicast or one.is_reserved or one.is_unspecified or is_site_local:
            raise AddressRefused("The host is not at a public address.")


def _embedded(address: Address) -> Iterator[Address]:
    """The IPv4 addresses that an IPv6 address leads to by way of a gateway."""
    if isinstance(address, ipaddress.IPv4Address):
        return
    for one in (address.ipv4_mapped, address.sixtofour, *(address.teredo or ())):
        if one is not None:
            yield one
    if address in _NAT64 or address in _IPV4_COMPATIBLE:
        yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_IPV4_COMPATIBLE = ipaddress.IPv6Network("::/96")


# -- how they are signed


def secret_of(endpoint: WebhookEndpoint) -> str:
    """The secret as its receiver gets it, once."""
    return _secret(settings.SECRET_KEY, endpoint.salt)


def secrets_of(endpoint: WebhookEndpoint) -> list[str]:
    """Those that are signed with now, the newest first."""
    salts = [endpoint.salt]
    if endpoint.previous_salt_until is not None and endpoint.previous_salt_until > timezone.now():
        salts.append(endpoint.previous_salt)
    return [_secret(key, salt) for salt in salts for key in (settings.SECRET_KEY, *settings.SECRET_KEY_FALLBACKS)]


def _secret(key: str | bytes, salt: str) -> str:
    derived = hmac.new(force_bytes(key), f"webhook secret {salt}".encode(), hashlib.sha256).digest()
    return _PREFIX + base64.b64encode(derived).decode()


def sign(secret: str, *, message_id: str, timestamp: int, body: bytes) -> str:
    """One signature of the header `webhook-signature`."""
    key = base64.b64decode(secret.removeprefix(_PREFIX))
    digest = hmac.new(key, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


# -- one attempt


def post(endpoint: WebhookEndpoint, delivery: Delivery) -> Outcome:
    """Post a delivery once, to the address that its host has now; redirects are not followed."""
    try:
        parts = check_url(endpoint.url)
        addresses = resolve(parts.hostname or "", _port(parts))
    except AddressRefused as error:
        return Outcome(str(error))
    except (OSError, UnicodeError) as error:
        return Outcome(f"The host is not found: {_told(error)}", may_try_again=True, is_receivers=True)
    body, timestamp = delivery.body.encode(), int(time.time())
    signatures = [
        sign(secret, message_id=str(delivery.id), timestamp=timestamp, body=body) for secret in secrets_of(endpoint)
    ]
    headers = {
        "Content-Type": "application/json",
        "User-Agent": USER_AGENT,
        "webhook-id": str(delivery.id),
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(signatures),
    }
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection = (_TLSConnection if parts.scheme == "https" else _Connection)(parts.hostname or "", _port(parts))
    connection.addresses = addresses
    try:
        connection.connect()
        with _hanging_up_at(connection.sock, connection.deadline):
            connection.request("POST", target, body, headers)
            answer = connection.getresponse()
            if 200 <= answer.status < 300:
                return Outcome()
            text = line(answer.read(4 * KEPT_CHARS).decode(errors="replace"), KEPT_CHARS)
    except (OSError, http.client.HTTPException, ValueError) as error:
        is_late = time.monotonic() >= connection.deadline
        told = f"No answer within {ANSWER_SECONDS:.0f} s" if is_late else f"No answer: {_told(error)}"
        return Outcome(told, may_try_again=True, is_receivers=True)
    finally:
        connection.close()
    return _refusal(answer, text)


def _refusal(answer: http.client.HTTPResponse, text: str) -> Outcome:
    error = f"HTTP {answer.status}{': ' if text else ''}{text}"
    if answer.status == 410:
        return Outcome(error, is_receivers=True, wants_no_more=True)
    if 300 <= answer.status < 400:
        error = f"HTTP {answer.status}: redirects are not followed"
    wait = answer.headers.get("Retry-After", "")
    seconds = min(float(wait), LONGEST_WAIT_SECONDS) if wait.isdecimal() and wait.isascii() and len(wait) < 10 else 0.0
    return Outcome(error, may_try_again=True, is_receivers=True, wait_seconds=seconds)


def _port(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


def _told(error: Exception) -> str:
    return line(f"{type(error).__name__} {error}".strip(), KEPT_CHARS)


class _Connection(http.client.HTTPConnection):
    """Connects to addresses that were looked up before, whatever the host's name leads to by now."""

    addresses: list[str]

    def __init__(self, host: str, port: int) -> None:
        super().__init__(host, port)
        self.deadline = time.monotonic() + ANSWER_SECONDS

    def connect(self) -> None:
        for at, address in enumerate(self.addresses, start=1):
            try:
                # Of what is left each gets its share: one that is dead is not to take the time of those that live.
                share = self._seconds_left() / (len(self.addresses) + 1 - at)
                self.sock = socket.create_connection((address, self.port), share)
                self.sock.settimeout(self._seconds_left())
                return
            except OSError:
                if at == len(self.addresses):
                    raise

    def _seconds_left(self) -> float:
        """Raises TimeoutError when there are none."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class _TLSConnection(_Connection):
    """The same in TLS, with a certificate for the host's name."""

    default_port = http.client.HTTPS_PORT

    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(self._seconds_left())  # of the whole handshake
        self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)


@contextmanager
def _hanging_up_at(sock: socket.socket, deadline: float) -> Iterator[None]:
    """End the connection under the block then: the timeout of a socket is that of each read alone."""

    def hang_up() -> None:
        with contextlib.suppress(OSError):
            # That of the socket below TLS, which another thread is reading from.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), hang_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
