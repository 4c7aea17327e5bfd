"""An event's page and its fragment: who may see what of it, what it shows of any event, and where it leads."""

import html
import re
import uuid

import pytest
from django.contrib.auth.models import Permission
from django.db import connection, transaction
from django.test import Client
from django.urls import reverse
from google.protobuf.any_pb2 import Any
from google.protobuf.timestamp_pb2 import Timestamp

from events_outbox import emit_event, emit_events, pauses
from events_outbox.admin import kafka_answers
from events_outbox.admin.event_page import SHOWN_SIBLINGS
from events_outbox.admin.payload import NOT_SHOWN
from events_outbox.emit import NewEvent
from events_outbox.fields import PgSnapshot
from events_outbox.models import (
    DeadLetter,
    OperatorAction,
    OutboxEvent,
    ProcessedEvent,
    RelayCursor,
    UndeliverableEvent,
)
from events_outbox.proto.base_event_pb2 import BaseEvent
from events_outbox.relay import Relay
from events_outbox.replay import Replay, Selection
from voicehelper.identity.models import User
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload

pytestmark = pytest.mark.django_db(transaction=True)

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture(autouse=True)
def kafka_is_asked_anew():
    kafka_answers.forget()


@pytest.fixture
def with_kafka(kafka, settings):
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "KAFKA_IS_EMBEDDED": kafka.kind != "apache"}
    return kafka


def client_of(user):
    client = Client()
    client.force_login(user)
    return client


@pytest.fixture
def alice():
    """She may do everything."""
    return client_of(User.objects.create_superuser("alice", password="x"))


def staff(name, *codenames, **fields):
    user = User.objects.create_user(name, password="x", is_staff=True, **fields)
    permissions = Permission.objects.filter(content_type__app_label="events_outbox", codename__in=codenames)
    assert len(permissions) == len(codenames)
    user.user_permissions.set(permissions)
    return client_of(user)


def page_url(event):
    return reverse("admin:events_outbox_outboxevent_change", args=[event.pk])


def fragment_url(event):
    return reverse("admin:events_outbox_outboxevent_life_line", args=[event.pk])


def source(client, url):
    answer = client.get(url)
    assert answer.status_code == 200
    return answer.content.decode()


def text_of(source):
    """What is read on the page."""
    source = re.sub(r"(?s)<(script|style|noscript).*?</\1>", "", source)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", source)).split())


def page(client, event):
    return text_of(source(client, page_url(event)))


def states(source):
    """By step or consumer, the state that the life line gives it."""
    found = re.findall(r'data-(?:step|consumer)="([^"]+)" data-state="([^"]+)"', source)
    return dict(found)


def pass_all():
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_current_snapshot()::text")
        RelayCursor.objects.update(published=PgSnapshot.parse(cursor.fetchone()[0]))


def test_the_page_shows_the_event(alice, emit):
    event = emit("c1", user_id="u-7", correlation_id="req-9", causation_id=str(uuid.uuid4()))
    base = BaseEvent.FromString(bytes(event.value))
    text = page(alice, event)
    for shown in (
        base.event_id,
        "conversation.created",
        "v1",
        "c1",
        "t1",
        "u-7",
        base.timestamp.ToJsonString(),
        "voicehelper.conversation.v1.ConversationCreatedPayload",
        "number: 0",
        "req-9",
        base.causation_id,
        '"title": "hello"',
        f"{len(event.value)} bytes",
        str(event.transaction_id),
        "waits for the relay",
        "trace none",
    ):
        assert shown in text, shown
    assert 'name="_save"' not in source(alice, page_url(event))


def test_the_first_paint_asks_kafka_nothing(alice, emit, monkeypatch):
    def never(event):
        raise AssertionError("Kafka was asked")

    monkeypatch.setattr(kafka_answers, "ask_kafka", never)
    event = emit("c1")
    pass_all()
    assert "Kafka is being asked" in page(alice, event)


def test_the_fragment_follows_an_event_on_its_way(alice, emit, with_kafka):
    event = emit("c1")
    before = source(alice, fragment_url(event))
    assert states(before)["published"] == "pending" and 'data-settled="false"' in before
    Relay().run(until_empty=True)
    kafka_answers.forget()
    after = source(alice, fragment_url(event))
    assert states(after)["published"] == "published" and states(after)["analytics"] == "waiting"
    text = text_of(after)
    assert "conversation.events/" in text and "content-type application/x-protobuf" in text
    for consumer in ("analytics", "audit", "notification"):
        ProcessedEvent.objects.create(consumer=consumer, event_id=event.event_id)
    done = source(alice, fragment_url(event))
    assert states(done)["analytics"] == "handled" and 'data-settled="true"' in done
    assert "published, handled by" in text_of(done)


def test_a_record_is_shown_with_each_of_its_copies(alice, emit, with_kafka):
    event = emit("c1")
    Relay().run(until_empty=True)
    with Replay(Selection(event_ids=[event.event_id])) as again:
        again.publish()
    text = text_of(source(alice, fragment_url(event)))
    assert "published at conversation.events/" in text and "published again at conversation.events/" in text


def test_kafka_that_is_away_holds_nothing_up_and_is_asked_seldom(alice, emit, with_kafka, monkeypatch):
    event = emit("c1")
    Relay().run(until_empty=True)
    with_kafka.stop()
    assert "Kafka does not answer" in text_of(source(alice, fragment_url(event)))
    monkeypatch.setattr(kafka_answers, "ask_kafka", None)
    assert "Kafka does not answer" in text_of(source(alice, fragment_url(event)))


def test_a_paused_relay_is_named(alice, emit):
    pauses.pause_relay(by="alice", reason="maintenance of Kafka")
    assert "maintenance of Kafka" in page(alice, emit("c1"))


def test_an_undeliverable_event_leads_to_where_something_can_be_done(alice, emit):
    event = emit("c1")
    parked = UndeliverableEvent.objects.create(
        event=event, topic=event.topic, aggregate_id="c1", reason="MSG_SIZE_TOO_LARGE", error="too large"
    )
    for url in (page_url(event), fragment_url(event)):
        shown = source(alice, url)
        assert states(shown)["published"] == "undeliverable" and 'data-settled="true"' in shown
        assert reverse("admin:events_outbox_undeliverableevent_change", args=[parked.pk]) in shown
        assert "refused by Kafka (MSG_SIZE_TOO_LARGE)" in text_of(shown)
    assert 'id="replay"' not in source(alice, page_url(event))


def keep_letter(event, **fields):
    fields = {"reason": "failed", "error": "KeyError: 'secret'", "attempts": 4} | fields
    return DeadLetter.objects.create(
        consumer="analytics", event_id=event.event_id, event_type=event.event_type, tenant_id="t1", topic=event.topic,
        partition=0, offset=0, key=b"c1", value=bytes(event.value), **fields,
    )  # fmt: skip


def test_a_dead_letter_leads_to_its_page(alice, emit):
    event = emit("c1")
    pass_all()
    letter = keep_letter(event)
    ProcessedEvent.objects.create(consumer="analytics", event_id=event.event_id)
    shown = source(alice, page_url(event))
    assert states(shown)["analytics"] == "dead-letter"
    assert reverse("admin:events_outbox_deadletter_change", args=[letter.pk]) in shown
    assert "KeyError: 'secret'" in text_of(shown)


def test_who_may_not_see_dead_letters_sees_that_there_is_one(emit):
    event = emit("c1")
    pass_all()
    keep_letter(event)
    shown = source(staff("bob", "view_outboxevent"), page_url(event))
    assert states(shown)["analytics"] == "dead-letter"
    assert "KeyError" not in text_of(shown) and "events_outbox/deadletter/" not in shown.partition('id="event"')[2]


def test_the_payload_takes_a_permission(emit):
    event = emit("c1")
    text = page(staff("bob", "view_outboxevent"), event)
    assert NOT_SHOWN in text and '"title"' not in text
    assert '"number": "0"' in text and "ConversationCreatedPayload" in text
    assert not OperatorAction.objects.filter(action="payload.viewed").exists()


def test_to_see_a_payload_is_noted(emit):
    event = emit("c1")
    client = staff("bob", "view_outboxevent", "view_payload")
    assert '"title": "hello"' in page(client, event)
    action = OperatorAction.objects.get(action="payload.viewed")
    assert (action.subject, action.by) == (f"event {event.event_id}", "bob")


def test_the_fragment_holds_no_payload_and_notes_nothing(alice, emit, with_kafka):
    event = emit("c1")
    assert "hello" not in source(alice, fragment_url(event))
    assert not OperatorAction.objects.exists()


@pytest.mark.parametrize("url_of", [page_url, fragment_url])
def test_without_the_permission_to_view_there_is_no_page(emit, url_of):
    assert staff("bob", "view_deadletter").get(url_of(emit("c1"))).status_code == 403
    anonymous = Client().get(url_of(OutboxEvent.objects.get()))
    assert anonymous.status_code == 302 and "login" in anonymous["Location"]


def their_tenant(user):
    return None if user.username == "alice" else "t1"


def test_the_staff_of_a_tenant_sees_its_events_alone(alice, emit, settings):
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "ADMIN_TENANT": f"{__name__}.their_tenant"}
    with transaction.atomic():
        own = emit("c1", correlation_id="shared")
        payload = ConversationCreatedPayload(conversation_id="foreign")
        foreign = emit_event(
            "conversation.created", payload, aggregate_id="foreign-1", tenant_id="t2", correlation_id="shared"
        )
    pauses.pause_relay(by="alice", reason="maintenance of Kafka")
    bob = staff("bob", "view_outboxevent")
    text = page(bob, own)
    assert "foreign-1" not in text and "maintenance" not in text and "no other event" in text
    assert bob.get(fragment_url(foreign)).status_code == 404
    assert bob.get(page_url(foreign)).status_code == 302
    by_id = bob.get(reverse("admin:events_outbox_outboxevent_by_event_id", args=[foreign.event_id]))
    assert by_id["Location"] == reverse("admin:events_outbox_outboxevent_changelist")
    assert page(alice, own).count("foreign-1") == 2


def test_an_event_that_is_not_there(alice):
    assert alice.get(reverse("admin:events_outbox_outboxevent_life_line", args=[10**15])).status_code == 404
    assert alice.get(reverse("admin:events_outbox_outboxevent_life_line", args=["none"])).status_code == 404
    answer = alice.get(reverse("admin:events_outbox_outboxevent_change", args=[10**15]), follow=True)
    assert "Perhaps it was deleted?" in answer.content.decode()


def test_an_event_is_reached_by_its_id(alice, emit):
    event = emit("c1")
    answer = alice.get(reverse("admin:events_outbox_outboxevent_by_event_id", args=[event.event_id]))
    assert answer["Location"] == page_url(event)


def test_of_a_pruned_event_the_dead_letter_remains(alice, emit):
    event = emit("c1")
    letter = keep_letter(event)
    event_id = event.event_id
    event.delete()
    answer = alice.get(reverse("admin:events_outbox_outboxevent_by_event_id", args=[event_id]), follow=True)
    text = answer.content.decode()
    assert f"There is no event {event_id}: it may have been pruned." in text
    assert reverse("admin:events_outbox_deadletter_change", args=[letter.pk]) in text
    assert str(event_id) in source(alice, reverse("admin:events_outbox_deadletter_change", args=[letter.pk]))


@pytest.mark.parametrize("url", ["", "https://jaeger.example.org", "https://jaeger.example.org/"])
def test_the_trace_leads_to_jaeger_where_there_is_one(alice, emit, settings, url):
    settings.MONITORING = {**settings.MONITORING, "JAEGER_URL": url}
    event = emit("c1")
    OutboxEvent.objects.update(traceparent=f"00-{TRACE}-00f067aa0ba902b7-01", baggage="a=b")
    shown = source(alice, page_url(event))
    assert TRACE in text_of(shown) and "a=b" in text_of(shown)
    assert (f'href="https://jaeger.example.org/trace/{TRACE}" rel="noopener noreferrer"' in shown) == bool(url)


def test_a_trace_that_is_none_is_shown_as_such(alice, emit):
    event = emit("c1")
    OutboxEvent.objects.update(traceparent="00-javascript:alert(1)")
    assert "trace not readable: 00-javascript:alert(1)" in page(alice, event)


def test_replay_is_for_those_who_may_and_for_what_is_published(alice, emit):
    event = emit("c1")
    assert 'id="replay"' not in source(alice, page_url(event))
    pass_all()
    shown = source(alice, page_url(event))
    assert 'id="replay"' in shown and f"?event_id={event.event_id}" in shown
    assert 'id="replay"' not in source(staff("bob", "view_outboxevent"), page_url(event))


def test_the_other_events_of_its_transaction_are_bounded(alice):
    with transaction.atomic():
        events = emit_events(
            NewEvent(
                event_type="conversation.created",
                payload=ConversationCreatedPayload(),
                aggregate_id=f"c{n}",
                tenant_id="t1",
            )
            for n in range(SHOWN_SIBLINGS + 2)
        )
    first = OutboxEvent.objects.order_by("id").first()
    text = page(alice, first).partition("same transaction")[2].partition("Payload")[0]
    assert text.count("conversation.created") == SHOWN_SIBLINGS and text.endswith("and more ")
    assert len(events) == SHOWN_SIBLINGS + 2


def test_the_tree_shows_causes(alice, emit):
    root = emit("c-root", correlation_id="req-1")
    child = emit("c-child", correlation_id="req-1", causation_id=str(root.event_id))
    emit("c-leaf", correlation_id="req-1", causation_id=str(child.event_id))
    tree = text_of(source(alice, page_url(child)).partition('id="correlation"')[2].partition("</ol>")[0])
    assert re.search("Level 1: .*c-root.* Level 2: .*this event.*c-child.* Level 3: .*c-leaf", tree)


def test_the_number_of_queries_does_not_grow_with_the_group(alice, emit, django_assert_max_num_queries):
    event = emit("c1", correlation_id="req-1")
    for _ in range(30):
        emit("c1", correlation_id="req-1")
    with django_assert_max_num_queries(25):
        page(alice, event)


def as_row(value, **fields):
    columns = {
        "event_id": uuid.uuid4(),
        "event_type": "conversation.created",
        "event_version": "v1",
        "aggregate_id": "c1",
        "tenant_id": "t1",
        "topic": "conversation.events",
        "correlation_id": "r",
    }
    return OutboxEvent.objects.create(value=value, **(columns | fields))


def base_event(**fields):
    return BaseEvent(event_id=str(uuid.uuid4()), event_type="conversation.created", event_version="v1", **fields)


TYPE_URL = "type.googleapis.com/voicehelper.conversation.v1.ConversationCreatedPayload"
HTML = "<script>alert(1)</script><img src=x onerror=alert(2)>"
HOSTILE = {
    "html": base_event(
        aggregate_id=HTML, user_id=HTML, metadata={HTML: HTML}, correlation_id=HTML, causation_id=HTML
    ).SerializeToString(),
    "no event": b"\xff\xfe<script>",
    "empty": b"",
    "invalid utf-8": b"\x0a\x02\xff\xfe",
    "unknown message": base_event(payload=Any(type_url="x/never.Seen", value=b"\x01<b>")).SerializeToString(),
    "damaged payload": base_event(
        payload=Any(
            type_url="type.googleapis.com/voicehelper.conversation.v1.ConversationCreatedPayload", value=b"\xff"
        )
    ).SerializeToString(),
    "impossible time": base_event(timestamp=Timestamp(seconds=10**15)).SerializeToString(),
    "turned direction": base_event(aggregate_id="\u202egnp.exe").SerializeToString(),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_events_are_shown_safely(alice, with_kafka, kind):
    event = as_row(HOSTILE[kind], event_type=HTML[:100], aggregate_id=HTML, correlation_id=HTML)
    for url in (page_url(event), fragment_url(event)):
        shown = source(alice, url)
        assert "<script>alert" not in shown and "<img src=x" not in shown and "\u202e" not in shown
    assert "conversation.events" in page(alice, event)


def test_what_is_no_event_is_shown_as_bytes_to_those_who_may(alice):
    event = as_row(HOSTILE["no event"])
    assert "ff fe 3c 73" in page(alice, event)
    text = page(staff("bob", "view_outboxevent"), event)
    assert "ff fe" not in text and NOT_SHOWN in text and "no BaseEvent" in text


def test_a_large_event_is_cut_and_that_is_said(alice):
    with transaction.atomic():
        event = emit_event(
            "conversation.created",
            ConversationCreatedPayload(title="y" * 880_000),
            aggregate_id="c1",
            tenant_id="t1",
        )
    shown = source(alice, page_url(event))
    assert len(shown) < 400_000 and "more characters are not shown" in shown
