"""A program that reads a PDF from its standard input, and is killed when it takes too long: see `extraction.py`.

    python -I pdf_text.py inspect|text MOST_PAGES MOST_CHARS MEMORY_MB CPU_SECONDS

It writes one JSON object: `pages` and, for `text`, `text`; or `error`: "encrypted", "unsupported", "damaged",
"too_many_pages", "too_much_text" or "too_much_memory". It knows nothing of Django, so that it starts quickly.
"""

import contextlib
import io
import json
import resource
import sys
from typing import Any


def main(mode: str, most_pages: int, most_chars: int, memory_mb: int, cpu_seconds: int) -> None:
    """Read, and write what was found. The limits are this process's own: a PDF can be a bomb."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb * 1024 * 1024,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:  # Linux
        score.write("1000")  # where memory runs out, this process ends and not who started it
    try:
        answer = _read(mode, most_pages, most_chars)
    except MemoryError:
        answer = {"error": "too_much_memory"}
    except Exception:  # pypdf raises all kinds of them for what is no proper PDF
        answer = {"error": "damaged"}
    sys.stdout.write(json.dumps(answer))


def _read(mode: str, most_pages: int, most_chars: int) -> dict[str, Any]:
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, LimitReachedError

    reader = PdfReader(io.BytesIO(sys.stdin.buffer.read()))
    try:
        # Many are encrypted with an empty password, for anybody to read.
        if reader.is_encrypted and not reader.decrypt(""):
            return {"error": "encrypted"}
        return _read_pages(reader, mode, most_pages, most_chars)
    except LimitReachedError:
        return {"error": "too_much_memory"}
    except DependencyError:  # AES takes a library that is not there, and so does Brotli
        return {"error": "unsupported"}


def _read_pages(reader: Any, mode: str, most_pages: int, most_chars: int) -> dict[str, Any]:
    pages = len(reader.pages)
    if pages > most_pages:
        return {"error": "too_many_pages", "pages": pages}
    if mode == "inspect":
        if reader.is_encrypted and pages:
            reader.pages[0].extract_text()  # whether it can be decrypted
        return {"pages": pages}
    texts, chars = [], 0
    for page in reader.pages:
        text = page.extract_text()
        chars += len(text) + 2
        if chars > most_chars:
            return {"error": "too_much_text"}
        texts.append(_clean(text))
    return {"pages": pages, "text": "\n\n".join(texts)}


def _clean(text: str) -> str:
    """Text that can be stored: pairs of surrogates joined, single ones replaced, no NUL."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", " ")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:6]))
