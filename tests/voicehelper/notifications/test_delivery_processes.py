"""`deliver_notifications` as it is run: killed while it sends, several at once, stopped, looked at."""

import signal
from collections import Counter
from datetime import timedelta

import httpx
import pytest
from django.db import connection
from django.utils import timezone

from events_outbox.models import OutboxEvent, Worker
from tests.events_outbox.conftest import eventually
from tests.faults.conftest import Processes, kill_hard
from tests.services import free_ports
from tests.voicehelper.notifications.conftest import document_failed, document_indexed, make_due
from voicehelper.notifications.models import Delivery

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def workers(tmp_path, mail_server):
    processes = Processes(tmp_path)
    processes.environment |= {
        "EMAIL_URL": f"smtp://127.0.0.1:{mail_server.port}",
        "EMAIL_FROM": "notify@example.com",
        "EMAIL_TIMEOUT_SECONDS": "10",
    }
    yield processes
    processes.end()


def states(channel):
    return Counter(Delivery.objects.filter(channel=channel).values_list("state", flat=True))


def emitted(event_type):
    return OutboxEvent.objects.filter(event_type=event_type)


def long_ago():
    """Let the time that a worker has for an attempt be over."""
    Delivery.objects.filter(state="sending").update(claimed_at=timezone.now() - timedelta(minutes=16))


def test_a_worker_killed_while_it_sends_a_mail_sends_it_at_most_once(workers, bob, mail_server):
    mail_server.answers["."] = "hang"
    document_failed(bob)
    worker = workers.manage("deliver_notifications")
    eventually(lambda: mail_server.mails, 20)
    assert states("email") == {"sending": 1}
    kill_hard(worker)
    mail_server.answers.clear()

    workers.output("deliver_notifications", "--until-idle")  # its time is not over yet
    assert states("email") == {"sending": 1}
    long_ago()
    workers.output("deliver_notifications", "--until-idle")
    delivery = Delivery.objects.get()
    assert (delivery.state, delivery.attempts) == ("failed", 1)
    assert delivery.last_error.startswith("Unknown outcome")
    assert len(mail_server.mails) == 1
    assert emitted("notification.failed").count() == 1


def test_a_worker_killed_before_it_could_send_has_its_mail_not_sent_either(workers, bob, mail_server):
    mail_server.answers["greeting"] = "hang"
    document_failed(bob)
    worker = workers.manage("deliver_notifications", "--channel", "email")
    eventually(mail_server.reached.is_set, 20)
    kill_hard(worker)
    mail_server.answers.clear()
    long_ago()
    workers.output("deliver_notifications", "--until-idle")
    assert Delivery.objects.get().state == "failed" and mail_server.mails == []


def test_a_worker_killed_while_it_posts_has_it_posted_again_by_the_same_id(workers, bob, webhook, receiver):
    receiver.hangs = True
    document_indexed(bob)
    worker = workers.manage("deliver_notifications")
    eventually(receiver.reached.is_set, 20)
    assert states("webhook") == {"sending": 1}
    kill_hard(worker)
    receiver.hangs = False
    long_ago()
    workers.output("deliver_notifications", "--until-idle")  # takes it back
    make_due()
    workers.output("deliver_notifications", "--until-idle")
    delivery = Delivery.objects.get()
    assert (delivery.state, delivery.attempts) == ("sent", 2)
    assert [headers["webhook-id"] for headers, _ in receiver.requests] == [str(delivery.id)] * 2


def test_two_workers_at_once_send_each_once(workers, alice, bob, webhook, receiver, mail_server):
    for _ in range(30):
        document_failed(bob)
    for _ in range(2):
        workers.manage("deliver_notifications")
    eventually(lambda: states("email") == {"sent": 60} and states("webhook") == {"sent": 30}, 60)
    assert len(mail_server.mails) == len({mail["Message-ID"] for mail in mail_server.mails}) == 60
    assert len(receiver.requests) == len({headers["webhook-id"] for headers, _ in receiver.requests}) == 30
    assert set(Delivery.objects.values_list("attempts", flat=True)) == {1}
    by_receiver = 90
    in_app = 60
    assert emitted("notification.sent").count() == by_receiver + in_app


def test_a_worker_told_to_stop_finishes_what_it_sends(workers, bob, mail_server):
    mail_server.answers["."] = "wait"
    document_failed(bob)
    worker = workers.manage("deliver_notifications", "--channel", "email")
    eventually(lambda: mail_server.mails, 20)
    document_failed(bob)
    worker.send_signal(signal.SIGTERM)
    mail_server.released.set()
    assert worker.wait(20) == 0
    assert states("email") == {"sent": 1, "pending": 1}


def test_an_outcome_is_not_lost_with_the_database_session(workers, bob, mail_server):
    mail_server.answers["."] = "wait"
    document_failed(bob)
    workers.manage("deliver_notifications")
    eventually(lambda: mail_server.mails, 20)
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        assert cursor.fetchone()[0] >= 2
    mail_server.released.set()
    eventually(lambda: states("email") == {"sent": 1})
    document_failed(bob)
    eventually(lambda: states("email") == {"sent": 2})


def test_a_worker_is_looked_at_and_stops_when_it_is_told_to(workers, db):
    (port,) = free_ports(1)
    worker = workers.manage("deliver_notifications", "--metrics-port", port)

    def answer(path):
        try:
            return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=5)
        except httpx.TransportError:
            return None

    eventually(lambda: answer("/livez"), 20)
    assert answer("/livez").status_code == answer("/readyz").status_code == answer("/metrics").status_code == 200

    def among_workers():
        return set(Worker.objects.alive().filter(kind="other").values_list("name", "state", "metrics_port"))

    eventually(lambda: among_workers() == {("delivery email", "works", port), ("delivery webhook", "works", port)})
    worker.terminate()
    assert worker.wait(10) == 0
    assert among_workers() == set()


def test_a_worker_says_what_went_wrong_last(workers, bob, mail_server):
    mail_server.answers["greeting"] = "421 later"
    document_failed(bob)
    workers.output("deliver_notifications", "--channel", "email", "--until-idle")
    row = Worker.objects.get(name="delivery email")
    assert (row.state, row.events_total) == ("stopped", 1)
    assert row.last_error == Delivery.objects.get().last_error != ""


def test_a_channel_alone(workers, bob, webhook, receiver, mail_server):
    document_failed(bob)
    workers.output("deliver_notifications", "--channel", "webhook", "--until-idle")
    assert states("webhook") == {"sent": 1}
    assert set(states("email")) == {"pending"} and mail_server.mails == []
