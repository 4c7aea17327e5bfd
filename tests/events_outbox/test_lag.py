"""The lag of groups as the leading relay shows it: also of a dead consumer, never of a broker that is away."""

import itertools
import threading
import time

import pytest
from prometheus_client import REGISTRY

from events_outbox import lag
from events_outbox.handlers import consumer_named
from events_outbox.lag import Lag, LagWatch, read_lags
from events_outbox.relay import Relay
from events_outbox.status import read_status
from tests.events_outbox.conftest import eventually, in_thread
from tests.services import free_ports

pytestmark = pytest.mark.django_db(transaction=True)


def sample(name, consumer, topic=None, partition=0):
    labels = {"consumer": consumer} if topic is None else {"consumer": consumer, "topic": topic}
    return REGISTRY.get_sample_value(name, labels if topic is None else {**labels, "partition": str(partition)})


def events(group, partition=0):
    return sample("consumer_group_lag_events", group.name, group.topic, partition)


def seconds(group, partition=0):
    return sample("consumer_group_lag_seconds", group.name, group.topic, partition)


def failures(name):
    return sample("consumer_group_lag_failures_total", name) or 0


@pytest.fixture
def watch(monkeypatch):
    """Entered, but measuring only when told to."""
    monkeypatch.setattr(lag, "FIRST_SECONDS", 3600)
    with LagWatch() as watch:
        yield watch


@pytest.mark.apache_kafka
def test_a_consumer_that_nobody_runs_shows_its_lag(group, watch):
    group.write(0, 5, age_seconds=600)
    watch.measure(group.consumer)
    assert (events(group), events(group, 1)) == (5, 0)
    assert 600 <= seconds(group) < 630 and seconds(group, 1) == 0
    assert failures(group.name) == 0
    group.commit(4, 0)
    watch.measure(group.consumer)
    assert events(group) == 1 and 600 <= seconds(group) < 630
    group.commit(5, 0)
    watch.measure(group.consumer)
    assert (events(group), seconds(group)) == (0, 0)


@pytest.mark.apache_kafka
def test_a_group_that_begins_at_the_latest_has_no_lag_before_it_has_begun(group, watch):
    group.write(0, 5)
    group.consumer.start_at = "latest"
    watch.measure(group.consumer)
    assert (events(group), seconds(group)) == (0, 0)


@pytest.mark.apache_kafka
def test_series_go_while_the_broker_is_away_and_come_back_with_it(group, watch, kafka, monkeypatch, caplog):
    group.write(0, 5, age_seconds=600)
    watch.measure(group.consumer)
    first_client = watch._readers[group.name]
    monkeypatch.setattr(lag, "ANSWER_SECONDS", 0.5)
    kafka.pause()
    before = failures(group.name)
    watch.measure(group.consumer)
    watch.measure(group.consumer)
    assert (events(group), seconds(group), failures(group.name)) == (None, None, before + 2)
    assert caplog.messages.count("lag not measured") == 1
    kafka.resume()
    monkeypatch.setattr(lag, "ANSWER_SECONDS", 10)
    watch.measure(group.consumer)
    assert events(group) == 5 and 600 <= seconds(group) < 660
    assert watch._readers[group.name] is not first_client


@pytest.mark.apache_kafka
def test_whatever_happens_is_no_matter_to_the_relay(group, watch, monkeypatch):
    watch.measure(group.consumer)
    assert events(group) == 0
    monkeypatch.setattr(type(group.consumer), "topics", property(lambda consumer: 1 / 0))
    watch.measure(group.consumer)
    assert events(group) is None and failures(group.name) == 1


@pytest.mark.apache_kafka
def test_a_partition_that_went_away_has_no_series(group, watch):
    watch.measure(group.consumer)
    assert events(group, 1) == 0
    group.consumer._topics = []
    watch.measure(group.consumer)
    assert events(group, 1) is None and seconds(group, 1) is None


def test_only_the_leader_shows_lag_and_no_longer_than_it_leads(kafka, monkeypatch):
    monkeypatch.setattr(lag, "FIRST_SECONDS", 0.01)
    monkeypatch.setattr(lag, "INTERVAL_SECONDS", 1)

    def shown():
        return sample("consumer_group_lag_events", "analytics", "conversation.events")

    with in_thread(Relay()):
        eventually(lambda: shown() is not None, 60)
        eventually(lambda: sample("consumer_group_lag_events", "audit", "default.events", 5) is not None, 60)
        monkeypatch.setattr(lag, "FIRST_SECONDS", 3600)
        with in_thread(Relay()):
            eventually(lambda: read_status().standbys == 1)
            assert shown() is not None
    assert shown() is None
    # What is measured too late is not shown.
    watch = LagWatch()
    watch._ended.set()
    watch.measure(consumer_named("analytics"))
    assert shown() is None


@pytest.mark.apache_kafka  # the embedded broker cannot be paused
def test_a_silent_broker_neither_delays_the_relays_stop_nor_its_loop(kafka, monkeypatch):
    monkeypatch.setattr(lag, "FIRST_SECONDS", 0.01)
    asked, measure = threading.Event(), LagWatch.measure
    monkeypatch.setattr(LagWatch, "measure", lambda *arguments: (asked.set(), measure(*arguments)))
    ticks = []
    relay = Relay(on_tick=lambda: ticks.append(time.monotonic()))
    kafka.pause()
    with in_thread(relay) as thread:
        assert asked.wait(20)
        eventually(lambda: len(ticks) > 5)
        stopped = time.monotonic()
        relay.stop()
        thread.join(10)
        assert not thread.is_alive() and time.monotonic() - stopped < lag.ANSWER_SECONDS / 2
    assert max(after - tick for tick, after in itertools.pairwise(ticks)) < lag.ANSWER_SECONDS / 2


def test_asking_for_all_lags_is_bounded(settings):
    (port,) = free_ports(1)
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "KAFKA": {"bootstrap.servers": f"127.0.0.1:{port}"}}
    started = time.monotonic()
    lags = read_lags(0.5)
    assert time.monotonic() - started < 3
    assert list(lags) == ["analytics", "audit", "knowledge", "notification"]
    assert all(found.events is None and "Connection refused" in found.not_known for found in lags.values())


def test_without_kafka_settings_the_reason_is_told(settings):
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "KAFKA": {}}
    assert "bootstrap.servers" in read_lags(0.5)["audit"].not_known


@pytest.mark.apache_kafka
def test_asking_for_all_lags(group):
    group.write(1, 3, age_seconds=90)
    found = read_lags(10)
    assert found[group.name].events == 3 and 90 <= found[group.name].seconds < 120
    assert found["audit"] != Lag(None, None) and not found["audit"].not_known
