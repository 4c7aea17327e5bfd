"""Offsets of a group: shown whether or not anybody runs, and reset while nobody does."""

import json
import os
import time
from datetime import timedelta

import pytest
from confluent_kafka.admin import AclOperation, ResourceType
from django.core.management import CommandError, call_command
from django.db import connection
from django.utils import timezone

from events_outbox import Consumer, handlers, offsets
from events_outbox.consumer import ConsumerProcess
from events_outbox.handlers import consumer_named
from events_outbox.lag import total
from events_outbox.management.commands import consumer_offsets
from events_outbox.models import OperatorAction, ProcessedEvent
from events_outbox.offsets import (
    OffsetsNotKnown,
    ResetRefused,
    plan_reset,
    read_group,
    read_offsets,
    require_no_members,
    reset,
)
from events_outbox.relay import Relay
from tests.events_outbox.conftest import eventually, in_thread
from tests.services import TOPICS, free_ports
from voicehelper.devstack.embedded_broker import EmbeddedBroker

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.apache_kafka]


def kafka_at(settings, servers, **more):
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "KAFKA": {"bootstrap.servers": servers}, **more}


def run(capsys, *arguments):
    call_command("consumer_offsets", *map(str, arguments))
    return capsys.readouterr().out


def shown(capsys, group):
    return json.loads(run(capsys, group.name, "show", "--json"))


def lags(group):
    return [(p.begins_at, p.lag_events) for p in read_offsets(group.consumer, 10)]


# -- show ------------------------------------------------------------------------------------------------------------


def test_lag_in_events_and_in_seconds_of_a_consumer_that_nobody_runs(group, capsys):
    group.write(0, 5, age_seconds=3600)
    group.write(0, 5, age_seconds=60)
    group.commit(5, None)
    told = shown(capsys, group)
    assert (told["consumer"], told["group_id"], told["members"]) == (group.name, group.name, [])
    first, second = told["partitions"]
    assert (first["committed"], first["start"], first["end"], first["lag_events"]) == (5, 0, 10, 5)
    assert 60 <= first["lag_seconds"] < 90
    assert (second["committed"], second["end"], second["lag_events"], second["lag_seconds"]) == (None, 0, 0, 0)
    assert told["lag_events"] == 5 and told["lag_seconds"] == first["lag_seconds"]
    group.commit(10, None)
    told = shown(capsys, group)
    assert (told["lag_events"], told["lag_seconds"]) == (0, 0)


def test_offsets_for_people(group, capsys):
    group.write(1, 2, age_seconds=7200)
    lines = run(capsys, group.name, "show").splitlines()
    assert lines[0] == f"group {group.name}: no members"
    assert lines[1].split() == ["topic", "partition", "committed", "start", "end", "lag", "events", "lag"]
    assert lines[2].split() == [group.topic, "0", "never", "0", "0", "0", "-"]
    assert lines[3].split() == [group.topic, "1", "never", "0", "2", "2", "2", "h"]
    assert lines[4] == "2 events behind, oldest: 2 h"


def test_a_group_that_never_committed_is_behind_from_where_it_would_start(group):
    group.write(0, 6, age_seconds=3600)
    group.write(0, 4, age_seconds=60)
    for start_at, lag in (
        ("earliest", 10),
        ("latest", 0),
        (timezone.now() - timedelta(minutes=30), 4),
        (timezone.now() - timedelta(seconds=1), 0),
    ):
        group.consumer.start_at = start_at
        assert lags(group) == [(10 - lag, lag), (0, 0)]
    group.commit(3, None)
    assert lags(group)[0] == (3, 7)


def test_an_offset_that_is_not_there_any_more_counts_from_the_start(group):
    group.write(0, 10, age_seconds=100)
    group.commit(2, None)
    group.drop_before(0, 4)
    assert lags(group)[0] == (4, 6)
    group.commit(999, None)  # of a topic that was deleted and made anew
    assert lags(group)[0] == (4, 6)


def test_a_topic_that_is_not_there_has_no_lag(group, capsys):
    group.consumer._topics = ["nowhere.events"]
    assert shown(capsys, group)["partitions"] == []


def test_the_first_record_is_read_once_while_the_group_stands_still(group):
    group.write(0, 1, age_seconds=50)
    reader = offsets.GroupReader(group.consumer)
    try:
        assert reader.read(10)[0].lag_seconds >= 50
        reader._first_records[group.topic, 0] = (0, time.time() - 999)
        assert reader.read(10)[0].lag_seconds >= 999
        group.commit(0, None)
        assert reader.read(10)[0].lag_seconds >= 999
        group.drop_before(0, 1)
        group.write(0, 1, age_seconds=20)
        assert 20 <= reader.read(10)[0].lag_seconds < 50
    finally:
        reader.close()


# -- reset -----------------------------------------------------------------------------------------------------------


def test_where_a_reset_leads_to(group, capsys):
    group.write(0, 6, age_seconds=3600)
    group.write(0, 4, age_seconds=60)
    group.write(1, 3, age_seconds=3600)
    group.commit(8, 1)
    for arguments, expected in (
        (["--to", "earliest"], [0, 0]),
        (["--to", "latest"], [10, 3]),
        (["--to", "30m"], [6, 3]),
        (["--to", "earliest", "--partition", "0"], [0, 3]),
        (["--to", "7", "--partition", "0"], [7, 3]),
        (["--to", "2", "--partition", "0", "--partition", "1"], [2, 2]),
        (["--to", "2h", "--topic", group.topic], [0, 0]),
    ):
        before, trail = group.committed(), OperatorAction.objects.count()
        told = run(capsys, group.name, "reset", *arguments, "--dry-run").splitlines()
        assert told[1].split() == [group.topic, "0", str(before[0]), "->", str(expected[0])]
        assert told[-1].endswith("would begin elsewhere")
        assert group.committed() == before and OperatorAction.objects.count() == trail
        run(capsys, group.name, "reset", *arguments)
        assert group.committed() == expected and OperatorAction.objects.count() == trail + 1


def test_a_reset_is_in_the_audit_trail(group, capsys):
    group.write(0, 3)
    group.commit(2, None)
    run(capsys, group.name, "reset", "--to", "earliest", "--reason", "a bad deploy")
    action = OperatorAction.objects.get()
    assert (action.action, action.consumer, action.subject) == ("offsets.reset", group.name, group.name)
    assert action.reason == "a bad deploy" and "@" in action.by
    assert action.detail == {
        "to": "earliest",
        "partitions": [
            {"topic": group.topic, "partition": 0, "from": 2, "to": 0},
            {"topic": group.topic, "partition": 1, "from": None, "to": 0},
        ],
    }


def test_a_time_is_kept_in_the_audit_trail_as_it_was_meant(group, capsys):
    run(capsys, group.name, "reset", "--to", "2026-01-31T14:00+01:00")
    assert OperatorAction.objects.get().detail["to"] == "2026-01-31T14:00:00.000+01:00"


def test_a_reset_is_refused_while_the_group_has_members(group, capsys):
    group.write(0, 3)
    group.commit(3, 0)
    with group.member("billing-7") as member:
        told = shown(capsys, group)
        (seen,) = told["members"]
        assert seen["client_id"] == "billing-7" and "127.0.0.1" in seen["host"]
        assert seen["partitions"] == [[group.topic, 0], [group.topic, 1]]
        assert f"billing-7 on {seen['host']}: {group.topic}/0" in run(capsys, group.name, "show")
        with pytest.raises(CommandError, match=r"has members: billing-7 on /127.*nothing was changed"):
            run(capsys, group.name, "reset", "--to", "earliest")
        assert "but it would be refused now: group" in run(capsys, group.name, "reset", "--to", "earliest", "--dry-run")
        assert group.committed() == [3, 0] and not OperatorAction.objects.exists()
        member.unsubscribe()
    run(capsys, group.name, "reset", "--to", "earliest")
    assert group.committed() == [0, 0]


def test_a_member_that_joins_at_the_last_moment_is_found_by_kafka_itself(group, monkeypatch):
    group.write(0, 3)
    group.commit(3, 0)
    moves = plan_reset(group.consumer, "earliest", 10)
    monkeypatch.setattr(offsets, "require_no_members", lambda *_: None)
    with group.member("billing-7"):
        with pytest.raises(ResetRefused, match="a member has joined meanwhile"):
            reset(group.consumer, moves, 10, to="earliest", by="alice")
        assert group.committed() == [3, 0]
    assert not OperatorAction.objects.exists()


def test_without_the_audit_trail_nothing_is_reset(group, capsys):
    group.write(0, 3)
    group.commit(3, 0)
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE events_outbox_operatoraction RENAME TO away")
        try:
            with pytest.raises(CommandError, match="audit trail cannot be written"):
                run(capsys, group.name, "reset", "--to", "earliest")
        finally:
            cursor.execute("ALTER TABLE away RENAME TO events_outbox_operatoraction")
    assert group.committed() == [3, 0]


def test_a_reset_to_nowhere_is_a_clear_error(group, capsys):
    group.write(0, 3)
    for arguments, why in (
        (["--to", "yesterday"], "nor earliest, latest or an offset"),
        (["--to", "2999-01-01"], "lies in the future"),
        (["--to", "1"], "name --topic and --partition"),
        (["--to", "99", "--partition", "0"], "has the offsets 0 to 3, not 99"),
        (["--to", "earliest", "--partition", "7"], "reads no partition 7 of"),
        (["--to", "earliest", "--partition", "x"], "no partition's number"),
        (["--to", "earliest", "--topic", "other.events"], "reads no other.events"),
    ):
        with pytest.raises(CommandError, match=why):
            run(capsys, group.name, "reset", *arguments)
    assert group.committed() == [None, None] and not OperatorAction.objects.exists()


def test_an_unknown_consumer_is_a_clear_error(capsys):
    with pytest.raises(CommandError, match="registered: analytics, audit, knowledge, notification"):
        run(capsys, "nobody", "show")


def test_a_consumer_reads_again_what_has_no_mark(kafka, emit, capsys):
    """And what has one, it leaves alone."""
    consumer = Consumer(f"again-{os.urandom(4).hex()}", group_id=f"again-{os.urandom(4).hex()}")
    try:
        seen = []
        consumer.handles("conversation.created")(lambda event: seen.append(event.aggregate_id))
        run(capsys, consumer.name, "reset", "--to", "latest")
        kept, forgotten = emit("kept"), emit("forgotten")
        Relay().run(until_empty=True)
        with in_thread(ConsumerProcess(consumer)):
            eventually(lambda: sorted(seen) == ["forgotten", "kept"])
        ProcessedEvent.objects.filter(consumer=consumer.name, event_id=forgotten.event_id).delete()
        run(capsys, consumer.name, "reset", "--to", "10m")
        seen.clear()
        with in_thread(ConsumerProcess(consumer)):
            eventually(lambda: total(read_offsets(consumer, 5)).events == 0)
        assert "forgotten" in seen and "kept" not in seen
        assert ProcessedEvent.objects.filter(event_id=kept.event_id).count() == 1
    finally:
        handlers._consumers.pop(consumer.name)


# -- what Kafka does not tell ----------------------------------------------------------------------------------------


def test_a_broker_that_is_away_is_a_clear_error(settings, capsys, monkeypatch):
    (port,) = free_ports(1)
    kafka_at(settings, f"127.0.0.1:{port}")
    assert consumer_offsets.ANSWER_SECONDS * 2 <= 10
    monkeypatch.setattr(consumer_offsets, "ANSWER_SECONDS", 0.5)
    started = time.monotonic()
    for arguments in (["show"], ["reset", "--to", "earliest"]):
        with pytest.raises(CommandError, match="Connection refused"):
            run(capsys, "audit", *arguments)
    with pytest.raises(ResetRefused, match=r"cannot be told whether group .* has members"):
        require_no_members(consumer_named("audit"), 0.5)
    assert time.monotonic() - started < 4


def test_a_broker_that_is_silent_is_a_clear_error(group, kafka):
    kafka.pause()
    started = time.monotonic()
    with pytest.raises(OffsetsNotKnown):
        read_offsets(group.consumer, 0.5)
    with pytest.raises(OffsetsNotKnown):
        read_group(group.consumer, 0.5)
    assert time.monotonic() - started < 5


def test_a_commit_without_an_answer_stays_in_the_audit_trail(group, kafka, monkeypatch):
    """It may have been taken."""
    group.write(0, 3)
    moves = plan_reset(group.consumer, "latest", 10)
    monkeypatch.setattr(offsets, "require_no_members", lambda *_: kafka.pause())
    with pytest.raises(OffsetsNotKnown, match="not known whether the offsets were set"):
        reset(group.consumer, moves, 10, to="latest", by="alice")
    assert OperatorAction.objects.get().action == "offsets.reset"


def test_the_embedded_broker_shows_offsets_but_not_members(settings, capsys, tmp_path):
    (port,) = free_ports(1)
    log = (tmp_path / "log").open("wb")
    broker = EmbeddedBroker(port, TOPICS, output=log.fileno())
    broker.start()
    try:
        broker.wait_until_ready()
        for is_told in (True, False):  # what it is: by the settings, or by nobody
            kafka_at(settings, broker.bootstrap_servers, KAFKA_IS_EMBEDDED=is_told)
            told = json.loads(run(capsys, "audit", "show", "--json"))
            assert len(told["partitions"]) == 24 and told["lag_events"] == 0
            assert told["members"] is None and told["members_not_known"]
            with pytest.raises(CommandError, match=r"cannot be told whether group .* has members.*nothing was changed"):
                run(capsys, "audit", "reset", "--to", "earliest")
    finally:
        broker.stop()
        log.close()


@pytest.mark.needs_tool("openssl")
def test_permissions_it_takes_to_look(settings, secure_kafka):
    user, topic = f"watcher-{os.urandom(4).hex()}", f"watched-{os.urandom(4).hex()}"
    secure_kafka.set_password(user, "S3cret-watcher")
    secure_kafka.create_topics(topic, partitions=1)
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "KAFKA": secure_kafka.login(user, "S3cret-watcher")}
    consumer = Consumer(user, group_id=user, topics=[topic])
    try:
        with pytest.raises(OffsetsNotKnown, match="authoriz"):
            read_offsets(consumer, 5)
        secure_kafka.allow(user, topic, operations=(AclOperation.READ,))
        with pytest.raises(OffsetsNotKnown, match="authoriz"):
            read_offsets(consumer, 1)
        with pytest.raises(OffsetsNotKnown, match="authoriz"):
            read_group(consumer, 5)
        secure_kafka.allow(user, user, operations=(AclOperation.DESCRIBE,), kind=ResourceType.GROUP)
        eventually(lambda: _is_told(consumer))
        assert read_group(consumer, 5).is_empty
        with pytest.raises(ResetRefused, match="authoriz"):
            reset(consumer, plan_reset(consumer, "latest", 5), 5, to="latest", by="alice")
    finally:
        handlers._consumers.pop(consumer.name)


def _is_told(consumer):
    try:
        return len(read_offsets(consumer, 2)) == 1
    except OffsetsNotKnown:
        return False
