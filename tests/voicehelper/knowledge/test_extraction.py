import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from voicehelper.knowledge import extraction
from voicehelper.knowledge.extraction import UnreadableDocument, extract, inspect, sniff

from .conftest import eventually
from .files import PLAIN, encrypted, pdf, pdf_of

PDF = "application/pdf"


@pytest.mark.parametrize(
    ("data", "name", "declared", "is_type"),
    [
        (b"Hello", "a.txt", "text/plain", "text/plain"),
        (b"Hello", "a.pdf", PDF, "text/plain"),  # neither name nor declaration make it one
        (b"# Hello", "a.md", "", "text/markdown"),
        (b"# Hello", "A.MARKDOWN", "application/octet-stream", "text/markdown"),
        (b"# Hello", "a", "text/markdown", "text/markdown"),
        (pdf("Hello"), "a.txt", "text/plain", PDF),
        (b"\n\n" + pdf("Hello"), "a", "", PDF),
        (b"something\xff before it\n" + pdf("Hello"), "a", "", PDF),
        (b"A PDF begins with %PDF-1.4.", "a.txt", "", "text/plain"),
        ("\ufeffHällo".encode(), "a.txt", "", "text/plain"),
    ],
)
def test_the_type_is_told_by_the_bytes(data, name, declared, is_type):
    assert sniff(data, file_name=name, declared_type=declared) == is_type


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b" \n\t", "no text"),
        (b"\xef\xbb\xbf", "empty"),
        ("Hällo".encode("latin-1"), "byte 2 is not"),
        ("Hello".encode("utf-16"), "UTF-16"),
        (b"PK\x03\x04\x00\x00", "NUL"),
        (b"\x89PNG\r\n\x1a\n", "neither a PDF nor text"),
    ],
)
def test_what_is_no_text_is_refused_with_the_reason(data, says):
    with pytest.raises(UnreadableDocument, match=says):
        sniff(data, file_name="a.txt", declared_type="text/plain")


def test_a_text_is_taken_as_it_is():
    assert extract("\ufeffHällo\r\n".encode(), "text/plain") == "Hällo\r\n"
    assert inspect(b"Hello", "text/plain") is None


def test_a_pdf_gives_its_pages_and_text():
    data = pdf("Elephants are large", "Mice are small")
    assert inspect(data, PDF) == 2
    assert extract(data, PDF) == "Elephants are large\n\nMice are small"


def test_a_pdf_with_a_password_is_refused_and_one_without_is_read():
    with pytest.raises(UnreadableDocument, match="password"):
        inspect(encrypted(pdf("Secret"), "tiger"), PDF)
    assert extract(encrypted(pdf("For everybody"), ""), PDF) == "For everybody"


def test_a_cipher_that_cannot_be_read_is_told_at_once_and_is_no_damage():
    data = encrypted(pdf("For everybody"), "", says_aes=True)
    for read in (inspect, extract):
        with pytest.raises(UnreadableDocument, match="encrypted or packed"):
            read(data, PDF)


@pytest.mark.parametrize("data", [b"%PDF-1.7\nand nothing else", pdf("Hello")[:200], b"%PDF-1.4\n%%EOF"])
def test_a_damaged_pdf(data):
    with pytest.raises(UnreadableDocument, match="damaged"):
        inspect(data, PDF)


def test_a_pdf_without_text_tells_of_ocr():
    data = pdf_of([b"0 0 m 10 10 l S"])
    assert inspect(data, PDF) == 1
    with pytest.raises(UnreadableDocument, match="OCR"):
        extract(data, PDF)


@pytest.mark.parametrize("read", [inspect, extract])
def test_a_pdf_with_too_many_pages(change, read):
    change(max_pages=100)
    with pytest.raises(UnreadableDocument, match="has 101 pages; 100 are allowed"):
        read(pdf_of([PLAIN % b"Again"], kids=101), PDF)


def test_a_pdf_with_too_much_text(change):
    change(max_chars=30)
    with pytest.raises(UnreadableDocument, match="more than 30 characters"):
        extract(pdf("Elephants are large", "Mice are small"), PDF)


def test_a_bomb_costs_the_time_that_is_allowed_and_no_more(change):
    # 25 kB that unfold to 24 MB of drawing, which takes a minute to read.
    bomb = pdf_of([b"BT /F1 1 Tf (a) Tj ET\n" * 1_100_000], is_packed=True)
    assert len(bomb) < 100_000
    change(pdf_timeout_seconds=1.5)
    started = time.monotonic()
    with pytest.raises(UnreadableDocument, match=r"longer than 1\.5 seconds|more memory"):
        extract(bomb, PDF)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("number", "outcome"), [(signal.SIGKILL, "more memory"), (signal.SIGTERM, "ended by SIGTERM: it is tried again")]
)
def test_where_memory_runs_out_the_reader_ends_and_it_is_the_files_fault(number, outcome):
    bomb = pdf_of([b"BT /F1 1 Tf (a) Tj ET\n" * 1_100_000], is_packed=True)
    outcomes = []

    def read() -> None:
        try:
            extract(bomb, PDF)
        except (UnreadableDocument, RuntimeError) as error:
            outcomes.append(str(error))

    def reader() -> psutil.Process | None:
        children = psutil.Process().children()
        return next((child for child in children if str(extraction._PROGRAM) in child.cmdline()), None)

    thread = threading.Thread(target=read)
    thread.start()
    eventually(reader, "the PDF is being read")
    score = Path(f"/proc/{reader().pid}/oom_score_adj")
    eventually(lambda: score.read_text() == "1000\n", "the system would end it first")
    reader().send_signal(number)
    thread.join(20)
    assert len(outcomes) == 1 and outcome in outcomes[0]


def test_the_reader_sees_no_secret(monkeypatch, tmp_path):
    program = tmp_path / "program.py"
    program.write_text("""import json, os; print(json.dumps({"text": str(dict(os.environ))}))""")
    monkeypatch.setattr(extraction, "_PROGRAM", program)
    monkeypatch.setenv("DJANGO_SECRET_KEY", "tiger")
    assert "tiger" not in extract(pdf("Hello"), PDF)


def test_more_memory_than_is_allowed_is_not_taken(change):
    change(pdf_memory_mb=16)  # too little even for a small one
    with pytest.raises(UnreadableDocument, match="more memory"):
        extract(pdf("Elephants"), PDF)


def test_a_stream_that_unfolds_to_more_than_it_may(change):
    with pytest.raises(UnreadableDocument, match=r"more memory|damaged"):
        extract(pdf_of([b"\0" * 300_000_000], is_packed=True), PDF)
