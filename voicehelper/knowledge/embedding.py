"""Texts as vectors, so that texts that say something similar are near each other.

Two embedders: the built-in one, which needs no network, and any OpenAI-compatible endpoint. Their vectors do not
compare: each has a collection of its own, so that after a change of settings nothing is found until
`manage.py index_documents` has indexed the documents anew.
"""

import re
import time
import unicodedata
import zlib
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from monitoring.openai_client import observe_openai

from .conf import KnowledgeSettings, knowledge_settings

_Numbers = NDArray[np.uint64]


class EmbedderUnavailable(Exception):
    """The embedder did not give what it was asked for. To try again later may help; nothing is lost."""


class EmbedderTooSlow(EmbedderUnavailable):
    """All of a document's chunks take longer than is allowed, and would do so again."""


class Embedder(Protocol):
    """`name` is part of the collection's name, `dimension` the length of every vector."""

    name: str
    dimension: int

    def embed(self, texts: Sequence[str], *, timeout_seconds: float | None = None) -> list[list[float]]:
        """Return a vector of length 1 for each of at most EMBEDDING_BATCH_SIZE texts, in order.

        `timeout_seconds`: None takes EMBEDDING_TIMEOUT_SECONDS. Raises EmbedderUnavailable.
        """


class HashedNgrams:
    """The built-in embedder: it counts words and groups of characters, and understands nothing.

    A text is folded (NFKC, case) and taken apart into its words, their groups of 3 to 5 characters, and, for the
    scripts that put no space between words, groups of two. Each is hashed to a place of the vector and a sign, and adds
    the root of how often it occurs, words three times as much. So texts are near each other that share words, also in
    other forms and with typing errors; a synonym is not found. It is deterministic on every machine, takes less than a
    millisecond for a chunk, and never fails.
    """

    name = "hashed_ngrams_1"

    _WORD_WEIGHT = 3.0
    _FIRST_WITHOUT_SPACES = 0x2E80  # CJK and what comes after it

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension

    def embed(self, texts: Sequence[str], *, timeout_seconds: float | None = None) -> list[list[float]]:
        return [self._vector(text) for text in texts]

    def _vector(self, text: str) -> list[float]:
        words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
        features = [self._spread([zlib.crc32(word.encode()) for word in words], seed=1)]
        weights = [self._WORD_WEIGHT]
        characters = np.frombuffer(f" {' '.join(words)} ".encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
        for size in (2, 3, 4, 5):
            features.append(self._groups(characters, size))
            weights.append(1.0)
        vector = np.zeros(self.dimension)
        for hashes, weight in zip(features, weights, strict=True):
            found, counts = np.unique(hashes, return_counts=True)
            signs = np.where(found >> np.uint64(63), 1.0, -1.0)
            places = (found % np.uint64(self.dimension)).astype(np.intp)
            vector += np.bincount(places, weights=signs * np.sqrt(counts) * weight, minlength=self.dimension)
        length = float(np.linalg.norm(vector))
        if length == 0.0:  # no letter in it; there is no direction without length
            vector[0] = length = 1.0
        normalised: list[float] = (vector / length).tolist()
        return normalised

    def _groups(self, characters: _Numbers, size: int) -> _Numbers:
        count = len(characters) - size + 1
        if count < 1:
            return np.zeros(0, dtype=np.uint64)
        sums = np.zeros(count, dtype=np.uint64)
        for at in range(size):
            sums = sums * np.uint64(0x100000001B3) + characters[at : at + count]
        if size == 2:
            is_dense = characters >= np.uint64(self._FIRST_WITHOUT_SPACES)
            sums = sums[is_dense[:-1] & is_dense[1:]]
        return self._spread(sums, seed=size)

    def _spread(self, values: Any, *, seed: int) -> _Numbers:
        """Mix the bits of numbers (the end of SplitMix64), so that each of them depends on every other one."""
        mixed: _Numbers = np.asarray(values, dtype=np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


class OpenAICompatible:
    """An endpoint that answers `POST /embeddings` as OpenAI's does. Time, tokens and errors are counted as an LLM's."""

    def __init__(self, conf: KnowledgeSettings) -> None:
        import openai  # half a second, for those alone who use it

        self.name = conf.embedding_model
        self.dimension = conf.embedding_dimension
        self._timeout_seconds = conf.embedding_timeout_seconds
        self._error = openai.OpenAIError
        client = openai.OpenAI(
            base_url=conf.embedding_base_url,
            api_key=conf.embedding_api_key or "none",  # many a local server wants none, the client wants one
            max_retries=0,  # who calls knows how much time there is
        )
        self._client = observe_openai(client, provider="embedding")

    def embed(self, texts: Sequence[str], *, timeout_seconds: float | None = None) -> list[list[float]]:
        try:
            answer = self._client.embeddings.create(
                model=self.name,
                input=list(texts),
                encoding_format="float",
                timeout=timeout_seconds or self._timeout_seconds,
            )
            vectors = [item.embedding for item in sorted(answer.data, key=lambda item: item.index)]
        except self._error as error:
            # The text of an error may quote what was sent.
            status = getattr(error, "status_code", None)
            raise EmbedderUnavailable(f"{type(error).__name__}{f' {status}' if status else ''}") from None
        except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
            raise EmbedderUnavailable(f"the answer is not understood ({type(error).__name__})") from None
        if len(vectors) != len(texts):
            raise EmbedderUnavailable(f"{len(texts)} texts were sent and {len(vectors)} vectors came")
        return [self._checked(vector) for vector in vectors]

    def _checked(self, vector: Sequence[float]) -> list[float]:
        try:
            numbers = np.asarray(vector, dtype=np.float64)
        except (TypeError, ValueError):
            raise EmbedderUnavailable("a vector holds something else than numbers") from None
        if numbers.shape != (self.dimension,):
            raise EmbedderUnavailable(
                f"a vector has {numbers.size} numbers, where EMBEDDING_DIMENSION says {self.dimension}"
            )
        with np.errstate(over="ignore"):
            length = float(np.linalg.norm(numbers))
        if not 0.0 < length < float("inf"):
            raise EmbedderUnavailable("a vector has no direction")
        normalised: list[float] = (numbers / length).tolist()
        return normalised


def embed_all(model: Embedder, texts: Sequence[str], *, most_seconds: float) -> list[Sequence[float]]:
    """Embed any number of texts, in batches. A vector takes 4 bytes a number, not the 32 of a list.

    Raises EmbedderUnavailable, EmbedderTooSlow when it is not done within `most_seconds` and a batch.
    """
    batch_size = knowledge_settings().embedding_batch_size
    deadline = time.monotonic() + most_seconds
    vectors: list[Sequence[float]] = []
    for start in range(0, len(texts), batch_size):
        if time.monotonic() >= deadline:
            raise EmbedderTooSlow(f"{start} of {len(texts)} chunks took more than {most_seconds:g} seconds")
        vectors += [array("f", vector) for vector in model.embed(texts[start : start + batch_size])]
    return vectors


def embedder() -> Embedder:
    """The embedder that the settings name."""
    return _embedder_of(knowledge_settings())


@lru_cache(maxsize=4)
def _embedder_of(conf: KnowledgeSettings) -> Embedder:
    return OpenAICompatible(conf) if conf.embedding_base_url else HashedNgrams(conf.embedding_dimension)
