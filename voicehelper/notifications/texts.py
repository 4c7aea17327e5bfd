"""What notifications say: Django templates, and the user's words in them."""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from django.template import Context, Engine, engines
from django.template.backends.django import DjangoTemplates

LINE_MAX_CHARS = 200
SUBJECT_MAX_CHARS = 250
_TURNS_TEXT_AROUND = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def line(text: str, max_chars: int = LINE_MAX_CHARS) -> str:
    """A user's words as one line of at most so many characters: nothing that breaks, ends or reverses a line.

    So it can stand in the header of a mail.
    """
    one = " ".join(text.split())
    one = "".join(sign for sign in one if unicodedata.category(sign) not in ("Cc", "Cs"))
    one = "".join(sign for sign in one if sign not in _TURNS_TEXT_AROUND)
    return one if len(one) <= max_chars else one[: max_chars - 1].rstrip() + "…"


@dataclass(frozen=True)
class Texts:
    """What one notification says. `subject` is one line; `email_html` is safe to show."""

    subject: str
    body: str
    email_text: str
    email_html: str


def render(kind: str, context: Mapping[str, Any]) -> Texts:
    """Fill in a kind's templates. Raises TemplateDoesNotExist for a kind that has none."""
    subject = line(_text(f"{kind}/subject.txt", context), SUBJECT_MAX_CHARS)
    body = _text(f"{kind}/body.txt", context)
    whole = {**context, "subject": subject, "body": body}
    html = _engine().get_template(f"notifications/{kind}/email.html").render(Context(whole))
    return Texts(subject, body, _text("email.txt", whole), str(html))


def _text(name: str, context: Mapping[str, Any]) -> str:
    """A template of plain text, where nothing is to be escaped."""
    template = _engine().get_template(f"notifications/{name}")
    return str(template.render(Context(dict(context), autoescape=False))).strip()


def _engine() -> Engine:
    return cast(DjangoTemplates, engines["django"]).engine
