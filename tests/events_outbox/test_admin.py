"""The admin: derived status, readable events, filters, search, actions, no unbounded counts."""

import re
from html import unescape

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from events_outbox import RetryPolicy, dead_letters, handlers, pauses
from events_outbox.admin.keyset import PAGED_ROWS
from events_outbox.consumer import ConsumerProcess
from events_outbox.fields import PgSnapshot
from events_outbox.leader import open_session
from events_outbox.models import (
    ConsumerPause,
    DeadLetter,
    OperatorAction,
    OutboxEvent,
    ProcessedEvent,
    RelayCursor,
    UndeliverableEvent,
    Worker,
)
from events_outbox.operators import ACTIONS
from events_outbox.proto.base_event_pb2 import BaseEvent
from events_outbox.records import Record
from voicehelper.identity.models import User

MODELS = ("outboxevent", "processedevent", "deadletter", "undeliverableevent", "operatoraction", "consumerpause")

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


def visible(html):
    """The text of a page as a reader sees it: without tags, whitespace collapsed."""
    text = re.sub(r"""(?s)<(script|style)\b.*?</\1>|<(?:"[^"]*"|'[^']*'|[^>"'])*>""", " ", html)
    return " ".join(unescape(text).split())


def page(client, model, **query):
    answer = client.get(reverse(f"admin:events_outbox_{model}_changelist"), query)
    assert answer.status_code == 200
    return answer.content.decode()


def rows(client, model, **query):
    """The rows of a list, each as the visible texts of its cells."""
    found = re.findall(r"(?s)<tr\b.*?</tr>", page(client, model, **query))
    return [[visible(cell) for cell in re.findall(r"(?s)<t[dh]\b.*?</t[dh]>", row)] for row in found if "<td" in row]


def ids_listed(client, model, **query):
    """The keys of the rows that a list shows, as its boxes have them."""
    boxes = re.findall(r'<input[^>]*name="_selected_action"[^>]*>', page(client, model, **query))
    return {int(re.search(r'value="(\d+)"', box)[1]) for box in boxes}


def detail(client, obj):
    url = reverse(f"admin:events_outbox_{obj._meta.model_name}_change", args=[obj.pk])
    answer = client.get(url)
    assert answer.status_code == 200
    return visible(answer.content.decode())


def ask(client, model, action, objects, **fields):
    """Choose an action: the answer is the page that says what will happen and asks, or why it will not."""
    url = reverse(f"admin:events_outbox_{model}_changelist")
    form = {"action": action, "_selected_action": [obj.pk for obj in objects], **fields}
    return client.post(url, form, follow=True)


def act(client, model, action, objects, **fields):
    """Choose an action and confirm it."""
    return ask(client, model, action, objects, confirmed="yes", **fields)


def told(answer):
    """What a page says."""
    assert answer.status_code == 200
    return visible(answer.content.decode())


def test_status_is_derived_and_filtered(operator, three_events):
    for status, event in three_events.items():
        ((*_, found),) = [rows(operator, "outboxevent", q=event.aggregate_id)]
        assert status in found
        filtered = page(operator, "outboxevent", status=status)
        assert str(event.event_id) in filtered
        others = [e for s, e in three_events.items() if s != status]
        assert all(str(other.event_id) not in filtered for other in others)


def test_an_event_is_readable(operator, three_events):
    event = three_events["published"]
    text = detail(operator, event)
    for shown in (
        '"event_type": "conversation.created"',
        '"@type": "type.googleapis.com/voicehelper.conversation.v1.ConversationCreatedPayload"',
        '"title": "hello"',
    ):
        assert shown in text
    assert "Save" not in text


def test_an_event_tells_who_handled_it(operator, three_events):
    event = three_events["published"]
    audit = handlers.consumer_named("audit")
    ConsumerProcess(audit).handle_batch(
        [Record(topic=event.topic, partition=0, offset=0, key=b"k", value=bytes(event.value))]
    )
    assert "audit handled 2" in detail(operator, event)


@pytest.mark.parametrize("field", ["event_id", "aggregate_id", "correlation_id"])
def test_search_by_each_id_uses_an_index(operator, three_events, field):
    event = three_events["published"]
    text = page(operator, "outboxevent", q=str(getattr(event, field)))
    assert str(event.event_id) in text and str(three_events["pending"].event_id) not in text
    assert str(event.event_id) not in page(operator, "outboxevent", q="nothing like it")


def test_a_condition_given_twice_takes_either_value(operator, three_events):
    url = reverse("admin:events_outbox_outboxevent_changelist")
    two = [three_events["published"], three_events["pending"]]
    changelist = operator.get(url, {"aggregate_id": [event.aggregate_id for event in two]}).context["cl"]
    assert {row.pk for row in changelist.result_list} == {event.pk for event in two}
    (chosen,) = changelist.chosen()  # what an export notes
    assert chosen.value == "c-published, c-pending"


def test_a_search_for_blanks_finds_all(operator, three_events):
    for blank in (" ", "\t "):
        assert ids_listed(operator, "outboxevent", q=blank) == {event.pk for event in three_events.values()}


@pytest.mark.parametrize(
    ("model", "query"),
    [
        ("outboxevent", {"event_type": "\0"}),
        ("outboxevent", {"topic": "a\0"}),
        ("outboxevent", {"aggregate_id": "\0"}),
        ("outboxevent", {"aggregate_id": ["\0", "a"]}),
        ("deadletter", {"reason": "\0"}),
    ],
)
def test_a_condition_that_no_row_can_meet_is_told(operator, model, query):
    url = reverse(f"admin:events_outbox_{model}_changelist")
    assert operator.get(url, query)["Location"] == f"{url}?e=1"
    assert operator.get(f"{url}export/", query).status_code == 302


def test_odd_addresses_lead_somewhere(operator):
    resume = reverse("admin:events_outbox_consumer_resume", query={"consumer": "\0"})
    assert "is not paused" in told(operator.get(resume, follow=True))
    assert operator.get("/admin/events_outbox/consumerpause/%00/change/").status_code == 302
    pause = reverse("admin:events_outbox_consumer_pause", query={"consumer": "audit"})
    operator.post(pause, {"confirmed": "yes", "reason": "bad\0 deploy"})
    assert ConsumerPause.objects.get().reason == "bad deploy"
    assert operator.get("/admin/audit/auditentry/", {"date": "1970"}).status_code == 200  # its keys begin with 1970


def test_what_a_consumer_left_that_is_no_more_is_found(operator, letters):
    """Also by event id, in the index that begins with the consumer."""
    letter = letters[0]
    for model, row in (
        ("deadletter", letter),
        ("processedevent", ProcessedEvent.objects.get(event_id=letter.event_id)),
    ):
        type(row).objects.filter(pk=row.pk).update(consumer="gone")
        url = reverse(f"admin:events_outbox_{model}_changelist")
        assert list(operator.get(url, {"q": str(letter.event_id)}).context["cl"].result_list) == [row]


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


@pytest.mark.parametrize(
    "model", ["outboxevent", "processedevent", "deadletter", "undeliverableevent", "operatoraction", "consumerpause"]
)
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
    assert "1" in rows(operator, "relaycursor")[0]
    assert "host:1" in detail(operator, RelayCursor.objects.get())


def test_redrive_marks_the_whole_key_and_is_logged(operator, three_events, emit):
    parked = UndeliverableEvent.objects.get()
    behind = UndeliverableEvent.objects.create(
        event=emit("c-parked"), topic=parked.topic, aggregate_id="c-parked", reason="behind", error="x"
    )
    asked = told(ask(operator, "undeliverableevent", "redrive", [behind]))
    assert "Events 2 Keys 1" in asked and "1 more of the same keys" in asked
    assert not UndeliverableEvent.objects.filter(redrive_requested_at__isnull=False).exists()
    assert "2 events of 1 keys" in told(act(operator, "undeliverableevent", "redrive", [behind]))
    assert UndeliverableEvent.objects.filter(redrive_requested_at__isnull=False).count() == 2
    assert "Redrive requested" in LogEntry.objects.get().change_message
    done = OperatorAction.objects.get()
    assert (done.action, done.by, done.subject) == ("undeliverable.redriven", "alice", f"undeliverable {behind.pk}")
    assert done.detail == {"events": 2, "keys": 1}


@pytest.fixture
def parked_key(three_events, emit):
    """The undeliverable event and one that waits behind it."""
    parked = UndeliverableEvent.objects.get()
    behind = UndeliverableEvent.objects.create(
        event=emit("c-parked"), topic=parked.topic, aggregate_id="c-parked", reason="behind", error="x"
    )
    return parked, behind


def confirm_discard(client, objects, reason, model="undeliverableevent"):
    return told(act(client, model, "discard", objects, reason=reason))


def test_discard_asks_for_a_reason_and_is_logged(operator, parked_key):
    parked, behind = parked_key
    answer = ask(operator, "undeliverableevent", "discard", [parked])
    asked = told(answer)
    assert "conversation.created" in asked and 'name="reason"' in answer.content.decode()
    assert "1 events of 1 keys wait for them" in asked
    assert "Say why" not in asked
    assert "Say why" in confirm_discard(operator, [parked], " ")
    assert UndeliverableEvent.objects.open().count() == 2 and not LogEntry.objects.exists()

    answer = confirm_discard(operator, [parked], "test data")
    assert "1 undeliverable events discarded; 1 events of 1 keys waited for them and are redriven" in answer
    parked.refresh_from_db()
    behind.refresh_from_db()
    assert (parked.discarded_by, parked.discard_reason) == ("alice", "test data") and parked.discarded_at
    assert behind.discarded_at is None and behind.redrive_requested_at
    entry = LogEntry.objects.get()
    assert entry.change_message == "discarded: test data" and entry.object_id == str(parked.pk)
    done = OperatorAction.objects.get()
    assert (done.action, done.by, done.reason) == ("undeliverable.discarded", "alice", "test data")
    assert "Discarded already" in confirm_discard(operator, [parked], "again")
    text = detail(operator, parked)
    assert "test data" in text and "alice" in text


def test_open_and_discarded_events_are_told_apart(operator, parked_key):
    parked, behind = parked_key
    confirm_discard(operator, [parked], "test data")

    def listed(**query):
        return ids_listed(operator, "undeliverableevent", **query)

    assert listed() == {parked.pk, behind.pk}
    assert listed(state="open") == {behind.pk} and listed(state="discarded") == {parked.pk}
    newest, oldest = rows(operator, "undeliverableevent")
    assert "to be redriven" in newest and "discarded" in oldest
    asked = told(ask(operator, "undeliverableevent", "redrive", [parked, behind]))
    assert "Not redriven: 1 that are discarded already" in asked and "stays discarded, by alice" in asked
    assert "none of them is open" in told(act(operator, "undeliverableevent", "redrive", [parked]))

    # The event itself is shown as discarded, and no more as undeliverable.
    event_id = str(parked.event.event_id)
    assert "discarded" in rows(operator, "outboxevent", q=event_id)[0]
    assert event_id in page(operator, "outboxevent", status="discarded")
    for status in ("undeliverable", "published", "pending"):
        assert event_id not in page(operator, "outboxevent", status=status)


def test_more_than_can_be_looked_at_is_not_discarded_at_once(operator, parked_key, monkeypatch):
    monkeypatch.setattr("events_outbox.admin.read_only.AT_ONCE", 1)
    answer = told(act(operator, "undeliverableevent", "discard", parked_key, reason="x"))
    assert "Select at most 1, or use `manage.py undeliverable discard`" in answer
    answer = told(act(operator, "undeliverableevent", "redrive", parked_key))
    assert 'Select at most 1, or use "Redrive by filter" or `manage.py undeliverable redrive`' in answer


def test_of_all_selected_those_that_were_shown_are_discarded(operator, parked_key, emit):
    shown = ask(operator, "undeliverableevent", "discard", parked_key, select_across="1")
    assert "Discard 2" in told(shown)
    UndeliverableEvent.objects.create(
        event=emit("c-later"), topic="conversation.events", aggregate_id="c-later", reason="OTHER", error="x"
    )
    url = reverse("admin:events_outbox_undeliverableevent_changelist")
    fields = {}
    for name, value in shown.context["hidden"]:
        fields.setdefault(name, []).append(value)
    answer = operator.post(url, {**fields, "confirmed": "yes", "reason": "junk"}, follow=True)
    assert "2 undeliverable events discarded" in told(answer)
    assert UndeliverableEvent.objects.open().get().aggregate_id == "c-later"
    # Nor does an answer that says "all" reach what nobody was shown.
    form = {"action": "discard", "_selected_action": UndeliverableEvent.objects.open().get().pk, "select_across": "1"}
    answer = operator.post(f"{url}?state=open", {**form, "confirmed": "yes", "reason": "junk"})
    assert "Discard 1" in told(answer) and UndeliverableEvent.objects.open().count() == 1


def test_a_hostile_aggregate_id_is_text_on_the_discard_page(operator, parked_key):
    parked, _ = parked_key
    UndeliverableEvent.objects.filter(pk=parked.pk).update(aggregate_id="<script>alert(1)</script>")
    asked = ask(operator, "undeliverableevent", "discard", [parked]).content.decode()
    assert "&lt;script&gt;alert(1)" in asked and "<script>alert(1)" not in asked


def test_who_may_only_look_cannot_redrive_or_discard(onlooker, parked_key):
    for word in ('value="redrive"', 'value="discard"'):
        assert word not in page(onlooker, "undeliverableevent")
    for word in ("redrive", "discard"):
        assert ask(onlooker, "undeliverableevent", word, parked_key).status_code == 403
        assert act(onlooker, "undeliverableevent", word, parked_key, reason="because").status_code == 403
    url = reverse("admin:events_outbox_redrive")
    assert onlooker.get(url).status_code == onlooker.post(url, {"confirmed": "yes"}).status_code == 403
    assert UndeliverableEvent.objects.open().filter(redrive_requested_at__isnull=True).count() == 2


class Broken(Exception):
    pass


@pytest.fixture
def parking(make_consumer):
    """A consumer that parks keys and fails on what is in `broken`, by the event's number."""
    consumer = make_consumer(on_failure="park_key", retry=RetryPolicy(max_retries=0), guard=None)
    consumer.broken, consumer.handled = {0}, []

    @consumer.handles("conversation.created")
    def on_created(event):
        if int(event.metadata["number"]) in consumer.broken:
            raise Broken("it was broken")
        consumer.handled.append(int(event.metadata["number"]))

    return consumer


@pytest.fixture
def letters(parking, emit):
    """A dead letter and one parked behind it."""
    rows = [emit("a", number) for number in range(2)]
    records = [
        Record(row.topic, 0, 5 + number, b"a", bytes(row.value), [("event_type", b"conversation.created")])
        for number, row in enumerate(rows)
    ]
    ConsumerProcess(parking).handle_batch(records)
    return list(DeadLetter.objects.order_by("id"))


def logged(letter):
    return [entry.change_message for entry in LogEntry.objects.filter(object_id=str(letter.pk)).order_by("id")]


def test_a_dead_letter_shows_what_happened(operator, letters):
    letter = letters[0]
    act(operator, "deadletter", "replay", [letter])
    text = detail(operator, letter)
    for shown in (
        "Broken: it was broken",
        '"title": "hello"',
        bytes(letter.value)[:20].hex(" "),
        "conversation.events/0/5",
        "event_type: conversation.created",
        "Traceback (most recent call last)",
        "failed, by consumer, attempt 1: Broken",
        "dead_letter.replay_failed by alice Broken: it was broken",
        "Attempts 2 ",
        "Replays 1 ",
    ):
        assert shown in text, shown
    event = reverse("admin:events_outbox_outboxevent_change", args=[OutboxEvent.objects.earliest("id").pk])
    url = reverse("admin:events_outbox_deadletter_change", args=[letter.pk])
    assert f'href="{event}"' in operator.get(url).content.decode()
    (listed,) = rows(operator, "deadletter", q=str(letter.event_id))
    assert "open" in listed and "failed" in listed


def test_a_replay_handles_what_waited_behind_too(operator, parking, letters):
    parking.broken.clear()
    asked = told(ask(operator, "deadletter", "replay", letters[:1]))
    assert "Replayed 1 Not replayed 0 Waiting behind 1" in asked and "handled again" in asked
    assert parking.handled == [] and not LogEntry.objects.exists()
    answer = told(act(operator, "deadletter", "replay", letters[:1]))
    assert "1 dead letters replayed; 1 that waited behind were handled" in answer
    assert parking.handled == [0, 1] and not DeadLetter.objects.open().exists()
    assert logged(letters[0]) == ["replayed"]
    assert OperatorAction.objects.get().by == "alice"
    asked = told(ask(operator, "deadletter", "replay", letters[:1]))
    assert "not: replayed already" in asked and "None of them can be replayed" in asked and "No, take" not in asked
    assert "replayed already" in told(act(operator, "deadletter", "replay", letters[:1]))


def test_a_replay_that_fails_is_told_and_logged(operator, parking, letters):
    answer = told(act(operator, "deadletter", "replay", letters))
    assert f"Dead letter {letters[0].pk}: Broken: it was broken" in answer
    assert "1 left alone behind a failed one of their key" in answer and "replayed;" not in answer
    assert logged(letters[0]) == ["not replayed: Broken: it was broken"] and logged(letters[1]) == []
    first = f"dead letter {letters[0].pk} of the same key comes first"
    assert first in told(ask(operator, "deadletter", "replay", letters[1:]))
    answer = told(act(operator, "deadletter", "replay", letters[1:]))
    assert f"dead letter {letters[0].pk} of the same key comes first" in answer


def test_what_was_replayed_in_vain_too_often_takes_force(operator, parking, letters, settings):
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "MAX_REPLAYS": 1}
    act(operator, "deadletter", "replay", letters[:1])
    parking.broken.clear()
    assert "replayed in vain 1 times" in told(ask(operator, "deadletter", "replay", letters[:1]))
    answer = told(act(operator, "deadletter", "replay", letters[:1]))
    assert "After 1 replays in vain a letter takes force" in answer and parking.handled == []
    act(operator, "deadletter", "replay_by_force", letters[:1])
    assert parking.handled == [0, 1]


def test_a_replay_ends_with_the_request(operator, parking, letters, monkeypatch):
    monkeypatch.setattr("events_outbox.admin.dead_letters.REQUEST_SECONDS", 0)
    parking.broken.clear()
    answer = told(act(operator, "deadletter", "replay", letters))
    assert "Stopped after 0 seconds" in answer and parking.handled == [0]
    assert [letter.state for letter in DeadLetter.objects.order_by("id")] == ["replayed", "released"]


def test_a_dead_letter_is_discarded_with_a_reason(operator, parking, letters):
    answer = ask(operator, "deadletter", "discard", letters[:1])
    asked = told(answer)
    assert "Broken: it was broken" in asked and 'name="reason"' in answer.content.decode() and "Say why" not in asked
    assert "What waits behind them in their key is handled then: 1" in asked
    assert "Say why" in confirm_discard(operator, letters[:1], " ", "deadletter")
    assert DeadLetter.objects.open().count() == 2 and not LogEntry.objects.exists()
    answer = confirm_discard(operator, letters[:1], "test data", "deadletter")
    assert "1 dead letters discarded; 1 that waited behind were handled" in answer and parking.handled == [1]
    assert logged(letters[0]) == ["discarded: test data"]
    assert "discarded by alice: test data" in detail(operator, letters[0])
    assert "is closed already; nothing was changed" in confirm_discard(operator, letters[:1], "again", "deadletter")
    action = OperatorAction.objects.exclude(action="payload.viewed").get()
    assert (action.action, action.by, action.reason) == ("dead_letter.discarded", "alice", "test data")
    for state, shown in [("discarded", letters[0]), ("replayed", letters[1]), ("open", None)]:
        assert ids_listed(operator, "deadletter", state=state) == ({shown.pk} if shown else set())


def test_what_stays_behind_another_is_not_said_to_be_handled(operator, parking, letters, emit):
    row = emit("a", 2)
    ConsumerProcess(parking).handle_batch([Record(row.topic, 0, 7, b"a", bytes(row.value))])
    first, second, _ = DeadLetter.objects.order_by("id")
    assert "handled then: 2" in told(ask(operator, "deadletter", "discard", [first]))
    assert "Waiting behind 2" in told(ask(operator, "deadletter", "replay", [first]))
    for action in ("discard", "replay"):  # the first one, which is not chosen, holds the third back
        asked = told(ask(operator, "deadletter", action, [second]))
        assert "Waiting behind 0" in asked and "handled then" not in asked and "Handled after" not in asked
    DeadLetter.objects.filter(pk=second.pk).update(value=b"junk")  # cannot be replayed: what is behind stays there
    assert "Replayed 1 Not replayed 1 Waiting behind 0" in told(ask(operator, "deadletter", "replay", [first, second]))
    assert "handled then: 1" in told(ask(operator, "deadletter", "discard", [first, second]))
    assert "is paused" not in told(ask(operator, "deadletter", "discard", [first]))
    pauses.pause(parking.name, by="alice", reason="x")
    asked = told(ask(operator, "deadletter", "discard", [first]))
    assert f"Consumer {parking.name} is paused: what waits behind them is handled after its resumption" in asked


def test_what_was_discarded_before_a_refusal_is_told_and_logged(operator, parking, letters, emit, monkeypatch):
    monkeypatch.setattr("events_outbox.letter_actions.LOCK_SECONDS", 0.2)
    parking.broken |= {2}
    row = emit("b", 2)
    ConsumerProcess(parking).handle_batch([Record(row.topic, 0, 7, b"b", bytes(row.value))])
    chosen = [letters[0], DeadLetter.objects.latest("id")]
    with open_session() as handling:
        handling.execute("SELECT pg_advisory_lock(%s)", [dead_letters._lock_id(parking.name, row.topic, b"b")])
        answer = confirm_discard(operator, chosen, "test data", "deadletter")
    assert f"The key of dead letter {chosen[1].pk} is being handled: try again; 1 of 2 were discarded" in answer
    assert "before that; 1 that waited behind were handled" in answer and parking.handled == [1]
    assert logged(chosen[0]) == ["discarded: test data"] and logged(chosen[1]) == []
    assert DeadLetter.objects.open().get() == chosen[1]


def test_of_all_selected_letters_those_that_were_shown_are_discarded(operator, parking, letters, emit):
    with CaptureQueriesContext(connection) as queries:
        shown = ask(operator, "deadletter", "discard", letters, select_across="1")
    assert "Discard 2" in told(shown)
    assert not [q["sql"] for q in queries if '"events_outbox_deadletter"."value"' in q["sql"]]  # 500 of 900 kB each
    row = emit("b", 0)
    ConsumerProcess(parking).handle_batch([Record(row.topic, 0, 7, b"b", bytes(row.value))])
    hidden = [value for name, value in shown.context["hidden"] if name == "_selected_action"]
    url = reverse("admin:events_outbox_deadletter_changelist")
    form = {**dict(shown.context["hidden"]), "_selected_action": hidden, "confirmed": "yes", "reason": "junk"}
    assert "2 dead letters discarded" in told(operator.post(url, form, follow=True))
    assert DeadLetter.objects.open().get().text_key() == "b"


def test_a_dead_letter_that_is_no_event_is_shown_and_discarded(operator):
    ConsumerProcess(handlers.consumer_named("audit")).handle_batch(
        [Record("t", 0, 0, None, b"<script>\xff", [("h", b"<b>\xff")])]
    )
    letter = DeadLetter.objects.get()
    text = detail(operator, letter)
    assert "not decodable" in text and b"<script>\xff".hex(" ") in text and "h: <b>\\xff" in text
    assert "handled then" not in told(ask(operator, "deadletter", "discard", [letter]))
    confirm_discard(operator, [letter], "junk", "deadletter")
    assert not DeadLetter.objects.open().exists()


def test_a_payload_that_nobody_knows_is_shown_in_its_event(operator, emit):
    base = BaseEvent.FromString(bytes(emit("a").value))
    base.payload.type_url, base.payload.value = "type.googleapis.com/of.Tomorrow", b"\x01\x02"
    handle = ConsumerProcess(handlers.consumer_named("audit")).handle_batch
    handle([Record("conversation.events", 0, 0, b"a", base.SerializeToString())])
    text = detail(operator, DeadLetter.objects.get())
    assert '"aggregate_id": "a"' in text and '"hex": "01 02"' in text


def test_a_consumer_is_paused_and_resumed(operator):
    which = operator.get(reverse("admin:events_outbox_consumer_pause")).content.decode()
    assert '<option value="audit">' in which
    url = reverse("admin:events_outbox_consumer_pause", query={"consumer": "audit"})
    assert "No member is running" in told(operator.get(url)) and not pauses.is_paused("audit")
    assert "Say why" in told(operator.post(url, {"confirmed": "yes", "reason": " "})) and not pauses.is_paused("audit")
    nobody = reverse("admin:events_outbox_consumer_pause", query={"consumer": "nobody"})
    assert "Select a valid choice" in told(operator.post(nobody, {"confirmed": "yes", "reason": "x"}))
    operator.post(url, {"confirmed": "yes", "reason": "bad deploy"})
    assert pauses.is_paused("audit")
    again = operator.post(url, {"confirmed": "yes", "reason": "again"}, follow=True)
    assert "Consumer audit is paused already" in told(again)
    (listed,) = rows(operator, "consumerpause")
    assert "bad deploy" in listed and "alice" in listed
    pause = ConsumerPause.objects.get()
    assert "bad deploy" in detail(operator, pause)
    assert "bad deploy" in told(ask(operator, "consumerpause", "resume", [pause])) and pauses.is_paused("audit")
    answer = told(act(operator, "consumerpause", "resume", [pause]))
    assert "Going on within about a second: audit" in answer and not pauses.is_paused("audit")
    assert [(a.action, a.by, a.reason) for a in OperatorAction.objects.order_by("id")] == [
        ("consumer.paused", "alice", "bad deploy"),
        ("consumer.resumed", "alice", ""),
    ]
    assert LogEntry.objects.filter(object_id="audit").count() == 2


def test_a_consumer_is_resumed_from_its_own_address(operator):
    url = reverse("admin:events_outbox_consumer_resume", query={"consumer": "audit"})
    assert "Consumer audit is not paused" in told(operator.get(url, follow=True))
    pauses.pause("audit", by="failure guard", reason="too many")
    assert "too many" in told(operator.get(url)) and pauses.is_paused("audit")
    operator.post(url, {"confirmed": "yes"})
    assert not pauses.is_paused("audit")


def test_the_relay_is_paused_and_resumed(operator, three_events):
    Worker.objects.create(kind="relay", name="relay", host="here", pid=7, state="leads")
    pause, resume = (reverse(f"admin:events_outbox_relay_{verb}") for verb in ("pause", "resume"))
    asked = told(operator.get(pause))
    assert "Pending events 1 Relays 1" in asked and "here:7 leads" in asked
    assert "Say why" in told(operator.post(pause, {"confirmed": "yes"})) and pauses.relay_pause() is None
    assert "The relay is not paused" in told(operator.get(resume, follow=True))
    answer = told(operator.post(pause, {"confirmed": "yes", "reason": "broker moves"}, follow=True))
    assert "The relay is paused" in answer and "Resume the relay" in answer
    assert pauses.relay_pause().reason == "broker moves"
    assert "broker moves" in detail(operator, RelayCursor.objects.get())
    assert "paused already" in told(operator.post(pause, {"confirmed": "yes", "reason": "again"}, follow=True))
    assert "broker moves" in told(operator.get(resume)) and pauses.relay_pause() is not None
    assert "Pause the relay" in told(operator.post(resume, {"confirmed": "yes"}, follow=True))
    assert pauses.relay_pause() is None
    assert [(a.action, a.by, a.reason) for a in OperatorAction.objects.order_by("id")] == [
        ("relay.paused", "alice", "broker moves"),
        ("relay.resumed", "alice", ""),
    ]
    assert LogEntry.objects.count() == 2


def test_all_that_match_a_filter_are_redriven(operator, three_events, emit):
    other, given_up = emit("c-other"), emit("c-parked")
    for event, discarded in ((other, {}), (given_up, {"discarded_at": timezone.now(), "discarded_by": "bob"})):
        key = {"topic": event.topic, "aggregate_id": event.aggregate_id}
        UndeliverableEvent.objects.create(event=event, **key, reason="OTHER", error="x", **discarded)
    assert "Redrive by filter" in visible(page(operator, "undeliverableevent"))
    url = reverse("admin:events_outbox_redrive", query={"reason": "OTHER"})
    asked = told(operator.get(url))
    assert "Events 1 Keys 1" in asked and "Not redriven: 1" in asked and "stays discarded, by bob" in asked
    assert not UndeliverableEvent.objects.filter(redrive_requested_at__isnull=False).exists()
    later = emit("c-later")
    came = UndeliverableEvent.objects.create(event=later, topic=later.topic, aggregate_id="c-later", reason="OTHER")
    again = operator.post(url, {"confirmed": "yes", "shown": "1"}, follow=True)
    assert "By now 2 events are meant, more than confirmed" in told(again) and "Redrive 2" in told(again)
    assert not UndeliverableEvent.objects.filter(redrive_requested_at__isnull=False).exists()
    came.delete()
    assert "1 events of 1 keys" in told(operator.post(url, {"confirmed": "yes", "shown": "1"}, follow=True))
    assert UndeliverableEvent.objects.get(redrive_requested_at__isnull=False).event == other
    assert OperatorAction.objects.get().subject == "filter reason=OTHER"


def test_a_letter_is_replayed_or_discarded_from_its_page(operator, onlooker, parking, letters):
    assert all(word in detail(operator, letters[0]) for word in ("Replay by force", "Discard"))
    assert "Replay by force" not in detail(onlooker, letters[0])
    replay, discard, unknown = (
        reverse("admin:events_outbox_deadletter_act", args=[letters[0].pk, action])
        for action in ("replay", "discard", "delete_selected")
    )
    assert onlooker.get(replay).status_code == onlooker.post(replay, {"confirmed": "yes"}).status_code == 403
    assert operator.get(unknown).status_code == 403
    assert "Replayed 1" in told(operator.get(replay)) and parking.handled == []
    assert "Say why" in told(operator.post(discard, {"confirmed": "yes", "reason": ""}))
    parking.broken.clear()
    answer = told(operator.post(replay, {"confirmed": "yes"}, follow=True))
    assert "1 dead letters replayed" in answer and "What happened State replayed" in answer
    assert parking.handled == [0, 1] and "Replay by force" not in answer
    gone = reverse("admin:events_outbox_deadletter_act", args=[10**6, "replay"])
    assert operator.get(gone).status_code == 404


def test_the_audit_trail_is_read_and_filtered(operator, letters):
    act(operator, "deadletter", "replay", letters[:1])
    pauses.pause("audit", by="failure guard", reason="too many")
    actions = [row[1] for row in rows(operator, "operatoraction")]
    assert actions.index("consumer.paused") < actions.index("dead_letter.replay_failed")  # the newest first
    listed = page(operator, "operatoraction", action="consumer.paused")
    assert "failure guard" in listed and f"dead letter {letters[0].pk}" not in listed
    assert "failure guard" in page(operator, "operatoraction", consumer="audit")
    assert "failure guard" not in page(operator, "operatoraction", consumer=letters[0].consumer)
    link = reverse("admin:events_outbox_deadletter_change", args=[letters[0].pk])
    assert link in page(operator, "operatoraction")
    assert "it was broken" in detail(operator, OperatorAction.objects.get(action="dead_letter.replay_failed"))
    assert {action.action for action in OperatorAction.objects.all()} <= set(ACTIONS)


def test_who_may_only_look_cannot_act_or_change(onlooker, parking, letters, three_events):
    pauses.pause("audit", by="alice", reason="bad deploy")
    parking.broken.clear()
    for word in ("replay", "replay_by_force", "discard"):
        assert f'value="{word}"' not in page(onlooker, "deadletter")
        assert act(onlooker, "deadletter", word, letters, reason="because").status_code == 403
    assert DeadLetter.objects.open().count() == 2
    assert act(onlooker, "consumerpause", "resume", [ConsumerPause.objects.get()]).status_code == 403
    assert pauses.is_paused("audit")
    for model in ("outboxevent", "deadletter", "consumerpause", "operatoraction"):
        assert onlooker.get(reverse(f"admin:events_outbox_{model}_add")).status_code == 403
    event = OutboxEvent.objects.first()
    url = reverse("admin:events_outbox_outboxevent_delete", args=[event.pk])
    assert onlooker.post(url, {"post": "yes"}).status_code == 403


def test_nobody_deletes_events_in_the_admin(operator, three_events):
    event = three_events["published"]
    url = reverse("admin:events_outbox_outboxevent_delete", args=[event.pk])
    assert operator.post(url, {"post": "yes"}).status_code == 403
    assert 'value="delete_selected"' not in page(operator, "outboxevent")
