"""What is in an uploaded file: its type by its bytes, and its text.

A PDF is read by a process of its own (`pdf_text.py`) with limits of time, memory, pages and text: a few kilobytes of it
can unfold to gigabytes, or keep a processor busy for hours.
"""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path, PurePath
from typing import Any

from .conf import knowledge_settings
from .models import Document

_PROGRAM = Path(__file__).with_name("pdf_text.py")
_PDF_BEGINS_WITHIN = 1024  # bytes: readers put up with something before it
_MARKDOWN_ENDINGS = {".md", ".markdown", ".mdown"}
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_INSPECT_SECONDS = 10.0  # a request waits for it
_FROM_OUTSIDE = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}

_ERRORS = {
    "encrypted": "The PDF is protected by a password. Remove the protection and upload it again.",
    "unsupported": "The PDF is encrypted or packed in a way that cannot be read. Save it without and upload it again.",
    "damaged": "The PDF is damaged: it cannot be read.",
    "too_many_pages": "The PDF has {pages} pages; {max_pages} are allowed.",
    "too_much_text": "The PDF holds more than {max_chars} characters of text.",
    "too_much_memory": "The PDF is too complex: reading it takes more memory than is allowed.",
    "too_slow": "The PDF is too complex: reading it takes longer than {seconds:g} seconds.",
}
NO_TEXT = "There is no text in the document. One that was scanned needs text recognition (OCR) first."


class UnreadableDocument(Exception):
    """The file cannot be used, now or later. The text is for the person who uploaded it."""


def sniff(data: bytes, *, file_name: str, declared_type: str) -> str:
    """Return the content type of a file, told by its bytes: one of `Document.ContentType`.

    Name and declared type only tell Markdown from other text, which no byte does. Raises UnreadableDocument for what
    is neither PDF nor text in UTF-8, and for an empty file.
    """
    if not data:
        raise UnreadableDocument("The file is empty.")
    beginning = data[:_PDF_BEGINS_WITHIN]
    if beginning.lstrip().startswith(b"%PDF-"):
        return Document.ContentType.PDF
    try:
        text_of(data)
    except UnreadableDocument:
        if b"%PDF-" in beginning:
            return Document.ContentType.PDF
        raise
    is_markdown = PurePath(file_name).suffix.lower() in _MARKDOWN_ENDINGS or declared_type == "text/markdown"
    return Document.ContentType.MARKDOWN if is_markdown else Document.ContentType.TEXT


def inspect(data: bytes, content_type: str) -> int | None:
    """Return how many pages a PDF has; None for text. Raises UnreadableDocument for a PDF that cannot be read."""
    if content_type != Document.ContentType.PDF:
        return None
    pages: int = _read_pdf("inspect", data, min(_INSPECT_SECONDS, knowledge_settings().pdf_timeout_seconds))["pages"]
    return pages


def extract(data: bytes, content_type: str) -> str:
    """Return the text of a file. Raises UnreadableDocument when there is none that could be read within the limits."""
    if content_type != Document.ContentType.PDF:
        return text_of(data)
    text: str = _read_pdf("text", data, knowledge_settings().pdf_timeout_seconds)["text"]
    if not text.strip():
        raise UnreadableDocument(NO_TEXT)
    return text


def text_of(data: bytes) -> str:
    """Decode a text. Raises UnreadableDocument for what is not UTF-8, not text, or blank."""
    if data.startswith(_UTF_16):
        raise UnreadableDocument("The text is in UTF-16. Save it as UTF-8 and upload it again.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableDocument(
            f"The file is neither a PDF nor text in UTF-8: byte {error.start + 1} is not. Save it as UTF-8, or as PDF."
        ) from None
    if "\0" in text:
        raise UnreadableDocument("The file is neither a PDF nor text: it holds NUL characters.")
    if not text.strip():
        raise UnreadableDocument(NO_TEXT if text else "The file is empty.")
    return text


def _read_pdf(mode: str, data: bytes, seconds: float) -> dict[str, Any]:
    conf = knowledge_settings()
    limits = [conf.max_pages, conf.max_chars, conf.pdf_memory_mb, math.ceil(seconds)]
    try:
        done = subprocess.run(  # noqa: S603  (our own program, whose arguments are numbers)
            # It sees neither our environment, with its secrets, nor the working directory.
            [sys.executable, "-I", str(_PROGRAM), mode, *map(str, limits)],
            env={},
            input=data,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # warnings that quote the content
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        answer = {"error": "too_slow"}
    else:
        answer = _answer(done)
    if error := answer.get("error"):
        values = {"pages": answer.get("pages"), "max_pages": conf.max_pages, "max_chars": conf.max_chars}
        raise UnreadableDocument(_ERRORS[error].format(**values, seconds=seconds))
    return answer


def _answer(done: subprocess.CompletedProcess[bytes]) -> dict[str, Any]:
    if done.returncode == 0:
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer
    if -done.returncode in _FROM_OUTSIDE:
        raise RuntimeError(f"reading a PDF was ended by {signal.Signals(-done.returncode).name}: it is tried again")
    # Out of its time (SIGXCPU), ended by the system that ran out of memory (SIGKILL), or the interpreter gave up.
    return {"error": "too_slow" if done.returncode == -signal.SIGXCPU else "too_much_memory"}
