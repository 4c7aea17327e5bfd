"""outbox_status and the metrics that are read from the database."""

import json

import pytest
from django.core.management import CommandError, call_command
from prometheus_client import CollectorRegistry

from events_outbox.consumer import ConsumerProcess
from events_outbox.handlers import consumer_named
from events_outbox.models import OutboxEvent, RelayCursor
from events_outbox.records import Record
from events_outbox.relay import Relay
from events_outbox.status import StatusCollector, count_pending
from tests.events_outbox.conftest import eventually, in_thread
from voicehelper.services import Services, find_services, write_services

pytestmark = pytest.mark.django_db(transaction=True)


def status(capsys):
    call_command("outbox_status", json=True)
    return json.loads(capsys.readouterr().out)


def sample(name, **labels):
    registry = CollectorRegistry()
    registry.register(StatusCollector())
    return registry.get_sample_value(name, labels)


def test_pending_events_and_their_age(emit, capsys):
    assert status(capsys)["pending"] == 0 and status(capsys)["oldest_pending_age_seconds"] is None
    row = emit("c1")
    OutboxEvent.objects.filter(pk=row.pk).update(created_at="2026-01-01T00:00:00Z")
    emit("c2")
    shown = status(capsys)
    assert shown["pending"] == 2 and shown["oldest_pending_age_seconds"] > 86_400
    assert shown["leader"] is None and shown["standbys"] == 0
    assert sample("outbox_pending_events") == 2
    assert sample("outbox_oldest_pending_age_seconds") > 86_400


def test_counting_stops_at_the_limit(emit):
    for number in range(5):
        emit(f"c{number}")
    assert count_pending(RelayCursor.read(), 3)[0] == 3


def test_the_leader_and_its_standbys_are_seen(kafka, capsys):
    with in_thread(Relay()):
        assert eventually(lambda: (s := status(capsys))["leader"] and s)["standbys"] == 0
        with in_thread(Relay()):
            eventually(lambda: status(capsys)["standbys"] == 1)
    assert status(capsys)["leader"] is None


def test_open_dead_letters_are_counted_by_consumer(capsys):
    ConsumerProcess(consumer_named("audit")).handle_batch(
        [Record(topic="t", partition=0, offset=n, key=None, value=b"junk") for n in range(2)]
    )
    assert status(capsys)["dead_letters"] == {"audit": 2}
    assert sample("consumer_dead_letters", consumer="audit") == 2


def test_the_status_for_people(emit, capsys):
    emit("c1")
    call_command("outbox_status")
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    assert lines["pending"].strip() == "1"


def test_commands_say_what_is_wrong(kafka):
    with pytest.raises(CommandError, match="registered: analytics, audit, notification"):
        call_command("consume", "nobody")
    with pytest.raises(CommandError, match="--unhandled"):
        call_command("replay_outbox")


def test_nothing_is_replayed_beside_a_leading_relay(kafka, capsys):
    with in_thread(Relay()):
        eventually(lambda: status(capsys)["leader"])
        with pytest.raises(CommandError, match="a relay leads: stop it first"):
            call_command("replay_outbox", unhandled=True)


def test_create_topics_again_changes_nothing(kafka, capsys):
    call_command("create_topics")
    assert "exist" in capsys.readouterr().out or kafka.kind == "embedded"


@pytest.mark.apache_kafka
def test_a_topic_with_too_few_partitions_is_an_error(kafka, settings):
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "TOPIC_PARTITIONS": 7}
    with pytest.raises(CommandError, match="6 partitions, fewer than the 7"):
        call_command("create_topics")


def test_services_are_found_in_the_environment_first(tmp_path, monkeypatch):
    monkeypatch.setattr("voicehelper.services.DATA_DIR", tmp_path)
    monkeypatch.setattr("voicehelper.services.SERVICES_FILE", tmp_path / "services.json")
    for name in ("DATABASE_URL", "KAFKA_BOOTSTRAP_SERVERS"):
        monkeypatch.delenv(name)
    assert find_services() == Services()
    written = Services("postgresql://a/b", "127.0.0.1:9", kafka_is_embedded=True)
    write_services(written)
    assert find_services() == written
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "kafka:9092")
    assert find_services() == Services("postgresql://a/b", "kafka:9092", kafka_is_embedded=False)
    (tmp_path / "services.json").write_text("{")
    with pytest.raises(ValueError, match="delete it and run `make up` again"):
        find_services()
