"""The chunks' vectors in Milvus: one collection for each embedder, in which each tenant finds its own alone.

Where Milvus is, MILVUS_URI says:

- `http://host:19530`: a Milvus server, for production.
- Of `make up`, the same protocol: Milvus Lite as a process of its own, `python -m milvus_lite server`, whose data lies
  in the data directory. Its files can be open in one process at a time (a lock in the directory sees to it), and here
  the web workers search while the consumer writes; so one process holds the files, and all others talk to it over
  gRPC. With `--max-workers 1`, because Milvus Lite promises nothing to writes at the same time.
- a path that ends with `.db`: Milvus Lite within this very process, for a shell or a test. A second process that opens
  it gets VectorsUnavailable.

After a restart Milvus Lite has its collections, but not loaded: what meets that loads them and goes on.
"""

import logging
import os
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from django.utils.text import slugify

from monitoring.milvus import observe_milvus

from .conf import knowledge_settings
from .embedding import Embedder

T = TypeVar("T")

WRITE_SECONDS = 10.0
"""For one request that writes. A document's row is locked meanwhile."""
CONNECT_SECONDS = 2.0
_ROWS_AT_ONCE = 500  # with the longest chunks and vectors of 3,072 numbers, 10 to 20 MB; a server takes 64 MB
_AWAY_SECONDS = 1.0
_NOT_FOUND, _NOT_LOADED = 100, 101  # Milvus' codes


class VectorsUnavailable(Exception):
    """Milvus is away, or refuses what it is asked. To try again later may help; nothing is lost."""


@dataclass(frozen=True)
class Chunk:
    """A piece of a document, and its vector. `position` counts from 0."""

    position: int
    text: str
    vector: Sequence[float]


@dataclass(frozen=True)
class Hit:
    """A chunk that was found. `score`: the cosine between its vector and that of the query, -1 to 1."""

    document_id: UUID
    position: int
    text: str
    score: float


class VectorStore:
    """Milvus, as this process sees it. For all threads; its client is made with the first use."""

    def __init__(self, uri: str, token: str, prefix: str) -> None:
        """`prefix`: the beginning of the names of its collections."""
        self._uri = uri
        self._token = token
        self._prefix = prefix
        self._lock = threading.Lock()
        self._client: Any = None
        self._known: set[str] = set()  # collections that were there when last asked
        self._away_until = float("-inf")

    def collection(self, embedder: Embedder) -> str:
        """The name of the collection for an embedder's vectors."""
        model = slugify(embedder.name)[:100]
        if model != embedder.name:  # BAAI/bge-m3: other names may come to the same
            model += f"_{zlib.crc32(embedder.name.encode()):08x}"
        return f"{self._prefix}_{model.replace('-', '_')}_{embedder.dimension}"

    def prepare(self, embedder: Embedder) -> str:
        """Make the collection for an embedder's vectors, unless it is there; return its name.

        Raises VectorsUnavailable.
        """
        collection = self.collection(embedder)

        def write(client: Any) -> None:
            if not client.has_collection(collection, timeout=WRITE_SECONDS):
                _create(client, collection, embedder.dimension)

        self._do(write, WRITE_SECONDS)
        return collection

    def replace(self, collection: str, *, tenant_id: UUID, document_id: UUID, chunks: Sequence[Chunk]) -> None:
        """Make these the chunks of a document, in a collection that is prepared. The same once more changes nothing.

        Raises VectorsUnavailable.
        """

        def row(chunk: Chunk) -> dict[str, Any]:
            return {
                "id": f"{document_id}:{chunk.position}",
                "tenant_id": str(tenant_id),
                "document_id": str(document_id),
                "position": chunk.position,
                "text": chunk.text,
                "vector": list(chunk.vector),
            }

        def write(client: Any) -> None:
            for start in range(0, len(chunks), _ROWS_AT_ONCE):
                rows = [row(chunk) for chunk in chunks[start : start + _ROWS_AT_ONCE]]
                client.upsert(collection, rows, timeout=WRITE_SECONDS)
            # What an earlier indexing, with smaller chunks, has left.
            left = f'document_id == "{document_id}" and position >= {len(chunks)}'
            _loaded(client, collection, lambda: client.delete(collection, filter=left, timeout=WRITE_SECONDS))

        self._do(write, WRITE_SECONDS)

    def remove(self, document_id: UUID) -> None:
        """Remove a document's chunks from every collection of ours, also that of an earlier embedder.

        Of one that has none, nothing. Raises VectorsUnavailable.
        """

        def write(client: Any) -> None:
            for name in client.list_collections(timeout=WRITE_SECONDS):
                if name.startswith(f"{self._prefix}_"):
                    self._remove_from(client, name, document_id)

        self._do(write, WRITE_SECONDS)

    def _remove_from(self, client: Any, collection: str, document_id: UUID) -> None:
        condition = f'document_id == "{document_id}"'
        _loaded(client, collection, lambda: client.delete(collection, filter=condition, timeout=WRITE_SECONDS))

    def search(
        self, collection: str, *, tenant_id: UUID, vector: Sequence[float], limit: int, timeout_seconds: float
    ) -> list[Hit]:
        """Return the tenant's chunks that are nearest, the best first; none when nothing was indexed yet.

        Raises VectorsUnavailable.
        """
        deadline = time.monotonic() + timeout_seconds

        def find(client: Any) -> Any:
            return client.search(
                collection,
                data=[list(vector)],
                # A UUID: there is nothing in it that could be more than a value.
                filter=f'tenant_id == "{UUID(str(tenant_id))}"',
                limit=limit,
                output_fields=["document_id", "position", "text"],
                timeout=max(deadline - time.monotonic(), 0.01),
                consistency_level="Bounded",
            )

        def ask(client: Any) -> Any:
            # To search what is not there would count as a search that failed.
            if collection not in self._known:
                if not client.has_collection(collection, timeout=max(deadline - time.monotonic(), 0.01)):
                    return []
                self._known.add(collection)
            try:
                return _loaded(client, collection, lambda: find(client), deadline=deadline)[0]
            except milvus().MilvusException as error:
                if error.code == _NOT_FOUND:
                    self._known.discard(collection)
                    return []
                raise

        found = self._do(ask, timeout_seconds)
        return [
            Hit(UUID(row["entity"]["document_id"]), row["entity"]["position"], row["entity"]["text"], row["distance"])
            for row in found
        ]

    def close(self) -> None:
        """Close the client; the next use makes a new one."""
        with self._lock:
            if self._client is not None:
                self._client.close()
            self._client, self._away_until = None, float("-inf")

    def _do(self, work: Callable[[Any], T], timeout_seconds: float) -> T:
        import grpc

        try:
            return work(self._connected(timeout_seconds))
        except (milvus().MilvusException, grpc.RpcError, grpc.FutureTimeoutError) as error:
            # Its text may quote what was sent.
            code = getattr(error, "code", "")
            raise VectorsUnavailable(f"{type(error).__name__} {code() if callable(code) else code}".strip()) from None

    def _connected(self, timeout_seconds: float) -> Any:
        """The client. While Milvus is away one thread asks again, about once a second; all others know at once."""
        client = self._client
        if client is not None:
            return client
        if time.monotonic() < self._away_until or not self._lock.acquire(timeout=timeout_seconds):
            raise VectorsUnavailable("Milvus was away a moment ago")
        try:
            if self._client is None:
                if time.monotonic() < self._away_until:
                    raise VectorsUnavailable("Milvus was away a moment ago")
                self._client = self._connect(timeout_seconds)
            return self._client
        except Exception:
            self._away_until = time.monotonic() + _AWAY_SECONDS
            raise
        finally:
            self._lock.release()

    def _connect(self, timeout_seconds: float) -> Any:
        if self._uri.endswith(".db"):
            Path(self._uri).parent.mkdir(parents=True, exist_ok=True)
        seconds = min(timeout_seconds, CONNECT_SECONDS)  # of this and of every later connecting
        # A server that expects no pings of an idle client, as Milvus Lite's, hangs up on it after the fourth, also
        # when it has just asked something.
        options = {"grpc.keepalive_permit_without_calls": False}
        try:
            client = milvus().MilvusClient(self._uri, token=self._token, timeout=seconds, grpc_options=options)
        except milvus().MilvusException as error:
            raise VectorsUnavailable(error.message) from None  # it names the server; nothing was sent yet
        return observe_milvus(client)


def _create(client: Any, collection: str, dimension: int) -> None:
    pymilvus = milvus()
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("id", pymilvus.DataType.VARCHAR, is_primary=True, max_length=64)
    schema.add_field("tenant_id", pymilvus.DataType.VARCHAR, max_length=36, is_partition_key=True)
    schema.add_field("document_id", pymilvus.DataType.VARCHAR, max_length=36)
    schema.add_field("position", pymilvus.DataType.INT64)
    schema.add_field("text", pymilvus.DataType.VARCHAR, max_length=65_535)
    schema.add_field("vector", pymilvus.DataType.FLOAT_VECTOR, dim=dimension)
    indexes = client.prepare_index_params()
    indexes.add_index("vector", index_type="AUTOINDEX", metric_type="COSINE")
    try:
        # Strong: a deletion by a condition sees all that was written before it.
        client.create_collection(
            collection, schema=schema, index_params=indexes, consistency_level="Strong", timeout=WRITE_SECONDS
        )
    except pymilvus.MilvusException:
        if not client.has_collection(collection, timeout=WRITE_SECONDS):  # else another process was quicker
            raise


def _loaded(client: Any, collection: str, call: Callable[[], T], *, deadline: float | None = None) -> T:
    """Call; when the collection is not loaded, load it and call again."""
    try:
        return call()
    except milvus().MilvusException as error:
        if error.code != _NOT_LOADED:
            raise
    seconds = WRITE_SECONDS if deadline is None else max(deadline - time.monotonic(), 0.01)
    client.load_collection(collection, timeout=seconds)
    return call()


@lru_cache(maxsize=1)
def milvus() -> Any:
    """The package pymilvus: imported with the first use, as that takes more than a second.

    It is quiet: it would log each error with its traceback, several times, where we say in one line what it means.
    """
    import pymilvus

    for name in list(logging.root.manager.loggerDict):
        if name == "pymilvus" or name.startswith("pymilvus."):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    return pymilvus


def vector_store() -> VectorStore:
    """The store that the settings name: one for each process, as no client outlives a fork."""
    conf = knowledge_settings()
    return _store_of(os.getpid(), conf.milvus_uri, conf.milvus_token, conf.collection)


@lru_cache(maxsize=8)
def _store_of(pid: int, uri: str, token: str, prefix: str) -> VectorStore:
    return VectorStore(uri, token, prefix)
