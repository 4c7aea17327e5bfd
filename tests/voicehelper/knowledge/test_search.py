import time
import uuid

import pytest
from django.core.cache import caches
from django.db import connection
from django.test.utils import CaptureQueriesContext

from events_outbox.testing import handle_now
from tests.monitoring.conftest import counted
from tests.services import free_ports
from voicehelper.knowledge.models import Document
from voicehelper.knowledge.search import MAX_LIMIT, SearchUnavailable, search
from voicehelper.shared_cache import SharedOrOwnCache


@pytest.fixture(autouse=True)
def nothing_cached(monkeypatch):
    monkeypatch.setattr("voicehelper.knowledge.search._cache", SharedOrOwnCache())
    for cache in caches.all():
        cache.clear()


def test_a_tenant_without_documents_finds_nothing(milvus, tenant):
    assert search(tenant_id=tenant.id, query="elephants") == []


def test_a_blank_query_finds_nothing(upload, bob):
    upload(bob)
    handle_now("knowledge", raise_errors=True)
    assert search(tenant_id=bob.own_tenant_id, query=" \n ") == []


def test_the_best_come_first_and_not_more_than_wanted(upload, bob):
    for text in ("Mice are small.", "Elephants are large.", "Invoices are due in 14 days."):
        upload(bob, text, title=text.split()[0])
    handle_now("knowledge", raise_errors=True)
    found = search(tenant_id=bob.own_tenant_id, query="When is an invoice due?", limit=2)
    assert found[0].title == "Invoices"
    assert len(found) == 2 and found[0].score > found[1].score


def test_a_title_helps_to_find_what_does_not_say_it(upload, bob):
    upload(bob, "You get 30 days.", title="Vacation policy")
    upload(bob, "You get 20 euros.", title="Lunch allowance")
    handle_now("knowledge", raise_errors=True)
    assert search(tenant_id=bob.own_tenant_id, query="vacation", limit=1)[0].text == "You get 30 days."


def test_nothing_of_another_tenant(upload, bob, charlie):
    upload(bob, "Elephants are large.")
    other = upload(charlie, "Elephants are the largest.")
    handle_now("knowledge", raise_errors=True)
    assert [one.document_id for one in search(tenant_id=charlie.own_tenant_id, query="elephants")] == [other.id]
    assert search(tenant_id=uuid.uuid4(), query="elephants") == []


def test_the_database_has_the_last_word_on_whose_it_is(upload, bob, charlie):
    document = upload(bob)
    handle_now("knowledge", raise_errors=True)
    # As if vectors had been written for the wrong tenant.
    Document.objects.filter(id=document.id).update(tenant_id=charlie.own_tenant_id)
    assert search(tenant_id=bob.own_tenant_id, query="elephants") == []


@pytest.mark.parametrize("limit", [0, -1, MAX_LIMIT + 1])
def test_a_limit_out_of_range(tenant, limit):
    with pytest.raises(ValueError, match="limit"):
        search(tenant_id=tenant.id, query="x", limit=limit)


def test_a_very_long_query(upload, bob):
    upload(bob)
    handle_now("knowledge", raise_errors=True)
    assert len(search(tenant_id=bob.own_tenant_id, query="elephants " * 100_000)) == 1


def test_milvus_away_is_told_soon(change, tenant):
    change(milvus_uri="http://127.0.0.1:1", search_timeout_seconds=1.0)
    started = time.monotonic()
    with pytest.raises(SearchUnavailable, match="VectorsUnavailable"):
        search(tenant_id=tenant.id, query="elephants")
    assert time.monotonic() - started < 5


def test_milvus_that_hangs_is_told_in_time(upload, bob, milvus):
    upload(bob)
    handle_now("knowledge", raise_errors=True)
    milvus.pause()
    started = time.monotonic()
    with pytest.raises(SearchUnavailable):
        search(tenant_id=bob.own_tenant_id, query="elephants", timeout_seconds=0.5)
    assert time.monotonic() - started < 3
    milvus.resume()
    assert len(search(tenant_id=bob.own_tenant_id, query="elephants")) == 1


def test_an_embedder_that_hangs_takes_no_longer(endpoint, milvus, tenant):
    endpoint.gate.clear()
    started = time.monotonic()
    with pytest.raises(SearchUnavailable, match="EmbedderUnavailable"):
        search(tenant_id=tenant.id, query="elephants", timeout_seconds=0.5)
    assert time.monotonic() - started < 5


def test_it_costs_one_query_whatever_is_found(upload, bob):
    for _ in range(6):
        upload(bob)
    handle_now("knowledge", raise_errors=True)
    with CaptureQueriesContext(connection) as queries:
        assert len(search(tenant_id=bob.own_tenant_id, query="elephants")) == 5
    assert len(queries) == 1


def test_a_question_that_comes_again_is_embedded_once_for_each_tenant(endpoint, upload, bob, charlie):
    upload(bob)
    handle_now("knowledge", raise_errors=True)
    endpoint.requests.clear()
    hits = counted("cache_hits_total", cache_name="default", operation="get")
    found = [search(tenant_id=bob.own_tenant_id, query="large animals") for _ in range(3)]
    assert found[0] == found[1] == found[2] and len(found[0]) == 1
    assert endpoint.requests == [["large animals"]]
    assert counted("cache_hits_total", cache_name="default", operation="get") - hits == 2
    search(tenant_id=charlie.own_tenant_id, query="large animals")
    search(tenant_id=bob.own_tenant_id, query="small animals")
    assert endpoint.requests[1:] == [["large animals"], ["small animals"]]


def test_a_cache_that_is_away_is_done_without(endpoint, upload, bob, settings, caplog):
    upload(bob)
    handle_now("knowledge", raise_errors=True)
    (port,) = free_ports(1)
    settings.CACHES = {
        **settings.CACHES,
        "default": {"BACKEND": "monitoring.caches.RedisCache", "LOCATION": f"redis://127.0.0.1:{port}"},
    }
    for _ in range(2):
        assert len(search(tenant_id=bob.own_tenant_id, query="large animals")) == 1
    assert caplog.text.count("cannot be reached") == 1
    assert endpoint.requests.count(["large animals"]) == 1
