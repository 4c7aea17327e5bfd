"""How e-mail is sent: from the environment to Django's settings.

`EMAIL_URL` says it all, or single variables do. Nothing set: in development mails are printed, elsewhere none are made.

| variable | default | meaning |
|---|---|---|
| `EMAIL_URL` | none | `smtp://`, `smtp+tls://` (STARTTLS) or `smtps://`, then `user:password@host:port`; `console://` |
| `EMAIL_HOST`, `EMAIL_PORT` | none, 25 | instead of the URL; with STARTTLS the port is by default 587, with TLS 465 |
| `EMAIL_USER`, `EMAIL_PASSWORD` | none | the login; `EMAIL_PASSWORD_FILE` names a file that holds the password |
| `EMAIL_SECURITY` | `none` | `none`, `starttls` or `tls` |
| `EMAIL_TIMEOUT_SECONDS` | 10 | for each answer of the mail server, 1 to 60 |
| `EMAIL_FROM` | none in production | the sender, `Name <address>` or an address |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parseaddr
from pathlib import Path
from urllib.parse import unquote, urlsplit

from django.core.exceptions import ImproperlyConfigured, ValidationError
from django.core.mail.message import sanitize_address
from django.core.validators import validate_email

_BACKENDS = "django.core.mail.backends"
_SECURITY = {"smtp": "none", "smtp+tls": "starttls", "smtps": "tls"}
_PORTS = {"none": 25, "starttls": 587, "tls": 465}
_SINGLE = ("EMAIL_HOST", "EMAIL_PORT", "EMAIL_USER", "EMAIL_PASSWORD", "EMAIL_PASSWORD_FILE", "EMAIL_SECURITY")


@dataclass(frozen=True)
class EmailSettings:
    """`is_configured`: whether mails are made at all."""

    is_configured: bool
    backend: str
    sender: str
    timeout_seconds: int
    host: str = ""
    port: int = 25
    user: str = ""
    password: str = ""
    security: str = "none"


def email_settings(environment: Mapping[str, str], *, is_dev: bool) -> EmailSettings:
    """Read the variables above.

    Raises ImproperlyConfigured, which names the variable and never its value, for what makes no sense.
    """
    url = environment.get("EMAIL_URL", "")
    single = [name for name in _SINGLE if environment.get(name)]
    if url and single:
        raise ImproperlyConfigured(f"EMAIL_URL and {single[0]} are both set: which one is meant?")
    timeout = _number(environment, "EMAIL_TIMEOUT_SECONDS", 10, most=60)
    if not url and not single:
        backend = f"{_BACKENDS}.{'console' if is_dev else 'dummy'}.EmailBackend"
        return EmailSettings(is_dev, backend, _sender(environment, is_dev=True), timeout)
    sender = _sender(environment, is_dev=is_dev)
    if url.rstrip("/") == "console:":
        return EmailSettings(True, f"{_BACKENDS}.console.EmailBackend", sender, timeout)
    host, port, user, password, security = _of_url(url) if url else _of_single(environment)
    if bool(user) != bool(password):
        raise ImproperlyConfigured("the login of the mail server needs both user and password")
    if not (user + password).isascii():
        raise ImproperlyConfigured("the login of the mail server must be ASCII: Python's smtplib knows no other")
    if user and security == "none" and not is_dev:
        raise ImproperlyConfigured("a password is sent over TLS alone: smtp+tls:// or smtps:// (EMAIL_SECURITY)")
    backend = f"{_BACKENDS}.smtp.EmailBackend"
    return EmailSettings(True, backend, sender, timeout, host, port, user, password, security)


def _of_url(url: str) -> tuple[str, int, str, str, str]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ImproperlyConfigured("EMAIL_URL is not a URL") from None
    if parts.scheme not in _SECURITY:
        raise ImproperlyConfigured(f"EMAIL_URL must begin with {'://, '.join([*_SECURITY, 'console'])}://")
    if not host or parts.path.strip("/") or parts.query or parts.fragment:
        raise ImproperlyConfigured("EMAIL_URL must look like smtp+tls://user:password@host:587")
    security = _SECURITY[parts.scheme]
    return host, port or _PORTS[security], unquote(parts.username or ""), unquote(parts.password or ""), security


def _of_single(environment: Mapping[str, str]) -> tuple[str, int, str, str, str]:
    host = environment.get("EMAIL_HOST", "")
    if not host:
        given = next(name for name in _SINGLE if environment.get(name))
        raise ImproperlyConfigured(f"{given} needs EMAIL_HOST")
    security = environment.get("EMAIL_SECURITY") or "none"
    if security not in _PORTS:
        raise ImproperlyConfigured(f"EMAIL_SECURITY must be one of {', '.join(_PORTS)}")
    port = _number(environment, "EMAIL_PORT", _PORTS[security], most=65_535)
    return host, port, environment.get("EMAIL_USER", ""), _password(environment), security


def _password(environment: Mapping[str, str]) -> str:
    password, file = environment.get("EMAIL_PASSWORD", ""), environment.get("EMAIL_PASSWORD_FILE", "")
    if not file:
        return password
    if password:
        raise ImproperlyConfigured("EMAIL_PASSWORD and EMAIL_PASSWORD_FILE are both set: which one is meant?")
    try:
        return Path(file).read_text().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ImproperlyConfigured(f"EMAIL_PASSWORD_FILE cannot be read: {type(error).__name__}") from None


def _sender(environment: Mapping[str, str], *, is_dev: bool) -> str:
    sender = environment.get("EMAIL_FROM", "")
    if not sender:
        if not is_dev:
            raise ImproperlyConfigured("EMAIL_FROM must name the sender of e-mails")
        return "VoiceHelper <voicehelper@localhost>"
    try:
        validate_email(parseaddr(sender)[1])
        sanitize_address(sender, "utf-8")  # as for each mail: one address, and nothing after it
    except (ValidationError, ValueError):
        raise ImproperlyConfigured("EMAIL_FROM must be an address, or Name <address>") from None
    if not sender.isprintable():
        raise ImproperlyConfigured("EMAIL_FROM must be one line")
    return sender


def _number(environment: Mapping[str, str], name: str, default: int, *, most: int) -> int:
    text = environment.get(name) or str(default)
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text) <= most:
        raise ImproperlyConfigured(f"{name} must be a whole number from 1 to {most}")
    return int(text)
