"""One attempt to send an e-mail, which must not arrive twice.

What an attempt may come to: the server took it; it said no, or was never reached, so nothing was sent; or the line
broke while the server had it, and nobody knows. The last is not tried again.
"""

import contextlib
import logging
import smtplib
from email.utils import parseaddr

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.mail import EmailMultiAlternatives, get_connection
from django.core.validators import validate_email

from .models import Delivery
from .outcomes import Outcome
from .texts import line

logger = logging.getLogger(__name__)

UNKNOWN_OUTCOME = "Unknown outcome: it may have been sent, and is not sent again."
KEPT_CHARS = 300
"""Of what a server says."""


def send(delivery: Delivery, address: str) -> Outcome:
    """Send a delivery to an address, once at most."""
    try:
        validate_email(address)
    except ValidationError:
        return Outcome("The user has no valid e-mail address.")
    connection = get_connection()
    try:
        connection.open()
    except (smtplib.SMTPException, OSError, ValueError) as error:  # ValueError: a host or login that cannot be encoded
        return Outcome(f"The mail server was not reached: {_told(error)}", may_try_again=True)
    try:
        return _send(_message(delivery, address, connection), connection)
    finally:
        with contextlib.suppress(smtplib.SMTPException, OSError):  # what became of the mail is known by now
            connection.close()


def _message(delivery: Delivery, address: str, connection: object) -> EmailMultiAlternatives:
    domain = parseaddr(settings.DEFAULT_FROM_EMAIL)[1].rpartition("@")[2] or "localhost"
    message = EmailMultiAlternatives(
        subject=line(delivery.subject, 1000),
        body=delivery.body,
        to=[address],
        connection=connection,
        headers={
            # The same however often an operator has it sent: a reader's program shows it once.
            "Message-ID": f"<{delivery.id}@{domain}>",
            "Auto-Submitted": "auto-generated",
        },
    )
    if delivery.body_html:
        message.attach_alternative(delivery.body_html, "text/html")
    return message


def _send(message: EmailMultiAlternatives, connection: object) -> Outcome:
    try:
        sent = connection.send_messages([message])  # type: ignore[attr-defined]
    except smtplib.SMTPRecipientsRefused as error:
        code, text = next(iter(error.recipients.values()))
        return _refused(code, text)
    except smtplib.SMTPResponseException as error:
        return _refused(error.smtp_code, error.smtp_error)
    except (smtplib.SMTPNotSupportedError, ValueError) as error:  # it could not even be said
        return Outcome(f"The mail cannot be sent: {_told(error)}")
    except (smtplib.SMTPException, OSError) as error:
        logger.warning("the line broke while a mail was sent", extra={"error": type(error).__name__})
        return Outcome(f"{UNKNOWN_OUTCOME} {_told(error)}")
    return Outcome() if sent else Outcome("The e-mail backend did not send it.")


def _refused(code: int, text: bytes | str) -> Outcome:
    told = text.decode(errors="replace") if isinstance(text, bytes) else text
    return Outcome(line(f"SMTP {code}: {told}", KEPT_CHARS), may_try_again=400 <= code < 500)


def _told(error: Exception) -> str:
    return line(f"{type(error).__name__} {error}".strip(), KEPT_CHARS)
