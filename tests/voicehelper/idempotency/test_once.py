"""A POST with an Idempotency-Key: done once, answered the same; refused when the key is another request's."""

import threading
from datetime import timedelta

import pytest
from django.db import connection, transaction
from django.utils import timezone

from tests.voicehelper.conftest import assert_problem
from voicehelper.conversations.models import Conversation
from voicehelper.conversations.services import complete_conversation
from voicehelper.idempotency import once
from voicehelper.idempotency.models import KeptAnswer

URL = "/api/v1/conversations"


def post(client, key="k1", url=URL, **body):
    return client.post(url, body or {"title": "Hello"}, format="json", headers={"Idempotency-Key": key})


def test_it_happens_once_and_is_answered_the_same(api, alice, emitted):
    client = api(alice)
    first, second = post(client, title="a", mode="chat"), post(client, mode="chat", title="a")
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json() == second.json()
    assert "Idempotency-Replayed" not in first and second["Idempotency-Replayed"] == "true"
    assert Conversation.objects.count() == 1
    assert len(emitted("conversation.created")) == 1


def test_without_a_key_nothing_changes(api, alice):
    client = api(alice)
    for _ in range(2):
        assert client.post(URL, {"title": "a"}, format="json").status_code == 201
    assert Conversation.objects.count() == 2
    assert not KeptAnswer.objects.exists()


def test_a_key_is_one_persons(api, alice, bob, charlie):
    ids = {post(api(person)).json()["id"] for person in (alice, bob, charlie)}
    assert len(ids) == 3


def test_another_request_with_the_same_key_is_refused(api, alice):
    client = api(alice)
    conversation = post(client, title="a").json()["id"]
    assert_problem(post(client, title="b"), 422)
    assert_problem(post(client, url=f"{URL}/{conversation}/complete", title="a"), 422)
    assert Conversation.objects.count() == 1


@pytest.mark.parametrize("key", ["", " ", "a b", "ä".encode("latin-1").decode("latin-1"), "x" * 256])
def test_what_is_no_key_is_refused(api, alice, key):
    errors = assert_problem(post(api(alice), key=key), 400)["errors"]
    assert "Idempotency-Key" in errors
    assert not Conversation.objects.exists()


def test_an_error_is_not_kept(api, alice):
    client = api(alice)
    assert_problem(post(client, title=""), 400)
    assert not KeptAnswer.objects.exists()
    assert post(client, title="a").status_code == 201
    conversation = Conversation.objects.get()
    complete_conversation(user=alice, conversation_id=conversation.id)
    assert_problem(
        post(client, key="k2", url="/api/v1/messages", conversation_id=str(conversation.id), content="x"), 409
    )
    assert KeptAnswer.objects.count() == 1


def test_old_answers_go(api, alice):
    client = api(alice)
    post(client)
    KeptAnswer.objects.update(created_at=timezone.now() - timedelta(hours=once.KEPT_HOURS, minutes=1))
    post(client, key="k2")
    assert list(KeptAnswer.objects.values_list("key", flat=True)) == ["k2"]
    assert post(client).status_code == 201  # a new request by now
    assert Conversation.objects.count() == 3


def test_an_answer_that_goes_while_it_is_looked_for_is_no_error(api, alice):
    """It was there when the key was to be taken, and another request has taken it away since, being too old."""
    client = api(alice)
    post(client)

    def forget_it_first(execute, sql, *args):
        if sql.startswith("SELECT") and "idempotency_keptanswer" in sql:
            with connection.cursor() as cursor:
                cursor.execute("DELETE FROM idempotency_keptanswer")
        return execute(sql, *args)

    with connection.execute_wrapper(forget_it_first):
        assert_problem(post(client), 409)
    assert post(client).status_code == 201


def test_a_lock_that_the_post_itself_does_not_get_is_no_matter_of_the_key(api, alice, monkeypatch):
    def find_a_lock(**_):
        with connection.cursor() as cursor:
            cursor.execute("DO $$ BEGIN RAISE lock_not_available; END $$")

    monkeypatch.setattr("voicehelper.conversations.views.create_conversation", find_a_lock)
    assert_problem(post(api(alice)), 500)


@pytest.mark.django_db(transaction=True)
def test_many_at_once_are_one(api, alice):
    client, answers = api(alice), []

    def send():
        answers.append(post(client))
        connection.close()

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert Conversation.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_one_that_is_under_way_for_long_is_told(api, alice, monkeypatch):
    monkeypatch.setattr(once, "WAIT_SECONDS", 0.2)
    client, held, over = api(alice), threading.Event(), threading.Event()

    def hold():
        with transaction.atomic():
            KeptAnswer.objects.create(user=alice, key="k1", fingerprint=b"")
            held.set()
            over.wait(30)
            transaction.set_rollback(True)
        connection.close()

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    try:
        assert_problem(post(client), 409)
    finally:
        over.set()
        thread.join(30)
    assert post(client).status_code == 201  # what held it was rolled back
