"""What notifications say, whatever users have written."""

from pathlib import Path

import pytest
from django.conf import settings

from tests.voicehelper.notifications.conftest import conversation_failed, document_failed
from voicehelper import notifications
from voicehelper.notifications.kinds import KINDS
from voicehelper.notifications.models import Delivery, Notification
from voicehelper.notifications.texts import line, render

HOSTILE = '<script>alert("x")</script> & {{ settings.SECRET_KEY }}{% now "Y" %}'
TEMPLATES = Path(notifications.__file__).parent / "templates/notifications"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Plan", "Plan"),
        ("", ""),
        ("  two \t words  ", "two words"),
        ("Plan\r\nBcc: all@example.com", "Plan Bcc: all@example.com"),
        ("a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g", "a b c d e f g"),
        ("a\x00b\x1b[31mc\x7f", "ab[31mc"),
        ("safe\u202egpj.exe", "safegpj.exe"),
        ("👩\u200d👩\u200d👧 family", "👩\u200d👩\u200d👧 family"),
        ("x" * 200, "x" * 200),
        ("x" * 201, "x" * 199 + "…"),
    ],
)
def test_a_line(text, expected):
    assert line(text) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_texts(kind):
    texts = render(kind, {"title": "Plan", "tenant": "Demo", "value_text": "$1", "day": "2026-01-31"})
    assert texts.subject and texts.body
    assert texts.body in texts.email_text and "Demo" in texts.email_text and "Demo" in texts.email_html
    assert texts.email_html.startswith("<!doctype html>") and texts.email_html.count("<h1") == 1
    assert texts.subject in texts.email_html


def test_no_template_is_left_over():
    assert {path.name for path in TEMPLATES.iterdir() if path.is_dir()} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_users_words_are_escaped_in_html_and_not_in_text(kind):
    words = dict.fromkeys(("title", "mode", "reason", "error", "tenant", "day", "value_text", "limit_text"), HOSTILE)
    texts = render(kind, words)
    assert "<script" not in texts.email_html and settings.SECRET_KEY not in texts.email_html
    assert "&lt;script&gt;" in texts.email_html and "&amp; {{ settings" in texts.email_html
    assert HOSTILE in texts.email_text and "&lt;" not in texts.email_text + texts.subject


def test_a_title_is_cut_and_stays_one_line_wherever_it_comes(bob):
    document_failed(bob, title="Plan\r\nBcc: all@example.com\r\n\r\n" + "x" * 9999, error="no\nline" * 999)
    delivery, notification = Delivery.objects.get(), Notification.objects.get()
    for subject in (delivery.subject, notification.subject):
        assert "\n" not in subject and "\r" not in subject and len(subject) <= 250
    assert max(map(len, notification.body.splitlines())) < 600 and len(delivery.body) < 1500


def test_a_conversations_title_is_escaped(bob):
    conversation_failed(bob, title="<b>Roadmap</b>")
    assert "&lt;b&gt;Roadmap&lt;/b&gt;" in Delivery.objects.get().body_html


def test_a_subject_is_one_line_whatever_a_template_is_given():
    subject = render("document.failed", {"title": "Plan\r\nBcc: all@example.com" + "x" * 500}).subject
    assert subject.startswith("Document could not be read: Plan Bcc: all@example.com") and len(subject) == 250
