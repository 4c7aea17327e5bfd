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
from voicehelper.notifications import deliveries, webhooks
from voicehelper.notifications.deliveries import (
    RETRY,
    claim_delivery,
    record_outcome,
    retry_deliveries,
    take_back_abandoned,
)
from voicehelper.notifications.models import Delivery, WebhookEndpoint
from voicehelper.notifications.outcomes import Outcome
from voicehelper.notifications.services import create_webhook

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


def test_after_a_day_it_is_given_up(waiting, receiver):
    receiver.status = 500
    Delivery.objects.update(give_up_at=timezone.now() - timedelta(seconds=1))
    deliver()
    assert Delivery.objects.get().state == "failed"


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
    Delivery.objects.filter(id=claimed.id).update(claimed_at=timezone.now() - timedelta(minutes=6))
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
    assert action.detail == {"error": "HTTP 500"}


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


@pytest.mark.parametrize("query", ["due", "abandoned"])
def test_the_workers_question_is_answered_by_an_index(db, query):
    rows = (
        Delivery.objects.due("email")[:1]
        if query == "due"
        else Delivery.objects.abandoned("email", deliveries.LEASE)[:100]
    )
    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL enable_seqscan = off")
    plan = rows.explain()
    assert {"due": "delivery_due", "abandoned": "delivery_under_way"}[query] in plan
    assert "Sort" not in plan


def test_no_words_of_users_are_logged(bob, alice, webhook, receiver, mail_server, caplog):
    caplog.set_level("DEBUG", "voicehelper")
    document_failed(bob, title="Secret Plan", error="it says Eyes Only")
    budget_exceeded(bob.tenant)
    mail_server.answers["."] = "550 Secret Plan refused"
    receiver.status = 500
    deliver()
    assert "delivery attempted" in caplog.text
    told = caplog.text + str([record.__dict__ for record in caplog.records if record.name.startswith("voicehelper")])
    for words in ("Secret Plan", "Eyes Only", "example.com", receiver.url):
        assert words not in told
