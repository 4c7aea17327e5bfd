"""What becomes of a delivery: pauses, giving up, workers that die, operators."""

from datetime import timedelta

import pytest
from django.db import IntegrityError, connection, transaction
from django.utils import timezone

from events_outbox import RetryPolicy
from events_outbox.models import OperatorAction
from tests.voicehelper.notifications.conftest import (
    budget_exceeded,
    deliver,
    document_failed,
    document_indexed,
    make_due,
)
from voicehelper.notifications import deliveries, services, webhooks
from voicehelper.notifications.deliveries import (
    RETRY,
    claim_delivery,
    record_outcome,
    retry_deliveries,
    take_back_abandoned,
)
from voicehelper.notifications.models import Delivery, Notification, WebhookEndpoint
from voicehelper.notifications.outcomes import Outcome
from voicehelper.notifications.services import create_webhook, prune

BRIEF = RetryPolicy(max_retries=2, initial_delay_seconds=10, multiplier=3, max_delay_seconds=60)


@pytest.fixture
def waiting(bob, webhook):
    """A delivery to the webhook of bob's tenant."""
    document_indexed(bob)
    return Delivery.objects.get()


def seconds_until_next():
    return (Delivery.objects.get().next_attempt_at - timezone.now()).total_seconds()


def test_pauses_grow_and_the_last_failure_is_the_end(waiting, receiver, emitted):
    receiver.status = 500
    for attempt, pause in ((1, 10), (2, 30)):
        assert deliver(retry=BRIEF) == 1
        assert Delivery.objects.get().state == "pending" and Delivery.objects.get().attempts == attempt
        assert pause - 2 < seconds_until_next() <= pause
        assert deliver(retry=BRIEF) == 0
        make_due()
    assert emitted("notification.failed") == []
    deliver(retry=BRIEF)
    delivery = Delivery.objects.get()
    assert (delivery.state, delivery.attempts, delivery.last_error) == ("failed", 3, "HTTP 500")
    assert delivery.finished_at is not None
    [failed] = emitted("notification.failed")
    assert failed.aggregate_id == failed.payload.notification_id == str(delivery.id)
    assert failed.payload.recipient_id == str(delivery.endpoint_id)
    assert (failed.payload.channel, failed.payload.kind) == ("webhook", "document.indexed")
    assert (failed.payload.attempts, failed.payload.error) == (3, "HTTP 500")
    assert (failed.tenant_id, failed.causation_id) == (str(delivery.tenant_id), str(delivery.event_id))
    make_due()
    assert deliver(retry=BRIEF) == 0 and len(receiver.requests) == 3
    assert {headers["webhook-id"] for headers, _ in receiver.requests} == {str(delivery.id)}
    assert len({body for _, body in receiver.requests}) == 1


def test_the_usual_pauses():
    least, most = ([delay * part for delay in (10, 30, 90, 270, 810, 2430, 3600)] for part in (0.5, 1))
    for delays in (RETRY.delays_seconds() for _ in range(20)):
        assert all(low <= delay <= high for low, delay, high in zip(least, delays, most, strict=True))
    assert len({RETRY.delays_seconds()[0] for _ in range(20)}) > 1


def test_a_receiver_that_asks_for_more_time_gets_it(waiting, receiver):
    receiver.status, receiver.headers = 503, {"Retry-After": "120"}
    deliver(retry=BRIEF)
    assert 118 < seconds_until_next() <= 120


def test_after_a_day_it_is_given_up(waiting, receiver, emitted):
    receiver.status = 500
    deliver(retry=BRIEF)
    receiver.status = 200
    Delivery.objects.update(give_up_at=timezone.now() - timedelta(seconds=1), next_attempt_at=timezone.now())
    deliver(retry=BRIEF)
    delivery = Delivery.objects.get()
    assert (delivery.state, delivery.attempts) == ("failed", 1) and delivery.finished_at is not None
    assert delivery.last_error == "Given up: its time is over. HTTP 500"
    [failed] = emitted("notification.failed")
    assert (failed.payload.attempts, failed.payload.error) == (1, delivery.last_error)
    assert len(receiver.requests) == 1


def test_a_failure_after_a_day_is_the_last(waiting, receiver):
    claimed = claim_delivery(channel="webhook")
    Delivery.objects.update(give_up_at=timezone.now())
    record_outcome(delivery=claimed, outcome=Outcome("HTTP 500", may_try_again=True, is_receivers=True))
    assert Delivery.objects.get().state == "failed"


def test_what_waits_for_a_receiver_that_never_comes_back_does_not_pile_up(bob, webhook, receiver, emitted, monkeypatch):
    monkeypatch.setattr(deliveries, "AT_ONCE", 2)
    for _ in range(5):
        document_indexed(bob)
    receiver.status = 500
    deliver()
    Delivery.objects.update(give_up_at=timezone.now())  # they rest, and are not due
    make_due()
    deliver()
    assert set(Delivery.objects.values_list("state", flat=True)) == {"failed"}
    assert len(emitted("notification.failed")) == 5 and len(receiver.requests) == 1


def test_times_are_those_of_the_database_whatever_a_workers_clock_says(waiting, monkeypatch):
    real = timezone.now
    monkeypatch.setattr(timezone, "now", lambda: real() - timedelta(hours=1))
    claimed = claim_delivery(channel="webhook")
    assert take_back_abandoned(channel="webhook") == 0
    record_outcome(delivery=claimed, outcome=Outcome("HTTP 500", may_try_again=True, is_receivers=True), retry=BRIEF)
    monkeypatch.undo()
    assert 8 < seconds_until_next() <= 10
    assert WebhookEndpoint.objects.get().resting_until > timezone.now()


def test_one_that_arrives_at_the_second_time(waiting, receiver, emitted):
    receiver.status = 500
    deliver()
    receiver.status = 200
    make_due()
    deliver()
    delivery = Delivery.objects.get()
    assert (delivery.state, delivery.attempts, delivery.last_error) == ("sent", 2, "")
    [sent] = [event for event in emitted("notification.sent") if event.payload.channel == "webhook"]
    assert sent.payload.attempts == 2 and sent.payload.notification_id == str(delivery.id)
    assert WebhookEndpoint.objects.get().failures == 0


def test_what_else_is_for_a_receiver_that_fails_waits_and_goes_out_when_it_is_back(alice, bob, webhook, receiver):
    for _ in range(3):
        document_indexed(bob)
    receiver.status = 500
    assert deliver() == 1
    document_indexed(bob)  # what is new waits as well
    assert deliver() == 0
    assert WebhookEndpoint.objects.get().failures == 1
    make_due()
    assert deliver() == 1  # one that was not tried before: the first is perhaps what the receiver cannot stand
    assert sorted(Delivery.objects.values_list("attempts", flat=True)) == [0, 0, 1, 1]
    receiver.status = 200
    Delivery.objects.filter(pk=Delivery.objects.filter(attempts=0).first().pk).update(next_attempt_at=timezone.now())
    assert deliver() == 4
    assert not Delivery.objects.exclude(state="sent").exists()
    assert WebhookEndpoint.objects.get().resting_until is None


def test_a_receiver_that_fails_holds_up_no_other(alice, bob, webhook, receiver):
    away = create_webhook(by=alice, url="http://127.0.0.1:1/")
    document_indexed(bob)
    document_indexed(bob)
    assert deliver() == 3
    assert len(receiver.requests) == 2
    assert {delivery.endpoint for delivery in Delivery.objects.filter(state="pending")} == {away}


def test_a_receiver_that_is_slow_to_say_yes_lets_others_go_first(alice, bob, webhook):
    other = create_webhook(by=alice, url="https://example.com/", kinds=["document.failed"])
    for _ in range(3):
        document_indexed(bob)
    document_failed(bob)
    slow = claim_delivery(channel="webhook")
    record_outcome(delivery=slow, outcome=Outcome(), took_seconds=5.0)
    assert claim_delivery(channel="webhook").endpoint == other
    assert claim_delivery(channel="webhook") is None
    waiting = Delivery.objects.waiting_for(webhook.id)
    for next_attempt_at in waiting.values_list("next_attempt_at", flat=True):
        assert 3 < (next_attempt_at - timezone.now()).total_seconds() <= 5
    document_indexed(bob)  # what is new waits as well
    assert waiting.count() == 4 and claim_delivery(channel="webhook") is None


@pytest.mark.parametrize(("slow", "rests"), [(0.0, True), (60.0, False)])
def test_how_long_a_receiver_took_is_measured(waiting, monkeypatch, slow, rests):
    monkeypatch.setattr(deliveries, "SLOW_SECONDS", slow)
    deliver()
    assert (WebhookEndpoint.objects.get().resting_until is not None) == rests


def test_one_that_wants_nothing_more_is_switched_off(bob, webhook, receiver):
    document_indexed(bob)
    document_indexed(bob)
    receiver.status = 410
    make_due()
    deliver()
    assert WebhookEndpoint.objects.get().active is False
    make_due()
    deliver()
    assert len(receiver.requests) == 1
    assert {delivery.state for delivery in Delivery.objects.all()} == {"failed"}


def test_the_claim_is_committed_before_anything_is_sent(waiting, monkeypatch):
    seen = []

    def post(endpoint, delivery):
        seen.append(Delivery.objects.values_list("state", "attempts").get())
        return Outcome()

    monkeypatch.setattr(webhooks, "post", post)
    deliver()
    assert seen == [("sending", 1)]


def test_what_nobody_expected_fails_alone(bob, webhook, receiver, monkeypatch, caplog):
    document_indexed(bob)
    document_indexed(bob)
    real, broken = webhooks.post, Delivery.objects.order_by("id")[0].id

    def post(endpoint, delivery):
        if delivery.id == broken:
            raise KeyError("x")
        return real(endpoint, delivery)

    monkeypatch.setattr(webhooks, "post", post)
    assert deliver() == 2
    assert Delivery.objects.get(id=broken).state == "failed"
    assert "KeyError" in Delivery.objects.get(id=broken).last_error
    assert len(receiver.requests) == 1


# -- workers that die


def leave_behind(channel):
    """Be a worker that dies before it knows what its attempt came to, long ago."""
    claimed = claim_delivery(channel=channel)
    claimed.claimed_at = timezone.now() - timedelta(minutes=16)
    claimed.save()
    return claimed


def test_an_e_mail_that_was_left_is_not_sent_again(bob, mail_server, emitted):
    document_failed(bob)
    left = leave_behind("email")
    deliver()
    left.refresh_from_db()
    assert (left.state, left.attempts) == ("failed", 1)
    assert left.last_error.startswith("Unknown outcome: it may have been sent")
    assert mail_server.mails == []
    assert len(emitted("notification.failed")) == 1


def test_a_webhook_that_was_left_is_sent_again_by_the_same_id(waiting, receiver):
    left = leave_behind("webhook")
    deliver()
    left.refresh_from_db()
    assert (left.state, left.attempts) == ("pending", 1)
    assert WebhookEndpoint.objects.get().failures == 0  # it is not to blame
    make_due()
    deliver()
    left.refresh_from_db()
    assert (left.state, left.attempts) == ("sent", 2)
    assert receiver.requests[0][0]["webhook-id"] == str(left.id)


def test_what_is_being_sent_is_nobody_elses(waiting):
    claim_delivery(channel="webhook")
    assert claim_delivery(channel="webhook") is None
    assert take_back_abandoned(channel="webhook") == 0


def test_a_worker_that_was_thought_dead_records_nothing(bob, mail_server, emitted):
    document_failed(bob)
    left = leave_behind("email")
    take_back_abandoned(channel="email")
    assert record_outcome(delivery=left, outcome=Outcome()) is False
    assert Delivery.objects.get().state == "failed"
    assert [event for event in emitted("notification.sent") if event.payload.channel == "email"] == []


def test_nor_when_another_one_is_at_it_again(waiting):
    left = leave_behind("webhook")
    take_back_abandoned(channel="webhook")
    make_due()
    second = claim_delivery(channel="webhook")
    assert record_outcome(delivery=left, outcome=Outcome("late")) is False
    assert record_outcome(delivery=second, outcome=Outcome()) is True
    assert Delivery.objects.get().state == "sent"


def test_nor_when_an_operator_has_had_it_begun_anew(bob, mail_server):
    document_failed(bob)
    left = leave_behind("email")
    take_back_abandoned(channel="email")
    retry_deliveries(deliveries=[left], by="alice")
    second = claim_delivery(channel="email")
    assert second.attempts == left.attempts
    assert record_outcome(delivery=left, outcome=Outcome("late", may_try_again=True)) is False
    assert record_outcome(delivery=second, outcome=Outcome()) is True


# -- what is kept


def test_what_is_done_and_old_is_deleted(alice, bob, webhook, monkeypatch):
    for _ in range(3):
        document_failed(bob)
    first, second, _ = Delivery.objects.filter(channel="webhook").order_by("id")
    Delivery.objects.filter(id=first.id).update(state="sent")
    Delivery.objects.filter(id=second.id).update(state="failed")
    assert prune() == 0
    monkeypatch.setattr(services, "DELIVERIES_KEPT", timedelta(days=-1))
    assert prune() == 2
    assert not Delivery.objects.filter(id__in=[first.id, second.id]).exists()
    assert Delivery.objects.filter(state="pending").count() == Delivery.objects.count() == 7
    monkeypatch.setattr(services, "NOTIFICATIONS_KEPT", timedelta(days=-1))
    assert prune() == 0  # of each there is still an e-mail under way
    Delivery.objects.update(state="sent")
    deliver()
    assert not Delivery.objects.exists() and not Notification.objects.exists()


def test_so_many_at_once_are_deleted_at_most(bob, webhook, monkeypatch):
    for _ in range(3):
        document_indexed(bob)
    Delivery.objects.update(state="sent")
    monkeypatch.setattr(services, "DELIVERIES_KEPT", timedelta(days=-1))
    assert [prune(at_once=2), prune(at_once=2)] == [2, 1]


# -- operators


def test_an_operator_has_a_failed_one_tried_again(waiting, receiver):
    receiver.status = 500
    deliver(retry=RetryPolicy(max_retries=0))
    Delivery.objects.update(give_up_at=timezone.now())
    receiver.status = 200
    [retried] = retry_deliveries(deliveries=[Delivery.objects.get()], by="alice")
    assert (retried.state, retried.attempts) == ("pending", 0)
    assert retried.give_up_at > timezone.now()
    deliver()
    assert Delivery.objects.get().state == "sent"
    action = OperatorAction.objects.get()
    assert (action.action, action.subject, action.by) == ("delivery.retried", str(retried.id), "alice")
    assert action.detail == {"kind": "document.indexed"}


@pytest.mark.parametrize("state", ["pending", "sending", "sent"])
def test_only_failed_ones_are_tried_again(waiting, state):
    Delivery.objects.update(state=state)
    assert retry_deliveries(deliveries=[Delivery.objects.get()], by="alice") == []
    assert Delivery.objects.get().state == state


# -- the table


def test_one_event_makes_one_delivery_a_receiver(alice, bob, webhook):
    document_failed(bob)
    for delivery in Delivery.objects.all():
        delivery.pk = None
        with pytest.raises(IntegrityError), transaction.atomic():
            delivery.save(force_insert=True)


def test_a_delivery_has_one_receiver(alice, bob, webhook):
    document_failed(bob)
    mail = Delivery.objects.filter(channel="email").first()
    for changes in ({"endpoint": webhook}, {"recipient": None}, {"channel": "webhook"}, {"notification": None}):
        with pytest.raises(IntegrityError), transaction.atomic():
            Delivery.objects.filter(pk=mail.pk).update(**changes)


@pytest.fixture
def many(alice, webhook):
    """As many deliveries as it takes for the planner to mind, nearly all of them sent."""
    columns = (
        "id, tenant_id, channel, kind, event_id, correlation_id, endpoint_id, subject, body, body_html, state,"
        " attempts, next_attempt_at, give_up_at, claimed_at, last_error, created_at"
    )
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO notifications_delivery ({columns})"
            " SELECT gen_random_uuid(), %s, 'webhook', 'document.indexed', gen_random_uuid(), '', %s, '', '', '',"
            " CASE WHEN n %% 1000 = 0 THEN 'pending' WHEN n %% 1000 = 1 THEN 'sending' ELSE 'sent' END,"
            " 1, now(), now() + interval '1 day', now(), '', now() FROM generate_series(1, 20000) n",
            [webhook.tenant_id, webhook.id],
        )
        cursor.execute("ANALYZE notifications_delivery")


@pytest.mark.parametrize("query", ["due", "overdue", "waiting", "under_way"])
def test_the_workers_question_is_answered_by_an_index(many, webhook, query):
    rows = {
        "due": Delivery.objects.due("webhook")[:1],
        "overdue": Delivery.objects.overdue("webhook")[:100],
        "waiting": Delivery.objects.waiting_for(webhook.id),
        "under_way": Delivery.objects.abandoned("webhook", deliveries.LEASE["webhook"])[:100],
    }[query]
    plan = rows.explain()
    assert f"delivery_{query}" in plan and "Seq Scan" not in plan
    assert "Sort" not in plan or query == "waiting"


def test_no_words_of_users_are_logged(bob, alice, webhook, receiver, mail_server, caplog):
    caplog.set_level("DEBUG")
    document_failed(bob, title="Secret Plan", error="it says Eyes Only")
    budget_exceeded(bob.tenant)
    mail_server.answers["."] = "550 Secret Plan refused"
    receiver.status, receiver.body = 410, b"We do not want the Secret Plan."
    deliver()
    assert len(retry_deliveries(deliveries=Delivery.objects.all(), by="alice")) == 4
    assert "delivery attempted" in caplog.text and "operator action" in caplog.text
    told = str([record.__dict__ for record in caplog.records if not record.name.startswith("django.db")])
    for words in ("Secret Plan", "Eyes Only", "example.com", receiver.url):
        assert words not in told
