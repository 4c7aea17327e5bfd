"""Replaying events from the admin: which are chosen, what is shown, what is published, and what is left over."""

import threading
from uuid import uuid4

import pytest
from django.contrib.admin.models import LogEntry
from django.test import Client
from django.urls import reverse

from events_outbox.models import OperatorAction, OutboxEvent, UndeliverableEvent
from events_outbox.replay import Replay
from tests.events_outbox.test_admin import act, ask, page, told
from tests.events_outbox.test_replay import numbers, pass_all
from voicehelper.identity.models import User

pytestmark = pytest.mark.django_db(transaction=True)

URL = "admin:events_outbox_replay"


@pytest.fixture
def operator():
    client = Client()
    client.force_login(User.objects.create_superuser("alice", password="x"))
    return client


@pytest.fixture
def published(emit):
    """Three published events, the second of another aggregate, and a pending one."""
    events = [emit("a", 0), emit("b", 1), emit("a", 2)]
    pass_all()
    return [*events, emit("a", 3)]


def asked(client, **query):
    return told(client.get(reverse(URL, query=query)))


def confirmed(client, **form):
    return told(client.post(reverse(URL), {"confirmed": "yes", "reason": "lost topic", **form}, follow=True))


def test_nothing_is_published_before_it_is_confirmed(operator, published, topic_reader):
    text = asked(operator, aggregate_id="a", preview="1")
    assert "Events to publish again 2" in text and f"id {published[0].pk}" in text and f"id {published[2].pk}" in text
    assert str(published[0].event_id) in text and str(published[1].event_id) not in text
    assert "Say why" in told(operator.post(reverse(URL), {"aggregate_id": "a", "confirmed": "yes", "reason": " "}))
    assert not OperatorAction.objects.exists()

    assert "2 of 2 events published again" in confirmed(operator, aggregate_id="a")
    assert numbers(topic_reader.read(2)) == [0, 2]
    started, done = OperatorAction.objects.order_by("id")
    for noted in (started, done):
        assert (noted.action, noted.by, noted.reason) == ("events.replayed", "alice", "lost topic")
    assert started.detail["state"] == "started" and started.detail["selected"] == 2
    assert "--aggregate-id=a" in started.detail["command"]
    assert done.detail["published"] == 2 and done.detail["filter"]["aggregate-id"] == ["a"]
    assert LogEntry.objects.get().change_message == "Replayed: lost topic"


def test_one_event_is_shown_at_once(operator, published):
    text = asked(operator, event_id=published[1].event_id)
    assert "Events to publish again 1" in text and "Publish 1 again" in text
    text = asked(operator, event_id=published[3].event_id)
    assert (
        "1 of 1 event ids cannot be published again" in text and "Publish" not in text.partition("Replay events |")[2]
    )


def test_chosen_rows_are_replayed(operator, published, topic_reader):
    text = told(ask(operator, "outboxevent", "replay", published[1:]))
    assert "Events to publish again 2" in text and "1 of 3 event ids cannot be published again" in text
    assert "2 of 2 events" in told(act(operator, "outboxevent", "replay", published[1:], reason="lost topic"))
    assert sorted(numbers(topic_reader.read(2))) == [1, 2]


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ({"preview": "1"}, "fill in at least one field"),
        ({"preview": "1", "since": "soon"}, "is neither a time"),
        ({"preview": "1", "event_type": "Nothing!"}, "is neither an event type"),
        ({"event_id": "7"}, "'7' is none"),
        ({"preview": "1", "since": "1h", "until": "2h"}, "must be before"),
        ({"preview": "1", "until": "9999-12-31T23:30"}, "The year of the time until must be between 1970 and 9000"),
        ({"preview": "1", "since": "0001-01-01"}, "The year of the time since must be between 1970 and 9000"),
    ],
)
def test_what_chooses_nothing_is_asked_again(operator, published, query, says):
    text = asked(operator, **query)
    assert says in text and "Preview" in text and "Publish" not in text.partition("confirm it.")[2]


def test_the_lists_filter_is_taken_over(operator, published):
    query = {"tenant_id": "t1", "topic": "conversation.events", "date": "2026", "q": "a", "status": "pending"}
    link = reverse(URL) + "?tenant_id=t1"
    assert link in page(operator, "outboxevent", tenant_id="t1")
    answer = operator.get(reverse(URL, query=query))
    values = answer.context["form"].initial
    assert (values["tenant_id"], values["event_type"], values["aggregate_id"]) == ("t1", "conversation.*", "a")
    assert values["since"].startswith("2026-01-01T00:00") and values["until"].startswith("2027-01-01T00:00")
    assert "Only published events" in told(answer) and "may have been a correlation id" in told(answer)
    assert "default.events is not taken over" in asked(operator, topic="default.events")
    by_event = operator.get(reverse(URL, query={"q": str(published[0].event_id)}))
    assert by_event.context["form"].initial["event_id"] == str(published[0].event_id)


def test_what_comes_after_the_preview_is_not_published(operator, published, emit, topic_reader):
    hidden = dict(operator.get(reverse(URL, query={"aggregate_id": "a", "preview": "1"})).context["hidden"])
    emit("a", 4)
    OutboxEvent.objects.filter(pk=published[3].pk).delete()
    pass_all()
    assert "2 of 2 events published again" in confirmed(operator, **hidden)
    assert numbers(topic_reader.read(2)) == [0, 2]


def test_what_was_pending_at_the_preview_is_asked_about_again(operator, published):
    hidden = dict(operator.get(reverse(URL, query={"aggregate_id": "a", "preview": "1"})).context["hidden"])
    pass_all()
    assert "By now 3 events are meant, more than confirmed: nothing was published" in confirmed(operator, **hidden)
    assert not OperatorAction.objects.exists()


def test_too_many_are_left_to_the_command(operator, published, monkeypatch):
    monkeypatch.setattr("events_outbox.admin.replay.AT_ONCE_EVENTS", 1)
    text = asked(operator, aggregate_id="a", preview="1")
    assert "More than 1 are not published from here" in text and "Publish 2" not in text
    assert "python manage.py replay_outbox --until=" in text and "--aggregate-id=a" in text
    assert "nothing was published" in confirmed(operator, aggregate_id="a")
    assert not OperatorAction.objects.exists()


def test_what_a_request_does_not_finish_is_told_with_the_command(
    operator, published, monkeypatch, topic_reader, settings
):
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "BATCH_SIZE": 1}
    first = threading.Event()
    pages = Replay._pages

    def stop_after_the_first(replay):
        for rows in pages(replay):
            yield rows
            first.set()
            replay.stop()

    monkeypatch.setattr(Replay, "_pages", stop_after_the_first)
    text = confirmed(operator, aggregate_id="a")
    assert first.is_set() and "1 of 2 events published again" in text and "Stopped after 20 seconds" in text
    assert f"--aggregate-id=a --after-id {published[0].pk}" in text
    assert OperatorAction.objects.latest("id").detail["published"] == 1
    assert numbers(topic_reader.read(1)) == [0]


def test_a_replay_that_fails_at_once_is_in_the_audit_trail(operator, published, monkeypatch, settings):
    """Its first batch may be in Kafka all the same."""
    nowhere = {"bootstrap.servers": "127.0.0.1:1"}
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "KAFKA": nowhere, "KAFKA_IS_EMBEDDED": False}
    monkeypatch.setattr("events_outbox.admin.replay.REQUEST_SECONDS", 1.0)
    text = confirmed(operator, aggregate_id="a")
    assert "0 of 2 events published again" in text and "some events of the batch after these may have gone out" in text
    started, ended = OperatorAction.objects.order_by("id")
    assert started.detail["state"] == "started" and started.detail["selected"] == 2
    assert ended.detail["published"] == 0 and ended.reason == "lost topic"
    assert LogEntry.objects.get().change_message == "Replayed in part: lost topic"


def test_many_event_ids_are_sent_in_the_forms_body(operator, published, topic_reader):
    form = operator.get(reverse(URL)).content.decode().partition("Nothing is published before")[2]
    assert 'method="post"' in form and "csrfmiddlewaretoken" in form
    ids = [published[0].event_id, *(uuid4() for _ in range(1200))]
    answer = operator.post(reverse(URL), {"event_id": "\n".join(map(str, ids)), "preview": "1"})
    assert "Events to publish again 1" in told(answer) and "1200 of 1201 event ids cannot" in told(answer)
    assert not OperatorAction.objects.exists() and "Say why" not in told(answer)
    assert "1 of 1 events published again" in confirmed(operator, **dict(answer.context["hidden"]))
    assert numbers(topic_reader.read(1)) == [0]
    asked_again = operator.post(reverse(URL), {"since": "soon", "preview": "1"})
    assert "is neither a time" in told(asked_again)


def test_a_database_that_fails_at_the_preview_is_told(operator, published, monkeypatch):
    monkeypatch.setattr(
        "events_outbox.replay.Selection.events",
        lambda selection, cursor: OutboxEvent.objects.extra(where=["pg_terminate_backend(pg_backend_pid())"]),
    )
    text = asked(operator, aggregate_id="a", preview="1")
    assert "does not say which events these are" in text and "Publish" not in text[-200:]


def test_a_selection_that_takes_too_long_is_left_to_the_command(operator, published, monkeypatch):
    monkeypatch.setattr("events_outbox.admin.replay.REQUEST_SECONDS", 0.2)
    monkeypatch.setattr(
        "events_outbox.replay.Selection.events",
        lambda selection, cursor: OutboxEvent.objects.extra(where=["pg_sleep(30) IS NOT NULL"]),
    )
    text = asked(operator, aggregate_id="a", preview="1")
    assert "takes longer than 0 seconds" in text and "--aggregate-id=a" in text and "Publish" not in text[-200:]


def test_undeliverable_events_are_not_among_them(operator, published):
    event = published[0]
    UndeliverableEvent.objects.create(event=event, topic=event.topic, aggregate_id="a", reason="X", error="x")
    assert "Events to publish again 1" in asked(operator, aggregate_id="a", preview="1")


def test_a_hostile_value_is_text(operator, published):
    answer = operator.get(reverse(URL, query={"aggregate_id": "<script>alert(1)</script>"}))
    assert b"<script>alert(1)" not in answer.content


def test_a_replay_takes_its_permission_and_a_token_of_the_form(published):
    bob = User.objects.create_user("bob", password="x", is_staff=True)
    client = Client()
    client.force_login(bob)
    form = {"aggregate_id": "a", "confirmed": "yes", "reason": "x"}
    assert client.get(reverse(URL)).status_code == client.post(reverse(URL), form).status_code == 403
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(User.objects.create_superuser("alice", password="x"))
    assert strict.post(reverse(URL), form).status_code == 403
    assert not OperatorAction.objects.exists()
