import re
import time
import uuid

import pytest
from prometheus_client import REGISTRY

from voicehelper.knowledge.embedding import HashedNgrams
from voicehelper.knowledge.vectors import Chunk, VectorStore, VectorsUnavailable, vector_store

from .conftest import eventually

EMBEDDER = HashedNgrams(32)
TENANT, OTHER = uuid.uuid4(), uuid.uuid4()


@pytest.fixture
def store(milvus) -> VectorStore:
    return vector_store()


def put(store: VectorStore, *texts: str, tenant=TENANT, document=None, embedder=EMBEDDER) -> uuid.UUID:
    document = document or uuid.uuid4()
    chunks = [Chunk(at, text, embedder.embed([text])[0]) for at, text in enumerate(texts)]
    store.replace(store.prepare(embedder), tenant_id=tenant, document_id=document, chunks=chunks)
    return document


def find(store: VectorStore, query: str, tenant=TENANT, *, limit=10, seconds=20.0, embedder=EMBEDDER):
    [vector] = embedder.embed([query])
    return store.search(
        store.collection(embedder), tenant_id=tenant, vector=vector, limit=limit, timeout_seconds=seconds
    )


def test_no_two_models_share_a_collection():
    store = VectorStore("http://127.0.0.1:1", "", "documents")

    def collection(name: str) -> str:
        model = HashedNgrams(32)
        model.name = name
        return store.collection(model)

    assert collection("text-embedding-3-small") == "documents_text_embedding_3_small_32"
    names = {
        collection(name) for name in ("BAAI/bge-m3", "baai/bge-m3", "baaibge-m3", "bge:m3", "bgem3", "模型", "x" * 300)
    }
    assert len(names) == 7
    assert all(re.fullmatch("[a-z0-9_]{1,150}", name) for name in names)


def test_before_anything_is_indexed_nothing_is_found(store):
    assert find(store, "elephants") == []
    store.remove(uuid.uuid4())  # and there is nothing to remove


def test_the_nearest_is_first(store):
    document = put(store, "Elephants are large", "Mice are small", "Invoices are due")
    hits = find(store, "small mice", limit=2)
    assert (hits[0].document_id, hits[0].position, hits[0].text) == (document, 1, "Mice are small")
    assert len(hits) == 2 and hits[0].score > hits[1].score
    assert find(store, "Elephants are large")[0].score == pytest.approx(1.0, abs=1e-4)


def test_no_search_crosses_tenants(store):
    put(store, "Elephants are large", tenant=TENANT)
    other = put(store, "Elephants are large", tenant=OTHER)
    assert [hit.document_id for hit in find(store, "elephants", OTHER)] == [other]
    assert find(store, "elephants", uuid.uuid4()) == []


def test_a_tenant_cannot_be_made_to_match_more(store):
    put(store, "Elephants are large")
    with pytest.raises(ValueError, match="badly formed"):
        find(store, "elephants", 'x" or tenant_id != "x')


def test_to_write_again_changes_nothing_and_leaves_nothing(store):
    document = put(store, "one", "two", "three")
    put(store, "one", "two", "three", document=document)
    assert len(find(store, "one")) == 3
    put(store, "uno", document=document)
    assert [hit.text for hit in find(store, "one")] == ["uno"]


def test_a_document_is_removed_from_every_collection(store):
    document = put(store, "Elephants")
    put(store, "Elephants", document=document, embedder=HashedNgrams(16))
    kept = put(store, "Mice")
    store.remove(document)
    store.remove(document)
    assert [hit.document_id for hit in find(store, "elephants")] == [kept]
    assert find(store, "elephants", embedder=HashedNgrams(16)) == []


def test_more_chunks_than_fit_a_request(store):
    document = uuid.uuid4()
    chunks = [Chunk(at, f"chunk {at}", EMBEDDER.embed([f"chunk {at}"])[0]) for at in range(1_100)]
    store.replace(store.prepare(EMBEDDER), tenant_id=TENANT, document_id=document, chunks=chunks)
    assert find(store, "chunk 1099")[0].position == 1_099


def test_an_idle_client_sends_no_pings(store):
    # Milvus Lite hangs up on one that does, but only after 40 s: too long to wait for it here.
    handler = store._connected(20)._get_connection()
    assert handler._grpc_options == {"grpc.keepalive_permit_without_calls": False}


def test_before_anything_is_indexed_no_search_fails(store):
    labels = {"collection": store.collection(EMBEDDER)}
    find(store, "elephants")
    assert not REGISTRY.get_sample_value("milvus_search_errors_total", labels)
    put(store, "Elephants")
    # Somebody deletes it while we know it.
    store._connected(20).drop_collection(store.collection(EMBEDDER))
    assert find(store, "elephants") == []
    put(store, "Mice")
    assert len(find(store, "mice")) == 1


def test_searches_are_timed(store):
    labels = {"collection": store.collection(EMBEDDER)}
    put(store, "Elephants")
    find(store, "elephants")
    assert REGISTRY.get_sample_value("milvus_search_duration_seconds_count", labels) == 1
    assert REGISTRY.get_sample_value("milvus_search_errors_total", labels) == 0


def test_away_and_back_with_all_it_had(store, milvus):
    document = put(store, "Elephants")
    milvus.kill()
    with pytest.raises(VectorsUnavailable):
        find(store, "elephants", seconds=1.0)
    with pytest.raises(VectorsUnavailable):
        put(store, "Mice")
    with pytest.raises(VectorsUnavailable):
        store.remove(document)
    milvus.start()
    milvus.wait_until_ready()

    def is_found() -> bool:
        try:
            return [hit.document_id for hit in find(store, "elephants")] == [document]
        except VectorsUnavailable:
            return False

    eventually(is_found, "the document is found again")
    store.remove(document)
    assert find(store, "elephants") == []


def test_a_removal_after_a_restart_loads_what_it_needs(store, milvus):
    document = put(store, "Elephants")
    milvus.stop()
    milvus.start()
    milvus.wait_until_ready()
    eventually(lambda: _removed(store, document), "it is removed")
    assert find(store, "elephants") == []


def _removed(store, document) -> bool:
    try:
        store.remove(document)
    except VectorsUnavailable:
        return False
    return True


def test_one_that_hangs_is_not_waited_for(store, milvus):
    put(store, "Elephants")
    milvus.pause()
    started = time.monotonic()
    with pytest.raises(VectorsUnavailable):
        find(store, "elephants", seconds=0.5)
    assert time.monotonic() - started < 3
    milvus.resume()
    assert len(find(store, "elephants")) == 1


def test_while_it_is_away_only_one_asks_and_all_others_know_at_once():
    store = VectorStore("http://127.0.0.1:1", "", "away")
    with pytest.raises(VectorsUnavailable, match=r"connecting to server on 127\.0\.0\.1:1"):
        find(store, "elephants", seconds=1.0)
    started = time.monotonic()
    for _ in range(20):
        with pytest.raises(VectorsUnavailable, match="a moment ago"):
            find(store, "elephants", seconds=1.0)
    assert time.monotonic() - started < 0.5


def test_a_file_is_milvus_lite_in_this_process(tmp_path):
    from milvus_lite import server_manager_instance

    path = str(tmp_path / "deep" / "milvus.db")
    store = VectorStore(path, "", "embedded")
    try:
        document = put(store, "Elephants")
        assert [hit.document_id for hit in find(store, "elephants")] == [document]
    finally:
        store.close()
        server_manager_instance.release_server(path)
