"""Settings are parsed strictly, and each system check speaks up."""

import pytest
from django.core.checks import run_checks
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, connections

from events_outbox.conf import OutboxSettings, outbox_settings
from events_outbox.kafka import producer_settings
from voicehelper.services import Services


def set_outbox(settings, **values):
    settings.EVENTS_OUTBOX = {"KAFKA": {"bootstrap.servers": "x:1"}, **values}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"BATCHSIZE": 1}, "no key 'BATCHSIZE'; it knows ACKS, ADMIN_TENANT"),
        ({"BATCH_SIZE": "500"}, "must be a int"),
        ({"BATCH_SIZE": True}, "must be a int"),
        ({"BATCH_SIZE": 0}, "1 to 10000"),
        ({"CONSUMER_BATCH_SIZE": 10_001}, "1 to 10000"),
        ({"ACKS": "2"}, '"all"'),
        ({"LEADER_POLL_SECONDS": 6}, "at most half of LEADER_SESSION_TIMEOUT_SECONDS"),
        ({"IDLE_POLL_MAX_SECONDS": 0}, "above 0"),
        ({"IDLE_POLL_MIN_SECONDS": 0}, "at most IDLE_POLL_MAX_SECONDS"),
        ({"IDLE_POLL_MIN_SECONDS": 0.2}, "at most IDLE_POLL_MAX_SECONDS"),
        ({"KAFKA": []}, "must be a dict"),
    ],
)
def test_wrong_settings_are_refused_and_checked(settings, values, says):
    set_outbox(settings, **values)
    with pytest.raises(ImproperlyConfigured, match=says):
        outbox_settings()
    assert [message.id for message in run_checks(tags=["events_outbox"])] == ["events_outbox.E002"]


def test_defaults_hold_without_settings(settings):
    del settings.EVENTS_OUTBOX
    assert outbox_settings() == OutboxSettings()
    assert run_checks(tags=["events_outbox"]) == []


def test_an_int_serves_as_seconds(settings):
    set_outbox(settings, LEADER_POLL_SECONDS=2)
    assert outbox_settings().LEADER_POLL_SECONDS == 2


def test_the_producer_is_idempotent_and_waits_outages_out(settings):
    set_outbox(settings)
    conf = producer_settings()
    assert (conf["enable.idempotence"], conf["acks"], conf["message.timeout.ms"]) == (True, "all", 0)
    assert (conf["compression.type"], conf["partitioner"]) == ("snappy", "murmur2_random")


def test_acks_1_is_warned_of(settings):
    set_outbox(settings, ACKS="1")
    assert producer_settings()["enable.idempotence"] is False
    (message,) = run_checks(tags=["events_outbox"])
    assert message.id == "events_outbox.W001" and "all" in message.hint


def test_another_database_is_an_error(settings, monkeypatch):
    monkeypatch.setattr(connections[DEFAULT_DB_ALIAS], "vendor", "sqlite")
    set_outbox(settings)
    (message,) = run_checks(tags=["events_outbox"])
    assert message.id == "events_outbox.E001" and "DATABASE_URL" in message.hint


def test_a_missing_database_says_what_to_do(settings):
    settings.SERVICES = Services()
    (message,) = run_checks(tags=["voicehelper"])
    assert message.id == "voicehelper.E001" and "make up" in message.hint


def test_the_embedded_broker_is_refused_outside_development(settings):
    settings.SERVICES = Services("postgresql://x/y", "127.0.0.1:1", kafka_is_embedded=True)
    assert run_checks(tags=["voicehelper"]) == []
    settings.IS_DEV = False
    (message,) = run_checks(tags=["voicehelper"])
    assert message.id == "voicehelper.E002" and "KAFKA_BOOTSTRAP_SERVERS" in message.hint
