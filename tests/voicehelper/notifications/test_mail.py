"""One e-mail, by SMTP to a real server that does not always say yes."""

import time

import pytest

from tests.voicehelper.notifications.conftest import deliver, document_failed, make_due
from voicehelper.identity.models import User
from voicehelper.notifications.mail import UNKNOWN_OUTCOME
from voicehelper.notifications.models import Delivery


@pytest.fixture
def waiting(bob, mail_server):
    """An e-mail to bob."""
    document_failed(bob, title="Plan für Ä")
    return Delivery.objects.get()


def state():
    delivery = Delivery.objects.get()
    return delivery.state, delivery.attempts


def test_it_arrives_in_text_and_html(waiting, mail_server, emitted):
    assert deliver() == 1
    assert state() == ("sent", 1)
    [mail] = mail_server.mails
    assert mail["From"] == "VoiceHelper <notify@example.com>" and mail["To"] == "bob@example.com"
    assert mail["Subject"] == "Document could not be read: Plan für Ä"
    assert mail["Message-ID"] == f"<{waiting.id}@example.com>"
    assert mail["Auto-Submitted"] == "auto-generated"
    text, html = mail.get_body(["plain"]).get_content(), mail.get_body(["html"]).get_content()
    assert "Reason: It is no PDF." in text and "notification-preferences" in text
    assert "<strong>Plan für Ä</strong>" in html
    [sent] = [event for event in emitted("notification.sent") if event.payload.channel == "email"]
    assert sent.aggregate_id == sent.payload.notification_id == str(waiting.notification_id)
    assert (sent.payload.recipient_id, sent.payload.kind) == (str(waiting.recipient_id), "document.failed")
    assert sent.payload.attempts == 1
    assert (sent.correlation_id, sent.causation_id) == (waiting.correlation_id, str(waiting.event_id))
    assert deliver() == 0 and len(mail_server.mails) == 1


@pytest.mark.parametrize("command", ["MAIL", "RCPT", "DATA", ".", "greeting", "EHLO"])
def test_a_temporary_no_is_tried_again(waiting, mail_server, command):
    mail_server.answers[command] = "451 later"
    if command == "EHLO":
        mail_server.answers["HELO"] = "451 later"
    deliver()
    assert state() == ("pending", 1)
    assert "451" in Delivery.objects.get().last_error
    mail_server.answers.clear()
    mail_server.mails.clear()
    assert deliver() == 0  # not before its time
    make_due()
    deliver()
    assert state() == ("sent", 2) and len(mail_server.mails) == 1
    assert Delivery.objects.get().last_error == ""


@pytest.mark.parametrize("command", ["MAIL", "RCPT", "DATA", "."])
def test_a_final_no_is_final(waiting, mail_server, emitted, command):
    mail_server.answers[command] = "550 5.1.1 nobody here"
    deliver()
    assert state() == ("failed", 1)
    assert Delivery.objects.get().last_error == "SMTP 550: 5.1.1 nobody here"
    [failed] = emitted("notification.failed")
    assert (failed.payload.channel, failed.payload.error) == ("email", "SMTP 550: 5.1.1 nobody here")
    assert failed.payload.notification_id == str(waiting.notification_id)


@pytest.mark.parametrize("way", ["drop", "hang"])
def test_when_the_line_breaks_after_the_mail_nobody_knows_and_it_is_not_sent_again(
    waiting, mail_server, settings, emitted, way
):
    settings.EMAIL_TIMEOUT = 0.3
    mail_server.answers["."] = way
    started = time.monotonic()
    deliver()
    assert time.monotonic() - started < 5
    assert state() == ("failed", 1)
    assert Delivery.objects.get().last_error.startswith(UNKNOWN_OUTCOME)
    make_due()
    assert deliver() == 0
    assert len(mail_server.mails) == 1 and len(emitted("notification.failed")) == 1


def test_a_goodbye_that_fails_changes_nothing(waiting, mail_server):
    mail_server.answers["QUIT"] = "drop"
    deliver()
    assert state() == ("sent", 1)


@pytest.mark.parametrize("way", ["hang", "drop"])
def test_a_server_that_does_not_greet_has_sent_nothing(waiting, mail_server, settings, way):
    settings.EMAIL_TIMEOUT = 0.3
    mail_server.answers["greeting"] = way
    deliver()
    assert state() == ("pending", 1)
    assert Delivery.objects.get().last_error.startswith("The mail server was not reached")


def test_a_server_that_is_away_is_waited_for(waiting, mail_server):
    mail_server.close()
    deliver()
    assert state() == ("pending", 1)


@pytest.mark.parametrize("setting", [{"EMAIL_HOST": "mail..example.com"}, {"EMAIL_HOST": "x" * 64 + ".example.com"}])
def test_nothing_is_lost_while_a_setting_is_wrong(waiting, mail_server, settings, setting):
    for name, value in setting.items():
        setattr(settings, name, value)
    deliver()
    assert state() == ("pending", 1)


def test_no_header_is_injected_into_a_mail(bob, mail_server):
    document_failed(bob, title="Plan\r\nBcc: eve@example.com\r\nX-Evil: yes\r\n\r\n<b>body</b>")
    deliver()
    [mail] = mail_server.mails
    assert mail["Bcc"] is None and mail["X-Evil"] is None
    assert mail["Subject"].startswith("Document could not be read: Plan Bcc: eve@example.com X-Evil: yes")
    assert mail_server.recipients == ["bob@example.com"]


def test_nor_by_what_is_in_the_database(waiting, mail_server):
    Delivery.objects.update(subject="Plan\r\nBcc: eve@example.com")
    deliver()
    assert mail_server.mails[0]["Bcc"] is None and mail_server.recipients == ["bob@example.com"]


@pytest.mark.parametrize("address", ["", "bob", "bob@example.com\r\nRCPT TO:<eve@example.com>", "a@b, eve@example.com"])
def test_an_address_that_is_none(waiting, mail_server, bob, address):
    User.objects.filter(id=bob.id).update(email=address)
    deliver()
    assert state() == ("failed", 1) and mail_server.mails == [] and mail_server.recipients == []


@pytest.mark.parametrize("change", ["inactive", "moved"])
def test_who_is_not_active_in_the_tenant_by_then_gets_nothing(waiting, mail_server, bob, charlie, change):
    changes = {"is_active": False} if change == "inactive" else {"tenant": charlie.tenant}
    User.objects.filter(id=bob.id).update(**changes)
    deliver()
    assert state() == ("failed", 1) and mail_server.mails == []
    assert Delivery.objects.get().last_error == "The user is not active in the tenant any more."


def test_the_address_is_that_of_the_time_it_is_sent(waiting, mail_server, bob):
    User.objects.filter(id=bob.id).update(email="bob@new.example.com")
    deliver()
    assert mail_server.mails[0]["To"] == "bob@new.example.com"
