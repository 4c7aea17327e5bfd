"""replay_outbox: what is chosen, in which order it is published again, and how a replay waits, stops and goes on."""

import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
import uuid
from argparse import ArgumentTypeError
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import psycopg
import pytest
from django.core.management import CommandError, call_command
from django.db import connection, transaction
from django.utils import timezone

from events_outbox import emit_event
from events_outbox.leader import open_session
from events_outbox.management.arguments import age, event_type_pattern, moment, positive
from events_outbox.models import OutboxEvent, ProcessedEvent, RelayCursor, UndeliverableEvent
from events_outbox.proto.base_event_pb2 import BaseEvent
from events_outbox.relay import Relay
from events_outbox.replay import APPLICATION_NAME, Replay, ReplayRefused, ReplayStopped, Selection
from events_outbox.status import read_status
from tests.events_outbox.conftest import eventually, in_thread
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload

pytestmark = pytest.mark.django_db(transaction=True)

ROOT = Path(__file__).resolve().parents[2]


def publish():
    Relay().run(until_empty=True)


def pass_all():
    """Move the cursor past everything, as a relay does that has published it."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_current_snapshot()::text")
        (snapshot,) = cursor.fetchone()
    RelayCursor.objects.update(published=snapshot, window=None)


def numbers(messages):
    return [int(BaseEvent.FromString(message.value()).metadata["number"]) for message in messages]


def chosen(**conditions):
    """The numbers of the aggregates c0, c1, ... that a selection chooses."""
    events = Selection(**conditions).events(RelayCursor.read()).order_by("id")
    return [int(event.aggregate_id.removeprefix("c")) for event in events]


@pytest.fixture
def replay_process():
    """Start replay_outbox in a process of its own, on the database of the tests; killed at the end if still there."""
    started = []

    def start(*arguments, stdin=subprocess.DEVNULL):
        url = os.environ["DATABASE_URL"].rpartition("/")[0] + f"/{connection.settings_dict['NAME']}"
        process = subprocess.Popen(
            [sys.executable, "manage.py", "replay_outbox", *arguments],
            cwd=ROOT,
            env={**os.environ, "DATABASE_URL": url},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        with process:
            pass


@pytest.fixture
def terminal():
    """The two ends of a terminal: what a person types on, and what the process reads."""
    ends = pty.openpty()
    yield ends
    for end in ends:
        os.close(end)


def sessions(**conditions):
    where = " AND ".join(["application_name = %s", *conditions.values()])
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT count(*) FROM pg_stat_activity WHERE {where}", [APPLICATION_NAME])
        return cursor.fetchone()[0]


# What is chosen


def test_each_option_chooses(emit):
    rows = [emit(f"c{number}") for number in range(6)]
    OutboxEvent.objects.filter(pk=rows[1].pk).update(tenant_id="t2")
    OutboxEvent.objects.filter(pk=rows[2].pk).update(event_type="conversation.message.sent")
    OutboxEvent.objects.filter(pk=rows[3].pk).update(event_type="conversations.created")
    start = datetime(2026, 1, 1, tzinfo=UTC)
    for number, row in enumerate(rows):
        OutboxEvent.objects.filter(pk=row.pk).update(created_at=start + timedelta(days=number))
    pass_all()
    assert chosen() == [0, 1, 2, 3, 4, 5]
    assert chosen(tenant_ids=["t2", "t3"]) == [1]
    assert chosen(event_types=["conversation.message.sent"]) == [2]
    assert chosen(event_types=["conversation.*"]) == [0, 1, 2, 4, 5]
    assert chosen(event_types=["conversation.message.*", "conversations.created"]) == [2, 3]
    assert chosen(event_types=["*"]) == [0, 1, 2, 3, 4, 5]
    assert chosen(aggregate_ids=["c5", "c0"]) == [0, 5]
    assert chosen(event_ids=[rows[4].event_id, uuid.uuid4()]) == [4]
    assert chosen(since=start + timedelta(days=2), until=start + timedelta(days=4)) == [2, 3]
    assert chosen(after_id=rows[3].pk) == [4, 5]
    assert chosen(tenant_ids=["t1"], event_types=["conversation.created"], after_id=rows[0].pk) == [4, 5]


def test_what_was_never_published_is_not_published_again(emit):
    published, refused, given_up = (emit(f"c{number}") for number in range(3))
    for row in (refused, given_up):
        UndeliverableEvent.objects.create(event=row, topic=row.topic, aggregate_id="x", reason="x", error="x")
    UndeliverableEvent.objects.filter(event=given_up).update(discarded_at=timezone.now())
    pass_all()
    emit("c3")
    assert chosen() == [0]
    assert chosen(event_ids=[refused.event_id, given_up.event_id]) == []
    with Replay(Selection()) as replay:
        assert (replay.total, replay.outer_ids) == (1, (published.pk, published.pk))


def test_unhandled_events_can_be_narrowed_down(emit):
    handled, _other, wanted = (emit(f"c{number}") for number in range(3))
    for consumer in ("analytics", "audit", "notification"):
        ProcessedEvent.objects.mark(consumer, [handled.event_id])
    ProcessedEvent.objects.mark("audit", [wanted.event_id])  # the others did not
    pass_all()
    assert chosen(unhandled=True) == [1, 2]
    assert chosen(unhandled=True, aggregate_ids=["c2"]) == [2]


def test_events_whose_marks_are_pruned_do_not_count_as_unhandled(emit, settings):
    old, _new = emit("c0"), emit("c1")
    OutboxEvent.objects.filter(pk=old.pk).update(created_at=timezone.now() - timedelta(days=31))
    pass_all()
    assert chosen(unhandled=True) == [0, 1]
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "PROCESSED_KEEP_DAYS": 30}
    assert chosen(unhandled=True) == [1]


def test_times_and_ages_are_understood(settings):
    settings.TIME_ZONE = "Asia/Shanghai"
    now = timezone.now()
    assert age("90s") == timedelta(seconds=90) and age("1.5h") == timedelta(minutes=90)
    assert (age("15m"), age("7d"), age("2w")) == (timedelta(minutes=15), timedelta(days=7), timedelta(weeks=2))
    assert abs(moment("2h") - (now - timedelta(hours=2))) < timedelta(seconds=5)
    noon = datetime(2026, 1, 31, 12, tzinfo=UTC)
    for text in ("2026-01-31T20:00", "2026-01-31 20:00:00", "2026-01-31T12:00Z", "2026-01-31T13:00+01:00"):
        assert moment(text) == noon, text
    assert moment("2026-01-31") == noon - timedelta(hours=20)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (age, "90"),
        (age, "h"),
        (age, "-2h"),
        (age, "2y"),
        (moment, "yesterday"),
        (moment, "2026-13-01"),
        (positive, "0"),
        (positive, "-1"),
        (positive, "1.5"),
        (event_type_pattern, "conversation*"),
        (event_type_pattern, "%"),
        (event_type_pattern, ""),
    ],
)
def test_arguments_that_say_nothing_are_refused(parse, text):
    with pytest.raises(ArgumentTypeError, match=re.escape(repr(text))):
        parse(text)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--all, or at least one of the options"),
        (["--after-id", "5"], "--all, or at least one of the options"),
        (["--all", "--tenant-id", "t1"], "--all contradicts --tenant-id"),
        (["--since", "1h", "--until", "2h"], "--since must be before --until"),
        (["--event-type", "conversation*"], "neither an event type nor a pattern"),
        (["--event-id", "5"], "invalid UUID value"),
        (["--rate", "0"], "not a whole number above 0"),
    ],
)
def test_a_choice_that_cannot_be_meant_is_an_error(arguments, says):
    with pytest.raises(CommandError, match=says):
        call_command("replay_outbox", *arguments)


# Publishing


def test_the_same_records_come_again_in_order_beside_a_leading_relay(emit, topic_reader, capsys):
    for number in range(30):
        emit(f"c{number % 3}", number)
    with in_thread(Relay(batch_size=7)):
        first = {m.value(): (m.key(), m.headers()) for m in topic_reader.read(30)}
        eventually(lambda: read_status().pending == 0)
        call_command("replay_outbox", "--all", "--no-input")
        again = topic_reader.read(60)[30:]
        assert read_status().leader and read_status().standbys == 0
    assert [(m.value(), m.key(), m.headers()) for m in again] == [(m.value(), *first[m.value()]) for m in again]
    for key in range(3):
        of_key = [m for m in again if m.key() == f"c{key}".encode()]
        assert numbers(of_key) == list(range(key, 30, 3))
    lines = capsys.readouterr().out.splitlines()
    ids = OutboxEvent.objects.order_by("id").values_list("id", flat=True)
    assert lines[0] == f"30 events to publish again, from id {ids[0]} to {ids[29]}"
    assert lines[-1] == "published 30 events again"


def test_a_dry_run_publishes_nothing(emit, topic_reader, capsys):
    for number in range(5):
        emit("c1", number)
    publish()
    call_command("replay_outbox", "--aggregate-id", "c1", "--dry-run")
    assert "5 events to publish again" in capsys.readouterr().out
    assert len(topic_reader.read_rest()) == 5


def test_an_event_id_that_cannot_be_published_again_is_said(emit, kafka, capsys):
    emit("c1")
    pass_all()
    pending = emit("c1")
    call_command("replay_outbox", "--event-id", str(pending.event_id))
    output = capsys.readouterr()
    assert "0 of 1 event ids" in output.err and "not published yet" in output.err
    assert "0 events to publish again" in output.out


def test_an_unhandled_replay_keeps_relays_from_leading(emit, topic_reader):
    for number in range(4):
        emit("c1", number)
    publish()
    with Replay(Selection(unhandled=True), batch_size=2) as replay, in_thread(Relay()):
        assert replay.total == 4
        emit("c1", 4)
        eventually(lambda: read_status().standbys == 1)
        replay.publish()
        assert numbers(topic_reader.read(8)) == [0, 1, 2, 3] * 2
        assert read_status().pending == 1


def test_an_unhandled_replay_does_not_start_beside_a_leading_relay(kafka):
    with in_thread(Relay()):
        eventually(lambda: read_status().leader)
        with pytest.raises(CommandError, match="a relay leads: stop it first"):
            call_command("replay_outbox", "--unhandled")


def test_a_rate_is_kept(emit, topic_reader):
    for number in range(40):
        emit("c1", number)
    publish()
    started = time.monotonic()
    with Replay(Selection(), events_per_second=40) as replay:
        replay.publish()
    assert 0.7 < time.monotonic() - started < 10
    assert numbers(topic_reader.read(80))[40:] == list(range(40))


def test_a_replay_holds_no_transaction_open(emit, kafka):
    for number in range(20):
        emit("c1", number)
    publish()
    seen = []

    def look():
        seen.append(sessions(state="state = 'idle' AND xact_start IS NULL AND backend_xmin IS NULL"))

    with Replay(Selection(), batch_size=5, on_progress=look) as replay:
        replay.publish()
    assert seen == [1] * 4


def test_a_refused_event_stops_the_replay_before_its_key_goes_on(emit, topic_reader, settings, capsys):
    settings.EVENTS_OUTBOX = {
        **settings.EVENTS_OUTBOX, "MAX_EVENT_BYTES": 2_000_000, "KAFKA_PRODUCER": {"message.max.bytes": 2_000_000}
    }  # fmt: skip
    emit("big", 0)
    with transaction.atomic():
        big = emit_event(
            "conversation.created",
            ConversationCreatedPayload(title="x" * 1_100_000),
            aggregate_id="big",
            tenant_id="t1",
            metadata={"number": "1"},
        )
    emit("small", 2)
    emit("big", 3)
    publish()
    topic_reader.read(4)
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "KAFKA_PRODUCER": {}}  # as after somebody lowered the limit
    with pytest.raises(CommandError) as error:
        call_command("replay_outbox", "--all", "--no-input")
    again = topic_reader.read_rest()[4:]
    assert sorted(numbers(again)) == [0, 2]  # other keys went on in that batch
    first_id = OutboxEvent.objects.earliest("id").pk
    assert f"event {big.pk} of big was refused" in str(error.value)
    assert f"leave that event out with --after-id {big.pk}" in str(error.value)
    assert str(error.value).endswith(f"replay_outbox --all --after-id {first_id}")
    assert not UndeliverableEvent.objects.exists()

    with Replay(Selection(after_id=first_id)) as replay, pytest.raises(ReplayRefused):
        replay.publish()
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "KAFKA_PRODUCER": {"message.max.bytes": 2_000_000}}
    call_command("replay_outbox", "--all", "--after-id", str(first_id), "--no-input")
    assert set(numbers(topic_reader.read_rest()[-3:])) == {1, 2, 3}


def test_a_lost_database_session_says_how_to_go_on(emit, topic_reader):
    for number in range(40):
        emit("c1", number)
    publish()
    topic_reader.read(40)
    lost = []

    class Fails(Replay):
        def _pause_until(self, moment):
            if self.published >= 10 and not lost:
                lost.append(self.last_id)
                with connection.cursor() as cursor:
                    cursor.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s",
                        [APPLICATION_NAME],
                    )

    with Fails(Selection(), events_per_second=40) as replay, pytest.raises(psycopg.OperationalError):
        replay.publish()
    assert replay.last_id == lost[0] and replay.published == 10
    with Replay(Selection(after_id=replay.last_id)) as rest:
        rest.publish()
    assert numbers(topic_reader.read_rest()[40:]) == list(range(40))


# Waiting and stopping


def test_a_broker_that_is_away_is_waited_for_and_said(emit, topic_reader, kafka, replay_process):
    for number in range(10):
        emit("c1", number)
    publish()
    topic_reader.read(10)
    kafka.pause()
    process = replay_process("--all")
    assert "10 events to publish again" in process.stdout.readline()
    assert "waiting for the broker" in process.stderr.readline()
    kafka.resume()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "published 10 events again" in output
    assert numbers(topic_reader.read(20)[10:]) == list(range(10))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_and_it_goes_on_from_there(emit, topic_reader, replay_process, number):
    for event in range(60):
        emit("c 1", event)
    publish()
    topic_reader.read(60)
    process = replay_process("--aggregate-id", "c 1", "--since", "1h", "--rate", "20")
    assert "60 events" in process.stdout.readline()
    topic_reader.read(65)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    counted, rest = re.search(r"stopped: (\d+) of 60 .*\n  python manage.py replay_outbox (.*)\n", errors).groups()
    assert 5 <= int(counted) < 60
    assert len(topic_reader.read_rest()) == 60 + int(counted)
    assert "--since=20" in rest  # an absolute time: an hour ago is another moment by then
    call_command("replay_outbox", *shlex.split(rest))
    assert numbers(topic_reader.read_rest()[60:]) == list(range(60))


def test_it_stops_while_the_broker_is_away(emit, topic_reader, kafka, replay_process):
    for number in range(10):
        emit("c1", number)
    publish()
    kafka.pause()
    process = replay_process("--all")
    process.stderr.readline()
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped: nothing was published again" in errors


def test_a_long_selection_is_cancelled(emit):
    emit("c1")
    pass_all()
    replay, errors = Replay(Selection()), []

    class Selecting:
        stop = replay.stop

        @staticmethod
        def run():
            try:
                replay.__enter__()
            except ReplayStopped as error:
                errors.append(error)

    with open_session() as other, other.transaction():
        other.execute("LOCK events_outbox_outboxevent IN ACCESS EXCLUSIVE MODE")
        with in_thread(Selecting):
            eventually(lambda: sessions(waits="wait_event_type = 'Lock'"))
        assert errors
    eventually(lambda: not sessions())


@pytest.mark.parametrize(("answer", "published"), [("n", 1), ("y", 2)])
def test_a_person_is_asked_first(emit, topic_reader, replay_process, terminal, answer, published):
    emit("c1")
    publish()
    topic_reader.read(1)
    process = replay_process("--all", stdin=terminal[1])
    os.write(terminal[0], f"{answer}\n".encode())
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Publish them again? [y/N]" in output
    assert len(topic_reader.read_rest()) == published


def test_a_person_who_is_asked_can_leave(emit, kafka, replay_process, terminal):
    emit("c1")
    pass_all()
    process = replay_process("--all", stdin=terminal[1])
    assert "1 events" in process.stdout.readline()
    assert process.stdout.read(len("Publish")) == "Publish"
    eventually(lambda: psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING)  # it waits for the answer
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT and "nothing was published again" in errors


# Cost


@pytest.fixture
def many_events():
    """200,000 published events, one a second, and a thousand aggregates."""
    with connection.cursor() as cursor:
        cursor.execute(
            """INSERT INTO events_outbox_outboxevent
                   (event_id, event_type, event_version, aggregate_id, tenant_id, topic, correlation_id, traceparent,
                    tracestate, baggage, created_at, value)
               SELECT gen_random_uuid(), 'conversation.created', 'v1', 'c' || n %% 1000, 't1', 'conversation.events',
                      '', '', '', '', timestamptz '2026-01-01 00:00Z' + n * interval '1 second', 'x'
                 FROM generate_series(0, 199999) n""",
            [],
        )
        cursor.execute("ANALYZE events_outbox_outboxevent")
    pass_all()


class CountsRows(Replay):
    """Says how many rows of the outbox the selection looked at."""

    def _ask(self, statement, parameters=()):
        if statement.startswith("DECLARE"):
            select = statement.partition(" FOR ")[2]
            plan = super()._ask(f"EXPLAIN (ANALYZE, FORMAT JSON) {select}", parameters)[0][0][0]["Plan"]
            self.rows_looked_at = _rows(plan)
        return super()._ask(statement, parameters)


def _rows(plan):
    own = 0
    if plan.get("Relation Name") == "events_outbox_outboxevent" or "Index Name" in plan:
        removed = plan.get("Rows Removed by Filter", 0) + plan.get("Rows Removed by Index Recheck", 0)
        own = (plan["Actual Rows"] + removed) * plan["Actual Loops"]
    return own + sum(_rows(child) for child in plan.get("Plans", []))


def test_a_selection_looks_at_little_of_a_large_outbox(many_events):
    start = datetime(2026, 1, 1, tzinfo=UTC)
    event_id = OutboxEvent.objects.latest("id").event_id
    hour = 3600
    for conditions, total, at_most in (
        ({"since": start + timedelta(seconds=199_000)}, 1000, 1000 + hour + 1),
        ({"until": start + timedelta(seconds=1000)}, 1000, 1000 + hour + 1),
        (
            {"since": start + timedelta(seconds=100_000), "until": start + timedelta(seconds=101_000)},
            1000,
            1000 + 2 * hour + 1,
        ),
        ({"aggregate_ids": ["c7"]}, 200, 400),  # a bitmap of the index, then the rows
        ({"event_ids": [event_id]}, 1, 2),
    ):
        with CountsRows(Selection(**conditions)) as replay:
            assert replay.total == total, conditions
            assert replay.rows_looked_at <= at_most, conditions


def test_events_late_by_less_than_the_slack_are_found(many_events):
    """A clock that was set back, or a statement that ran long: the order of ids is not quite that of time."""
    late = OutboxEvent.objects.order_by("id")[90_007]  # none that bisection meets first
    OutboxEvent.objects.filter(pk=late.pk).update(created_at=late.created_at + timedelta(minutes=50))
    early = OutboxEvent.objects.order_by("id")[160_007]
    OutboxEvent.objects.filter(pk=early.pk).update(created_at=early.created_at - timedelta(minutes=50))
    counts = Counter()
    for row in (late, early):
        created_at = OutboxEvent.objects.get(pk=row.pk).created_at
        with Replay(Selection(since=created_at, until=created_at + timedelta(seconds=1))) as replay:
            counts[replay.total] += 1
    assert counts == {2: 2}  # it, and the one whose second it is
