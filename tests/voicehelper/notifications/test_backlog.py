"""What waits to be sent, as the console and Prometheus see it."""

from datetime import timedelta

import pytest
from django.db import connection
from django.utils import timezone

from monitoring.metrics import exposition
from tests.voicehelper.notifications.conftest import document_failed
from voicehelper.notifications.backlog import Backlog, read_backlog
from voicehelper.notifications.models import Channel, Delivery

pytestmark = pytest.mark.django_db


def due(delivery, *, ago, attempts=0, state="pending"):
    delivery.next_attempt_at, delivery.attempts, delivery.state = timezone.now() - ago, attempts, state
    delivery.save()


def test_nothing_waits():
    assert read_backlog() == [Backlog(Channel.EMAIL, 0, 0, 0.0), Backlog(Channel.WEBHOOK, 0, 0, 0.0)]


def test_what_waits_what_failed_before_and_how_long_one_has_been_due(bob, webhook):
    for _ in range(4):
        document_failed(bob)
    late, later, sent, sending = Delivery.objects.filter(channel="email", recipient=bob).order_by("id")
    Delivery.objects.filter(channel="email").exclude(recipient=bob).delete()
    due(late, ago=timedelta(minutes=7))
    due(later, ago=timedelta(minutes=-5), attempts=2)
    due(sent, ago=timedelta(hours=1), attempts=1, state="sent")
    due(sending, ago=timedelta(hours=2), attempts=1, state="sending")
    email, webhooks = read_backlog()
    assert (email.pending, email.failing) == (2, 1)
    assert 420 <= email.overdue_seconds < 440
    assert (webhooks.pending, webhooks.failing) == (4, 0)


def test_what_is_tried_again_later_is_not_overdue(bob):
    document_failed(bob)
    for delivery in Delivery.objects.all():
        due(delivery, ago=timedelta(minutes=-5), attempts=1)
    assert read_backlog()[0].overdue_seconds == 0.0


@pytest.mark.django_db(transaction=True)
def test_it_is_among_the_metrics_of_every_process(bob):
    document_failed(bob)
    Delivery.objects.exclude(recipient=bob).delete()
    text = exposition()[0].decode()
    assert 'notification_deliveries_pending{channel="email"} 1.0' in text
    assert 'notification_deliveries_failing{channel="email"} 0.0' in text
    assert 'notification_deliveries_overdue_seconds{channel="webhook"} 0.0' in text
    assert 'monitoring_collector_up{collector="BacklogCollector"} 1.0' in text


def test_it_is_read_along_the_index_of_what_is_due():
    pending = Delivery.objects.filter(state="pending", channel="email").order_by("next_attempt_at", "attempts", "id")
    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL enable_seqscan = off")
        cursor.execute("SET LOCAL enable_sort = off")
    assert "delivery_due" in pending[:10].explain()
