"""Searches of observed Milvus clients, on Milvus Lite."""

import asyncio
import contextlib
import itertools

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pymilvus import AnnSearchRequest, AsyncMilvusClient, MilvusClient, MilvusException, RRFRanker

from monitoring import milvus
from monitoring.metrics import MILVUS_ERRORS
from monitoring.milvus import observe_milvus

from .conftest import counted, run_python

VECTOR = [1.0, 2.0, 3.0, 4.0]
_number = itertools.count()


class Sync:
    def __init__(self, uri):
        self.client = MilvusClient(uri)
        assert observe_milvus(self.client) is self.client

    def do(self, name, *args, **kwargs):
        return getattr(self.client, name)(*args, **kwargs)

    def close(self):
        self.client.close()


class Async(Sync):
    def __init__(self, uri):
        self.runner = asyncio.Runner()
        self.client = self.runner.run(self.make(uri))
        assert observe_milvus(self.client) is self.client

    async def make(self, uri):
        return AsyncMilvusClient(uri)

    async def _do(self, name, *args, **kwargs):
        return await getattr(self.client, name)(*args, **kwargs)

    def do(self, name, *args, **kwargs):
        return self.runner.run(self._do(name, *args, **kwargs))

    def close(self):
        self.runner.run(self.client.close())
        self.runner.close()


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return str(tmp_path_factory.mktemp("milvus") / "file.db")


@pytest.fixture(scope="module")
def setup(uri):
    """A client that is not observed."""
    with contextlib.closing(MilvusClient(uri)) as client:
        client.create_collection("vectors", dimension=4)
        client.insert("vectors", [{"id": number, "vector": [number, 1.0, 2.0, 3.0]} for number in range(20)])
        yield client


@pytest.fixture(scope="module", params=[Sync, Async], ids=["sync", "async"])
def caller(request, uri, setup):
    with contextlib.closing(request.param(uri)) as caller:
        yield caller


@pytest.fixture
def collection(setup):
    """20 vectors under a name of its own, so that its series begin at nothing."""
    name = f"collection_{next(_number)}"
    setup.create_alias("vectors", name)
    return name


@pytest.fixture
def spans(monkeypatch):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(milvus, "tracer", provider.get_tracer("test"))
    yield exporter.get_finished_spans
    provider.shutdown()


def searches(collection):
    """[searches, of which failed, vectors searched for, results]"""
    names = ("duration_seconds_count", "errors_total", "results_count", "results_sum")
    return [counted(f"milvus_search_{name}", collection=collection) for name in names]


def test_a_search(caller, collection, spans):
    [hits] = caller.do("search", collection, data=[VECTOR], limit=5, filter="id >= 10", output_fields=["id"])
    assert len(hits) == 5
    assert searches(collection) == [1, 0, 1, 5]
    assert counted("milvus_search_duration_seconds_sum", collection=collection) > 0
    [span] = spans()
    assert (span.name, span.kind, span.status.is_unset) == (f"search {collection}", trace.SpanKind.CLIENT, True)
    assert dict(span.attributes) == {
        "db.system.name": "milvus",
        "db.operation.name": "search",
        "db.collection.name": collection,
        "db.response.returned_rows": 5,
    }


def test_each_vector_has_its_number_of_results(caller, collection, spans):
    answer = caller.do("search", collection_name=collection, data=[VECTOR, VECTOR, VECTOR], limit=2)
    assert [len(hits) for hits in answer] == [2, 2, 2]
    assert searches(collection) == [1, 0, 3, 6]
    assert spans()[0].attributes["db.response.returned_rows"] == 6


def test_a_search_that_finds_nothing_is_in_the_bucket_of_0(caller, collection):
    [hits] = caller.do("search", collection, data=[VECTOR], filter="id < 0")
    assert len(hits) == 0
    assert searches(collection) == [1, 0, 1, 0]
    assert counted("milvus_search_results_bucket", collection=collection, le="0.0") == 1


def test_a_hybrid_search(caller, collection, spans):
    requests = [AnnSearchRequest([VECTOR], "vector", {}, limit=5) for _ in range(2)]
    [hits] = caller.do("hybrid_search", collection, requests, RRFRanker(), limit=3)
    assert len(hits) == 3
    assert searches(collection) == [1, 0, 1, 3]
    [span] = spans()
    assert (span.name, span.attributes["db.operation.name"]) == (f"hybrid_search {collection}", "hybrid_search")


def test_errors_begin_at_0(caller, collection):
    caller.do("search", collection, data=[VECTOR])
    samples = [one for family in MILVUS_ERRORS.collect() for one in family.samples]
    assert [one.value for one in samples if one.labels["collection"] == collection] == [0]


def test_a_search_that_fails(caller, collection, spans):
    with pytest.raises(MilvusException):
        caller.do("search", collection, data=[VECTOR], filter="secret <<")
    assert searches(collection) == [1, 1, 0, 0]
    [span] = spans()
    assert span.status.status_code is trace.StatusCode.ERROR
    assert span.attributes["error.type"] == "pymilvus.exceptions.MilvusException"
    assert int(span.attributes["db.response.status_code"]) > 0
    assert "secret" not in span.to_json()


def test_everything_else_is_as_before(caller, collection):
    assert [row["id"] for row in caller.do("get", collection, ids=[3])] == [3]
    assert caller.do("has_collection", collection)
    assert searches(collection) == [0, 0, 0, 0]


def test_the_span_belongs_to_the_request(collection, uri, spans):
    with contextlib.closing(Sync(uri)) as caller, milvus.tracer.start_as_current_span("request") as parent:
        caller.do("search", collection, data=[VECTOR])
    assert spans()[0].parent.span_id == parent.get_span_context().span_id


def test_a_search_that_is_cancelled_is_no_error():
    class Client:
        async def search(self, collection_name, data):
            await asyncio.Event().wait()

        hybrid_search = search

    async def cancel():
        task = asyncio.create_task(observe_milvus(Client()).search("cancelled", data=[]))
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert searches("cancelled") == [1, 0, 0, 0]


def test_observing_twice_counts_once(caller, collection):
    observe_milvus(caller.client)
    caller.do("search", collection, data=[VECTOR])
    assert searches(collection)[0] == 1


def test_recording_that_fails_fails_no_search(caller, collection, monkeypatch, caplog):
    monkeypatch.setattr(milvus, "_series", lambda collection: 1 / 0)
    assert len(caller.do("search", collection, data=[VECTOR], limit=2)[0]) == 2
    assert "could not be recorded" in caplog.text


def test_the_module_needs_no_pymilvus():
    code = "import sys, django; django.setup(); import monitoring.milvus; assert 'pymilvus' not in sys.modules"
    done = run_python(code)
    assert (done.returncode, done.stderr) == (0, "")
