import re
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from voicehelper.knowledge.chunking import chunks, spans

WORDS = st.sampled_from(
    ["a", "ü", "word", "sentence.", "# ", "\n", "\n\n", "  ", "\n## Heading\n", "x" * 70, "。", "👋"]
)
TEXTS = st.one_of(st.text(max_size=400), st.lists(WORDS, max_size=120).map(" ".join), st.lists(WORDS).map("".join))
SIZES = st.integers(8, 80).flatmap(lambda most: st.tuples(st.just(most), st.integers(0, most // 4)))


def cut(text: str, most: int, overlap: int = 0, *, has_headings: bool = True) -> list[str]:
    return list(chunks(text, most_chars=most, overlap_chars=overlap, has_headings=has_headings))


@settings(max_examples=300, deadline=None)
@given(TEXTS, SIZES, st.booleans())
def test_every_chunk_is_bounded_and_nothing_is_lost(text, sizes, has_headings):
    most, overlap = sizes
    places = list(spans(text, most_chars=most, overlap_chars=overlap, has_headings=has_headings))
    covered = 0  # all of the text before here is in some piece, or is white space
    for start, end in places:
        piece = text[start:end]
        assert 0 < len(piece) <= most and piece == piece.strip()
        assert text[covered:start].strip() == ""
        assert end > covered  # it has something of its own
        assert covered - start <= overlap
        covered = end
    assert text[covered:].strip() == ""
    assert cut(text, most, overlap, has_headings=has_headings) == [text[start:end] for start, end in places]


@settings(max_examples=100, deadline=None)
@given(TEXTS, SIZES)
def test_it_is_deterministic_and_makes_few(text, sizes):
    most, overlap = sizes
    pieces = cut(text, most, overlap)
    assert pieces == cut(text, most, overlap)
    # Each but the last goes on by a quarter of the size at least, with what white space is taken off.
    assert len(pieces) <= 1 + 4 * len(text) / most


def test_nothing_makes_no_chunk():
    assert cut("", 100) == cut(" \n\t\n ", 100) == []


def test_a_short_text_is_one():
    assert cut("  Hello\n\nworld ", 100) == ["Hello\n\nworld"]


def test_it_ends_where_the_text_does():
    paragraph = "One sentence. Another one."
    assert cut(f"{paragraph}\n\n{paragraph} And more.", 40) == [paragraph, f"{paragraph} And more."]
    assert cut("First sentence here. Second sentence here.", 30) == ["First sentence here.", "Second sentence here."]
    assert cut("first words second words third", 20) == ["first words second", "words third"]
    assert cut("x" * 50, 20) == ["x" * 20, "x" * 20, "x" * 10]


def test_a_heading_begins_a_chunk_of_its_own_without_repetition():
    text = "Introduction, which is long.\n\nMore of it.\n# Elephants\nThey are large."
    assert cut(text, 60, 15) == ["Introduction, which is long.\n\nMore of it.", "# Elephants\nThey are large."]
    # In a plain text it is no heading.
    assert cut(text, 60, 15, has_headings=False)[0].endswith("# Elephants")


def test_what_stands_around_a_cut_is_whole_in_one_of_the_two():
    text = " ".join(f"word{number}" for number in range(200))
    pieces = cut(text, 100, 25)
    for one, two in pairwise(pieces):
        shared = two.split()[0]
        assert shared in one.split()
    assert all(re.fullmatch(r"(word\d+ ?)+", piece) for piece in pieces)
