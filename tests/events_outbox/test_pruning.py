"""Pruning: only what is published and old, in short steps, by hand and by the leader; partitions dropped whole."""

import threading
import uuid
from datetime import timedelta
from io import StringIO

import psycopg
import pytest
from django.core.management import CommandError, call_command
from django.db import connection, connections, transaction

from events_outbox import NewEvent, emit_events, partitions, pruning
from events_outbox.leader import open_session
from events_outbox.models import OutboxEvent, ProcessedEvent, RelayCursor, UndeliverableEvent
from events_outbox.relay import Relay
from events_outbox.status import read_status
from tests.events_outbox.conftest import eventually, in_thread
from voicehelper.proto.conversation_pb2 import ConversationCreatedPayload

pytestmark = pytest.mark.django_db(transaction=True)

OUTBOX = partitions.OUTBOX


def emit_many(count):
    with transaction.atomic():
        emit_events(
            NewEvent(
                event_type="conversation.created",
                payload=ConversationCreatedPayload(),
                aggregate_id=f"c{number}",
                tenant_id="t1",
            )
            for number in range(count)
        )


def make_old(days, where="true", table=OUTBOX):
    column = "created_at" if table == OUTBOX else "processed_at"
    with connection.cursor() as cursor:
        cursor.execute(f"UPDATE {table} SET {column} = {column} - %s WHERE {where}", [timedelta(days=days)])


def mark_all_published():
    """Move the cursor behind all that is committed, as the relay does."""
    with connection.cursor() as cursor:
        cursor.execute('UPDATE events_outbox_relaycursor SET published = pg_current_snapshot(), "window" = NULL')


def prune(*options):
    out = StringIO()
    call_command("prune_outbox", *options, stdout=out)
    return out.getvalue().strip()


def test_published_and_old_goes_pending_and_new_stays():
    emit_many(5)
    mark_all_published()
    emit_many(3)  # pending
    first_five = list(OutboxEvent.objects.order_by("id").values_list("id", flat=True)[:5])
    make_old(8)
    make_old(-8, where=f"id = {first_five[4]}")  # published, and new
    assert prune("--older-than", "7d", "--dry-run") == "4 events would be deleted"
    assert OutboxEvent.objects.count() == 8
    assert prune("--older-than", "7d") == "4 events deleted"
    assert first_five[4] in OutboxEvent.objects.values_list("id", flat=True)
    assert OutboxEvent.objects.count() == OutboxEvent.objects.filter(id__gte=first_five[4]).count() == 4
    assert prune("--older-than", "7d") == "0 events deleted"


def test_what_a_running_transaction_has_written_stays():
    with psycopg.connect(**connection_parameters()) as other:
        emit_many(1)
        row = OutboxEvent.objects.get()
        other.execute(
            f"""INSERT INTO {OUTBOX} (event_id, event_type, event_version, aggregate_id, tenant_id, topic,
                       correlation_id, traceparent, tracestate, baggage, value, created_at)
                SELECT gen_random_uuid(), event_type, event_version, aggregate_id, tenant_id, topic,
                       correlation_id, '', '', '', value, created_at - interval '9 days' FROM {OUTBOX}"""
        )
        mark_all_published()  # not the other's
        make_old(9)
        assert prune("--older-than", "7d") == "1 events deleted"
        other.commit()
    assert not OutboxEvent.objects.filter(pk=row.pk).exists()
    assert prune("--older-than", "7d") == "0 events deleted"
    assert OutboxEvent.objects.pending(RelayCursor.read()).count() == 1


def test_undeliverable_events_stay_until_they_are_discarded():
    emit_many(2)
    mark_all_published()
    make_old(8)
    row = OutboxEvent.objects.earliest("id")
    parked = UndeliverableEvent.objects.create(
        event=row, topic=row.topic, aggregate_id=row.aggregate_id, reason="x", error="x"
    )
    assert prune("--older-than", "7d") == "1 events deleted"
    parked.discarded_at = row.created_at
    parked.save()
    assert prune("--older-than", "7d") == "1 events deleted"
    assert not UndeliverableEvent.objects.exists()


def test_it_goes_in_chunks_that_lock_nobody_out(monkeypatch):
    monkeypatch.setattr(pruning, "CHUNK_ROWS", 10)
    emit_many(35)
    mark_all_published()
    make_old(8)
    with open_session() as session:
        steps = pruning.prune_events(session, timedelta(days=7))
        assert next(steps) == 10
        # No transaction is open between two steps, and writers are not in the way of each other.
        assert session.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        emit_many(1)
        assert list(steps) == [10, 10, 5, 0]
    assert OutboxEvent.objects.count() == 1


@pytest.mark.parametrize("strange", ["another cluster", "the future"])
def test_a_cursor_that_says_nothing_here_lets_nothing_be_deleted(strange):
    """After a restore, until a relay has led: its snapshot takes the transactions of this cluster for published."""
    emit_many(3)
    make_old(8)
    make_foreign(strange)
    assert prune("--older-than", "7d", "--dry-run") == "0 events would be deleted"
    assert prune("--older-than", "7d") == "0 events deleted"
    assert "another database cluster" in read_status().trouble(60)


def make_foreign(strange):
    with connection.cursor() as cursor:
        if strange == "another cluster":
            cursor.execute("UPDATE events_outbox_relaycursor SET published = pg_current_snapshot()")
            cursor.execute("UPDATE events_outbox_relaycursor SET system_identifier = 42")
        else:
            cursor.execute("UPDATE events_outbox_relaycursor SET published = '900000000:900000000:'")


def test_one_task_of_the_house_that_fails_keeps_no_other_from_its_turn(settings, monkeypatch, caplog):
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "PRUNE_AFTER_DAYS": 7, "PROCESSED_KEEP_DAYS": 30}
    emit_many(1)
    ProcessedEvent.objects.mark("analytics", list(OutboxEvent.objects.values_list("event_id", flat=True)))
    make_old(31, table="events_outbox_processedevent")

    def refuse(*_):
        raise psycopg.errors.InsufficientPrivilege("must be owner of the table")

    monkeypatch.setattr(pruning, "prune_events", refuse)
    with open_session() as session:
        list(pruning.housekeeping(session))
    assert not ProcessedEvent.objects.exists()
    assert "housekeeping failed" in caplog.messages


MARKS = "events_outbox_processedevent"


def mark_many(count):
    ProcessedEvent.objects.mark("analytics", [uuid.uuid4() for _ in range(count)])


def test_marks_by_hand():
    mark_many(3)
    make_old(20, table=MARKS)
    mark_many(2)
    emit_many(1)
    mark_all_published()
    make_old(20)
    assert prune("--marks-older-than", "2w", "--dry-run") == "3 processed marks would be deleted"
    assert ProcessedEvent.objects.count() == 5
    assert prune("--marks-older-than", "2w") == "3 processed marks deleted"
    assert (ProcessedEvent.objects.count(), OutboxEvent.objects.count()) == (2, 1)
    assert prune("--marks-older-than", "2w", "--older-than", "2w") == "1 events deleted\n0 processed marks deleted"
    with pytest.raises(CommandError, match="say what to delete"):
        prune()


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_marks_of_what_kafka_may_still_have_are_not_deleted_by_hand(dry_run):
    mark_many(1)
    make_old(5, table=MARKS)
    with pytest.raises(CommandError, match=r"Kafka keeps records for 7 days.*nothing was deleted"):
        prune("--marks-older-than", "4d", *dry_run)
    assert ProcessedEvent.objects.count() == 1


def test_marks_of_what_kafka_may_still_have_stay_whatever_the_settings_say(settings):
    """A check tells of such settings, but checks can be skipped."""
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "PROCESSED_KEEP_DAYS": 2, "TOPIC_RETENTION_DAYS": 5}
    mark_many(1)
    make_old(6, table=MARKS)
    mark_many(1)
    make_old(4, table=MARKS, where="processed_at > now() - interval '1 day'")
    with open_session() as session:
        assert pruning.count_old_marks(session, timedelta(days=2)) == 1
        list(pruning.housekeeping(session))
    assert ProcessedEvent.objects.count() == 1


def test_a_wrong_age_is_a_clear_error():
    with pytest.raises(CommandError, match="7x"):
        call_command("prune_outbox", "--older-than", "7x")


def test_the_leader_keeps_house(settings, kafka):
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "PRUNE_AFTER_DAYS": 7, "PROCESSED_KEEP_DAYS": 30}
    emit_many(3)
    Relay().run(until_empty=True)
    assert OutboxEvent.objects.count() == 3
    ids = list(OutboxEvent.objects.values_list("event_id", flat=True))
    ProcessedEvent.objects.mark("analytics", ids)
    make_old(8, where=f"id <> {OutboxEvent.objects.latest('id').id}")
    marks = "events_outbox_processedevent"
    make_old(31, table=marks, where=f"event_id = '{ids[0]}'")
    with in_thread(Relay()):
        eventually(lambda: OutboxEvent.objects.count() == 1)
        eventually(lambda: ProcessedEvent.objects.count() == 2)


def test_without_the_settings_everything_is_kept(kafka):
    emit_many(3)
    Relay().run(until_empty=True)
    make_old(4000)
    relay = Relay()
    with in_thread(relay):
        eventually(lambda: relay._house_due > 0)
    assert OutboxEvent.objects.count() == 3


# The outbox as a partitioned table.

ROWS = 1000


def connection_parameters():
    parameters = connection.get_connection_params()
    return {key: parameters[key] for key in ("host", "port", "dbname", "user") if key in parameters}


@pytest.fixture
def partitioned(settings):
    """A partitioned outbox in the test database, made as the first migration makes it, and undone afterwards."""
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "PARTITION_ROWS": ROWS}
    call_command("migrate", "events_outbox", "zero", verbosity=0)
    call_command("migrate", "events_outbox", verbosity=0)
    with open_session() as session:
        assert partitions.is_partitioned(session)
        yield session
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "PARTITION_ROWS": None}
    call_command("migrate", "events_outbox", "zero", verbosity=0)
    call_command("migrate", verbosity=0)


def starts(session):
    return [partition.start for partition in partitions.partitions(session)]


def rows_of(session, table):
    return session.execute(f"SELECT count(*) FROM {table}").fetchone()[0]


def test_partitions_are_made_ahead_and_dropped_whole(partitioned):
    assert starts(partitioned) == [1, 1001]
    emit_many(1500)
    assert partitions.make_ahead(partitioned, ROWS) == 2
    assert starts(partitioned) == [1, 1001, 2001, 3001]
    assert partitions.make_ahead(partitioned, ROWS) == 0
    mark_all_published()
    make_old(8)
    assert prune("--older-than", "7d") == "1,000 events deleted"  # the second one still takes events
    assert starts(partitioned) == [1001, 2001, 3001]
    assert OutboxEvent.objects.count() == 500


def test_a_partition_with_a_pending_new_or_undeliverable_event_stays(partitioned):
    emit_many(1200)
    make_old(8)
    assert prune("--older-than", "7d") == "0 events deleted"  # pending
    mark_all_published()
    make_old(-8, where="id = 5")
    assert prune("--older-than", "7d") == "0 events deleted"  # one is new
    make_old(8, where="id = 5")
    parked = UndeliverableEvent.objects.create(event_id=7, topic="t", aggregate_id="a", reason="x", error="x")
    assert prune("--older-than", "7d") == "0 events deleted"
    parked.discarded_at = OutboxEvent.objects.earliest("id").created_at
    parked.save()
    assert prune("--older-than", "7d") == "1,000 events deleted"
    assert not UndeliverableEvent.objects.exists()


def test_partitions_of_another_clusters_cursor_stay(partitioned):
    emit_many(1200)
    make_old(8)
    make_foreign("another cluster")
    assert prune("--older-than", "7d") == "0 events deleted"


def test_a_default_partition_that_is_large_holds_writers_up_for_a_moment_only(partitioned, monkeypatch, caplog):
    monkeypatch.setattr(partitions, "ATTACH_TIMEOUT_MS", 1)
    emit_many(4500)
    assert partitions.make_ahead(partitioned, ROWS) == 0
    assert any("attach one in a quiet hour" in line for line in caplog.messages)
    emit_many(1)


def test_an_insert_never_fails_for_want_of_a_partition(partitioned):
    emit_many(2500)  # the last 500 have none of their own
    assert OutboxEvent.objects.count() == 2500
    assert rows_of(partitioned, partitions.DEFAULT_PARTITION) == 500
    # New ones begin where no id has been given out, with room for those that come meanwhile.
    assert partitions.make_ahead(partitioned, ROWS) == 1
    assert starts(partitioned) == [1, 1001, 3501]
    emit_many(1500)
    assert rows_of(partitioned, partitions.DEFAULT_PARTITION) == 1500
    mark_all_published()
    make_old(8)
    assert prune("--older-than", "7d") == "3,500 events deleted"
    assert rows_of(partitioned, partitions.DEFAULT_PARTITION) == 0
    assert OutboxEvent.objects.count() == 500


def test_upkeep_gives_way_to_a_transaction_that_has_written(partitioned):
    emit_many(1200)
    mark_all_published()
    make_old(8)
    with psycopg.connect(**connection_parameters()) as other:
        other.execute(f"UPDATE {OUTBOX} SET baggage = '' WHERE id = 1")  # holds a lock until it ends
        assert prune("--older-than", "7d") == "0 events deleted"
        emitted = threading.Thread(target=lambda: (emit_many(1), connections.close_all()))
        emitted.start()
        emitted.join(10)
        assert not emitted.is_alive(), "an insert waited"
    assert prune("--older-than", "7d") == "1,000 events deleted"


def test_events_go_through_a_partitioned_outbox(partitioned, topic_reader, monkeypatch):
    # Making a partition needs a moment without a writer: one that emits just then costs a round.
    monkeypatch.setattr("events_outbox.relay.HOUSE_ROUND_SECONDS", 0.5)
    with in_thread(Relay()):
        emit_many(2500)
        topic_reader.read(2500)
        eventually(lambda: len(starts(partitioned)) >= 3)  # the leader makes them ahead
    published = {message.key().decode() for message in topic_reader.messages}
    assert published == {f"c{number}" for number in range(2500)}
    assert RelayCursor.read().window is None


def test_a_table_with_events_is_not_partitioned_behind_ones_back(settings):
    emit_many(1)
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "PARTITION_ROWS": ROWS}
    call_command("migrate", "events_outbox", "0001", verbosity=0)
    try:
        with pytest.raises(RuntimeError, match="before the first migrate"):
            call_command("migrate", "events_outbox", verbosity=0)
    finally:
        settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "PARTITION_ROWS": None}
        call_command("migrate", verbosity=0)
