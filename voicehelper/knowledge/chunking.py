"""A text in chunks: what is embedded, indexed and found as a whole."""

import re
from collections.abc import Iterator

_HEADING = re.compile(r"^#{1,6}[ \t]", re.MULTILINE)
_LONGEST_MARK = len("###### ")
_PARAGRAPH = re.compile(r"\n[ \t\r]*\n\s*")
_SENTENCE = re.compile(r"[.!?…][)\]\"'”’]*\s+|[。！？]|\n")  # noqa: RUF001  (those of Chinese)
_SPACE = re.compile(r"\s+")
_WORD = re.compile(r"\S+")


def chunks(text: str, *, most_chars: int, overlap_chars: int, has_headings: bool) -> Iterator[str]:
    """Yield pieces of a text, in order, each of at most `most_chars` characters and none of them blank.

    A piece is as long as it may be, but ends where the text itself does: before a heading (in Markdown:
    `has_headings`), else after a paragraph, a sentence, a line, a word, and only if there is none of these in its
    second half, anywhere. The next piece repeats up to `overlap_chars` of it, in whole words, so that what stands
    around a cut is found as a whole in one of the two; not across a heading, where another subject begins.

    No character is left out but white space at the ends of a piece. `overlap_chars` is at most a quarter of
    `most_chars`.
    """
    for start, end in spans(text, most_chars=most_chars, overlap_chars=overlap_chars, has_headings=has_headings):
        yield text[start:end]


def spans(text: str, *, most_chars: int, overlap_chars: int, has_headings: bool) -> Iterator[tuple[int, int]]:
    """Where the chunks begin and end in the text."""
    start, last = _trimmed(text, 0, len(text))
    while start < last:
        end, is_heading = _end(text, start, last, most_chars, has_headings)
        trimmed = _trimmed(text, start, end)
        if trimmed[0] < trimmed[1]:
            yield trimmed
        if end == last:
            return
        start = end if is_heading else _overlapped(text, start, end, overlap_chars)


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """The same span without white space at its ends."""
    piece = text[start:end]
    return end - len(piece.lstrip()), start + len(piece.rstrip())


def _end(text: str, start: int, last: int, most_chars: int, has_headings: bool) -> tuple[int, bool]:
    """Where the piece that begins at `start` ends, and whether a heading follows."""
    most = start + most_chars
    if most >= last:
        return last, False
    least = start + (most_chars + 1) // 2
    if has_headings:
        headings = [found.start() for found in _HEADING.finditer(text, least, most + _LONGEST_MARK)]
        if headings and headings[0] <= most:
            return max(place for place in headings if place <= most), True
    for rule in (_PARAGRAPH, _SENTENCE, _SPACE):
        # What is matched at the very end may go on beyond it; it is cut there all the same.
        if ends := [found.end() for found in rule.finditer(text, least, most)]:
            return ends[-1], False
    return most, False


def _overlapped(text: str, start: int, end: int, overlap_chars: int) -> int:
    """Where the next piece begins: at a word within the last `overlap_chars` before `end`, else at `end`."""
    earliest = max(end - overlap_chars, start + 1)
    for word in _WORD.finditer(text, earliest, end):
        if text[word.start() - 1].isspace():
            return word.start()
    return end
