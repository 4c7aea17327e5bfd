"""Search in a tenant's documents."""

import hashlib
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from voicehelper.shared_cache import SharedOrOwnCache

from .conf import knowledge_settings
from .embedding import Embedder, EmbedderUnavailable, HashedNgrams, embedder
from .models import Document
from .vectors import VectorsUnavailable, milvus, vector_store

MAX_LIMIT = 50
MAX_QUERY_CHARS = 4_000
VECTOR_KEPT_SECONDS = 24 * 3600
"""How long a query's vector is in the cache: people of a tenant ask the same again."""

_cache = SharedOrOwnCache()


class SearchUnavailable(Exception):
    """Milvus or the embedder is away, or too slow. Who asks goes on without, or tries again."""


@dataclass(frozen=True)
class Found:
    """A chunk of a document. `score`: how near it is to the query, -1 to 1. `position` counts from 0."""

    document_id: UUID
    title: str
    position: int
    text: str
    score: float


def search(*, tenant_id: UUID, query: str, limit: int = 5, timeout_seconds: float | None = None) -> list[Found]:
    """Return the chunks of the tenant's documents that are nearest to the query, the best first.

    [] when the tenant has nothing indexed, or the query is blank. `limit`: 1 to MAX_LIMIT. Of the query, the first
    MAX_QUERY_CHARS count. `timeout_seconds`: how long it may take in all; None takes SEARCH_TIMEOUT_SECONDS. The
    first search of a process takes about a second more, in which the clients' packages are imported.

    Raises SearchUnavailable, ValueError for a limit out of range.
    """
    if not 1 <= limit <= MAX_LIMIT:
        raise ValueError(f"limit is {limit}; it must be from 1 to {MAX_LIMIT}")
    query = query.strip()[:MAX_QUERY_CHARS]
    if not query:
        return []
    milvus()
    store, model = vector_store(), embedder()
    deadline = time.monotonic() + (timeout_seconds or knowledge_settings().search_timeout_seconds)
    try:
        vector = _vector_of(query, model, tenant_id, deadline)
        hits = store.search(
            store.collection(model),
            tenant_id=tenant_id,
            vector=vector,
            # More than wanted: some may be of documents that are deleted, and whose vectors are about to be.
            limit=2 * limit,
            timeout_seconds=_left(deadline),
        )
    except (VectorsUnavailable, EmbedderUnavailable) as error:
        raise SearchUnavailable(f"{type(error).__name__}: {error}") from error
    # Whose a document is, the database says: no hit of another tenant's could come through.
    own = Document.objects.for_tenant(tenant_id).filter(id__in={hit.document_id for hit in hits})
    titles = dict(own.values_list("id", "title"))
    found = [
        Found(hit.document_id, titles[hit.document_id], hit.position, hit.text, hit.score)
        for hit in hits
        if hit.document_id in titles
    ]
    return found[:limit]


def _vector_of(query: str, model: Embedder, tenant_id: UUID, deadline: float) -> Sequence[float]:
    """The query's vector, out of the cache where an embedder takes time and money."""
    if isinstance(model, HashedNgrams):
        return model.embed([query])[0]
    # By tenant: how quick an answer is must not tell what others have asked.
    text = f"{tenant_id}\n{model.name}\n{model.dimension}\n{query}".encode("utf-8", "backslashreplace")
    key = f"query-vector:{hashlib.sha256(text).hexdigest()}"
    vector: Sequence[float] | None = _cache.get(key)
    if vector is None:
        vector = array("f", model.embed([query], timeout_seconds=_left(deadline))[0])
        _cache.set(key, vector, VECTOR_KEPT_SECONDS)
    return vector


def _left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise SearchUnavailable("it took too long")
    return seconds
