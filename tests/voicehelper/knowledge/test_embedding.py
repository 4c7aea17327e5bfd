import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from voicehelper.knowledge.embedding import EmbedderTooSlow, EmbedderUnavailable, HashedNgrams, embed_all, embedder

BUILT_IN = HashedNgrams(256)


def near(one: str, two: str, model=BUILT_IN) -> float:
    a, b = model.embed([one, two])
    return sum(x * y for x, y in zip(a, b, strict=True))


@given(st.text(max_size=200), st.sampled_from([8, 256, 1000]))
def test_every_text_has_a_direction(text, dimension):
    [vector] = HashedNgrams(dimension).embed([text])
    assert len(vector) == dimension
    assert math.isclose(sum(x * x for x in vector), 1.0, rel_tol=1e-9)
    assert HashedNgrams(dimension).embed(["another", text])[1] == vector


def test_it_is_the_same_on_every_machine():
    [vector] = HashedNgrams(8).embed(["Hello, world"])
    assert [round(x, 6) for x in vector] == [
        *(0.171499, -0.514496, 0.171499, -0.342997, -0.171499, -0.171499, 0.171499, -0.685994)
    ]


def test_texts_that_share_words_are_near():
    question = "How large is an elephant?"
    assert near(question, "The elephant is a large animal.") > 0.3
    assert near(question, "The elephant is a large animal.") > 3 * abs(near(question, "Invoices are due in 14 days"))
    assert near("ELEPHANTS", "elephant") > 0.4  # case, and another form
    assert near("大象很大", "大象是最大的陆地动物") > 3 * abs(near("大象很大", "发票十四天内到期"))
    assert near("???", "!!!") == pytest.approx(1.0)  # no letter in either


def test_an_endpoint_is_asked_in_batches(endpoint):
    texts = ["one", "two", "three", "four", "five"]
    vectors = embed_all(embedder(), texts, most_seconds=20)
    assert endpoint.requests == [["one", "two"], ["three", "four"], ["five"]]
    assert set(endpoint.keys) == {"Bearer secret-key"}
    expected = HashedNgrams(endpoint.dimension).embed(texts)
    assert all(list(vector) == pytest.approx(wanted) for vector, wanted in zip(vectors, expected, strict=True))
    assert {vector.itemsize for vector in vectors} == {4}  # a long document has ten thousand


def test_the_time_for_all_is_bounded(endpoint):
    endpoint.seconds = 0.2
    with pytest.raises(EmbedderTooSlow, match=r"[24] of 20 chunks took more than 0\.3 seconds"):
        embed_all(embedder(), ["text"] * 20, most_seconds=0.3)
    assert len(endpoint.requests) <= 2


def test_what_it_uses_is_counted(endpoint):
    labels = {"provider": "embedding", "model": endpoint.model}
    embedder().embed(["one"])
    samples = [
        sample
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name == "llm_request_duration_seconds_count" and labels.items() <= sample.labels.items()
    ]
    assert samples and samples[0].value >= 1


@pytest.mark.parametrize("status", [400, 401, 429, 500])
def test_an_error_is_told_without_what_was_sent(endpoint, status):
    endpoint.fails_with = status
    with pytest.raises(EmbedderUnavailable, match=str(status)) as caught:
        embedder().embed(["private"])
    assert "private" not in str(caught.value)
    assert len(endpoint.requests) == 1  # it is not for the client to try again


def test_vectors_of_another_length_are_refused(endpoint):
    endpoint.dimension = 16
    with pytest.raises(EmbedderUnavailable, match="16 numbers, where EMBEDDING_DIMENSION says 32"):
        embedder().embed(["one"])


@pytest.mark.parametrize(
    "answer",
    [
        {},
        [],
        "nonsense",
        {"data": None},
        {"data": []},
        {"data": [{"index": 0, "embedding": [1.0] * 32}, {"index": 1, "embedding": [1.0] * 32}]},
        {"data": [{"index": 0}]},
        {"data": [{"index": 0, "embedding": None}]},
        {"data": [{"index": 0, "embedding": "AAAA"}]},
        {"data": [{"index": 0, "embedding": [[1.0] * 32]}]},
        {"data": [{"index": 0, "embedding": ["x"] * 32}]},
        {"data": [{"index": 0, "embedding": [0.0] * 32}]},
        {"data": [{"index": 0, "embedding": [math.nan] * 32}]},
        {"data": [{"index": 0, "embedding": [math.inf] * 32}]},
        {"data": [{"index": 0, "embedding": [1e308] * 32}]},
        {"data": [{"index": 0, "embedding": [10**400] * 32}]},
    ],
    ids=range(16),
)
def test_an_answer_that_makes_no_sense(endpoint, answer):
    endpoint.answers_with = answer
    with pytest.raises(EmbedderUnavailable):
        embedder().embed(["private"])


def test_one_that_hangs_is_not_waited_for(endpoint):
    endpoint.gate.clear()
    started = time.monotonic()
    with pytest.raises(EmbedderUnavailable, match="Timeout"):
        embedder().embed(["one"], timeout_seconds=0.3)
    assert time.monotonic() - started < 5


def test_one_that_is_away(endpoint, change):
    change(embedding_base_url="http://127.0.0.1:1/v1")
    with pytest.raises(EmbedderUnavailable, match="Connection"):
        embedder().embed(["one"])
