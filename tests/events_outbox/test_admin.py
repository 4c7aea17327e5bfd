"""The admin: derived status, readable events, filters, search, actions, no unbounded counts."""

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from events_outbox import dead_letters, handlers
from events_outbox.admin import PAGED_ROWS
from events_outbox.consumer import ConsumerProcess
from events_outbox.fields import PgSnapshot
from events_outbox.models import DeadLetter, OutboxEvent, RelayCursor, UndeliverableEvent
from events_outbox.records import Delivery, Record
from voicehelper.audit.models import AuditEntry
from voicehelper.identity.models import User

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def operator():
    """A client logged in as alice, who may do everything."""
    client = Client()
    client.force_login(User.objects.create_superuser("alice", password="x"))
    return client


@pytest.fixture
def onlooker():
    """A client logged in as bob, staff who may only look."""
    bob = User.objects.create_user("bob", password="x", is_staff=True)
    may_look = Permission.objects.filter(codename__startswith="view_", content_type__app_label="events_outbox")
    bob.user_permissions.set(may_look)
    client = Client()
    client.force_login(bob)
    return client


@pytest.fixture
def three_events(emit):
    """A published, an undeliverable and a pending event."""
    published, undeliverable = emit("c-published"), emit("c-parked")
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_current_snapshot()::text")
        RelayCursor.objects.update(published=PgSnapshot.parse(cursor.fetchone()[0]), leader="host:1")
    UndeliverableEvent.objects.create(
        event=undeliverable, topic=undeliverable.topic, aggregate_id="c-parked", reason="MSG_SIZE_TOO_LARGE", error="x"
    )
    return {"published": published, "undeliverable": undeliverable, "pending": emit("c-pending")}


def page(client, model, **query):
    answer = client.get(reverse(f"admin:events_outbox_{model}_changelist"), query)
    assert answer.status_code == 200
    return answer.content.decode()


def detail(client, obj):
    url = reverse(f"admin:events_outbox_{obj._meta.model_name}_change", args=[obj.pk])
    answer = client.get(url)
    assert answer.status_code == 200
    return answer.content.decode()


def act(client, model, action, objects):
    url = reverse(f"admin:events_outbox_{model}_changelist")
    return client.post(url, {"action": action, "_selected_action": [obj.pk for obj in objects]}, follow=True)


def test_status_is_derived_and_filtered(operator, three_events):
    for status, event in three_events.items():
        assert f'<td class="field-status">{status}</td>' in page(operator, "outboxevent", q=event.aggregate_id)
        filtered = page(operator, "outboxevent", status=status)
        assert str(event.event_id) in filtered
        others = [e for s, e in three_events.items() if s != status]
        assert all(str(other.event_id) not in filtered for other in others)


def test_an_event_is_readable(operator, three_events):
    event = three_events["published"]
    text = detail(operator, event)
    for shown in (
        "&quot;event_type&quot;: &quot;conversation.created&quot;",
        "&quot;@type&quot;: &quot;type.googleapis.com/voicehelper.conversation.v1.ConversationCreatedPayload&quot;",
        "&quot;title&quot;: &quot;hello&quot;",
    ):
        assert shown in text
    assert 'name="_save"' not in text


def test_an_event_tells_who_handled_it(operator, three_events):
    event = three_events["published"]
    audit = handlers.consumer_named("audit")
    ConsumerProcess(audit).handle_batch(
        [Record(topic=event.topic, partition=0, offset=0, key=b"k", value=bytes(event.value))]
    )
    assert "audit 2" in detail(operator, event)


@pytest.mark.parametrize("field", ["event_id", "aggregate_id", "correlation_id"])
def test_search_by_each_id_uses_an_index(operator, three_events, field):
    event = three_events["published"]
    text = page(operator, "outboxevent", q=str(getattr(event, field)))
    assert str(event.event_id) in text and str(three_events["pending"].event_id) not in text
    assert str(event.event_id) not in page(operator, "outboxevent", q="nothing like it")


def test_filters_by_type_topic_and_tenant(operator, three_events):
    event_id = str(three_events["published"].event_id)
    for found, query in [
        (True, {"event_type": "conversation.created"}),
        (False, {"event_type": "document.uploaded"}),
        (True, {"topic": "conversation.events"}),
        (False, {"topic": "default.events"}),
        (True, {"tenant_id": "t1"}),
        (False, {"tenant_id": "t2"}),
    ]:
        assert (event_id in page(operator, "outboxevent", **query)) == found, query


@pytest.mark.parametrize("model", ["outboxevent", "processedevent", "deadletter", "undeliverableevent"])
def test_no_list_counts_its_table_to_the_end(operator, three_events, model):
    with CaptureQueriesContext(connection) as queries:
        page(operator, model)
    counts = [q["sql"] for q in queries if "COUNT(" in q["sql"] and f"events_outbox_{model}" in q["sql"]]
    assert counts and all(f"LIMIT {PAGED_ROWS}" in sql for sql in counts)


def test_the_number_of_queries_does_not_grow_with_the_rows(operator, three_events, emit):
    with CaptureQueriesContext(connection) as few:
        page(operator, "outboxevent")
    for number in range(20):
        emit(f"c{number}")
    with CaptureQueriesContext(connection) as many:
        page(operator, "outboxevent")
    assert len(many) == len(few)


def test_the_cursor_shows_who_leads_and_what_is_pending(operator, three_events):
    assert '<td class="field-pending">1</td>' in page(operator, "relaycursor")
    assert "host:1" in detail(operator, RelayCursor.objects.get())


def test_redrive_marks_the_whole_key_and_is_logged(operator, three_events, emit):
    parked = UndeliverableEvent.objects.get()
    behind = UndeliverableEvent.objects.create(
        event=emit("c-parked"), topic=parked.topic, aggregate_id="c-parked", reason="behind", error="x"
    )
    answer = act(operator, "undeliverableevent", "redrive", [behind])
    assert "2 events of 1 keys" in answer.content.decode()
    assert UndeliverableEvent.objects.filter(redrive_requested_at__isnull=False).count() == 2
    assert "redrive requested" in LogEntry.objects.get().change_message


@pytest.fixture
def parked_key(three_events, emit):
    """The undeliverable event and one that waits behind it."""
    parked = UndeliverableEvent.objects.get()
    behind = UndeliverableEvent.objects.create(
        event=emit("c-parked"), topic=parked.topic, aggregate_id="c-parked", reason="behind", error="x"
    )
    return parked, behind


def confirm_discard(client, objects, reason):
    url = reverse("admin:events_outbox_undeliverableevent_changelist")
    ids = [obj.pk for obj in objects]
    form = {"action": "discard", "_selected_action": ids, "confirmed": "yes", "reason": reason}
    return client.post(url, form, follow=True).content.decode()


def test_discard_asks_for_a_reason_and_is_logged(operator, parked_key):
    parked, behind = parked_key
    asked = act(operator, "undeliverableevent", "discard", [parked]).content.decode()
    assert "conversation.created" in asked and 'name="reason"' in asked
    assert "1 events of 1 keys wait for them" in asked
    assert "Say why" not in asked
    asked_again = confirm_discard(operator, [parked], " ")
    assert "Say why" in asked_again and 'name="reason"' in asked_again
    assert UndeliverableEvent.objects.open().count() == 2 and not LogEntry.objects.exists()

    answer = confirm_discard(operator, [parked], "test data")
    assert "1 undeliverable events discarded; 1 events of 1 keys waited for them and are redriven" in answer
    parked.refresh_from_db()
    behind.refresh_from_db()
    assert (parked.discarded_by, parked.discard_reason) == ("alice", "test data") and parked.discarded_at
    assert behind.discarded_at is None and behind.redrive_requested_at
    entry = LogEntry.objects.get()
    assert entry.change_message == "discarded: test data" and entry.object_id == str(parked.pk)
    assert "Discarded already" in confirm_discard(operator, [parked], "again")
    text = detail(operator, parked)
    assert "test data" in text and "alice" in text


def test_open_and_discarded_events_are_told_apart(operator, parked_key):
    parked, behind = parked_key
    confirm_discard(operator, [parked], "test data")

    def listed(**query):
        text = page(operator, "undeliverableevent", **query)
        return {p.pk for p in parked_key if f'value="{p.pk}" class="action-select"' in text}

    assert listed() == {parked.pk, behind.pk}
    assert listed(state="open") == {behind.pk} and listed(state="discarded") == {parked.pk}
    states = page(operator, "undeliverableevent")
    assert '<td class="field-state">discarded</td>' in states
    assert '<td class="field-state">to be redriven</td>' in states
    answer = act(operator, "undeliverableevent", "redrive", [parked, behind]).content.decode()
    assert "Discarded already" in answer and "nothing was changed" in answer

    # The event itself is shown as discarded, and no more as undeliverable.
    event_id = str(parked.event.event_id)
    assert '<td class="field-status">discarded</td>' in page(operator, "outboxevent", q=event_id)
    assert event_id in page(operator, "outboxevent", status="discarded")
    for status in ("undeliverable", "published", "pending"):
        assert event_id not in page(operator, "outboxevent", status=status)


def test_more_than_can_be_looked_at_is_not_discarded_at_once(operator, parked_key, monkeypatch):
    monkeypatch.setattr("events_outbox.admin.DISCARD_AT_ONCE", 1)
    answer = act(operator, "undeliverableevent", "discard", parked_key).content.decode()
    assert "Select at most 1, or use `manage.py undeliverable discard`" in answer


def test_a_hostile_aggregate_id_is_text_on_the_discard_page(operator, parked_key):
    parked, _ = parked_key
    UndeliverableEvent.objects.filter(pk=parked.pk).update(aggregate_id="<script>alert(1)</script>")
    asked = act(operator, "undeliverableevent", "discard", [parked]).content.decode()
    assert "&lt;script&gt;alert(1)" in asked and "<script>alert(1)" not in asked


def test_who_may_only_look_cannot_redrive_or_discard(onlooker, parked_key):
    for word in ('value="redrive"', 'value="discard"'):
        assert word not in page(onlooker, "undeliverableevent")
    act(onlooker, "undeliverableevent", "redrive", parked_key)
    confirm_discard(onlooker, parked_key, "because")
    assert UndeliverableEvent.objects.open().filter(redrive_requested_at__isnull=True).count() == 2


@pytest.fixture
def dead_letter(emit):
    """A letter of the consumer audit whose event can be handled by now."""
    event = emit("c1")
    record = Record(topic=event.topic, partition=0, offset=5, key=b"c1", value=bytes(event.value))
    base = record.envelope()
    dead_letters.keep(
        "audit",
        Delivery(record, event.event_id, None, None, None, base.event_type, base.tenant_id),
        DeadLetter.Reason.FAILED,
        "ValueError: it was broken",
        traceback_text="Traceback ...",
    )
    return DeadLetter.objects.get()


def test_a_dead_letter_is_readable_and_replayed(operator, dead_letter):
    text = detail(operator, dead_letter)
    assert "ValueError: it was broken" in text and "&quot;title&quot;: &quot;hello&quot;" in text
    assert bytes(dead_letter.value)[:20].hex(" ") in text
    answer = act(operator, "deadletter", "replay", [dead_letter])
    assert "1 dead letters replayed" in answer.content.decode()
    dead_letter.refresh_from_db()
    assert dead_letter.resolution == "replayed"
    assert AuditEntry.objects.filter(event_id=dead_letter.event_id).exists()
    answer = act(operator, "deadletter", "replay", [dead_letter])
    assert "replayed already" in answer.content.decode()
    assert {entry.change_message for entry in LogEntry.objects.all()} >= {"replayed"}


def test_a_dead_letter_that_is_no_event_is_shown_and_discarded(operator):
    ConsumerProcess(handlers.consumer_named("audit")).handle_batch(
        [Record(topic="t", partition=0, offset=0, key=None, value=b"<script>\xff", headers=[("h", b"\xff")])]
    )
    letter = DeadLetter.objects.get()
    text = detail(operator, letter)
    assert "not decodable" in text and b"<script>\xff".hex(" ") in text
    act(operator, "deadletter", "discard", [letter])
    assert not DeadLetter.objects.open().exists()


def test_who_may_only_look_cannot_act_or_change(onlooker, dead_letter, three_events):
    assert 'value="replay"' not in page(onlooker, "deadletter")
    act(onlooker, "deadletter", "discard", [dead_letter])
    assert DeadLetter.objects.open().exists()
    for model in ("outboxevent", "deadletter"):
        assert onlooker.get(reverse(f"admin:events_outbox_{model}_add")).status_code == 403
    event = OutboxEvent.objects.first()
    url = reverse("admin:events_outbox_outboxevent_delete", args=[event.pk])
    assert onlooker.post(url, {"post": "yes"}).status_code == 403


def test_nobody_deletes_events_in_the_admin(operator, three_events):
    event = three_events["published"]
    url = reverse("admin:events_outbox_outboxevent_delete", args=[event.pk])
    assert operator.post(url, {"post": "yes"}).status_code == 403
    assert 'value="delete_selected"' not in page(operator, "outboxevent")
