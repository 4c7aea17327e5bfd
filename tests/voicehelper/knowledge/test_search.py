import time
import uuid

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from events_outbox.testing import handle_now
from voicehelper.knowledge.models import Document
from voicehelper.knowledge.search import MAX_LIMIT, SearchUnavailable, search


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
