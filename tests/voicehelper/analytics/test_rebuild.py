"""Totals that are counted again from the events, compared with the live ones and put right."""

import dataclasses
import io
import threading
import uuid
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from confluent_kafka import Producer
from django.core.management import CommandError, call_command
from django.db import connection, transaction

from events_outbox.consumer import ConsumerProcess
from events_outbox.handlers import consumer_named
from events_outbox.models import DeadLetter, OutboxEvent, ProcessedEvent
from events_outbox.relay import Relay
from events_outbox.testing import handle_now, make_record
from tests.events_outbox.conftest import eventually
from tests.voicehelper.analytics.conftest import DAY, completed, emit, history, reply
from tests.voicehelper.conftest import consume
from voicehelper.analytics import rebuild as rebuilding
from voicehelper.analytics.event_handlers import count
from voicehelper.analytics.models import DailyTotal
from voicehelper.analytics.rebuild import FRESH_TABLE, Rebuild, RebuildFailed

pytestmark = pytest.mark.django_db(transaction=True)

TENANT, OTHER = uuid.UUID(int=1), uuid.UUID(int=2)


@pytest.fixture(autouse=True)
def no_fresh_table_stays():
    yield
    Rebuild.drop_fresh_table()


@pytest.fixture
def counted() -> list:
    """Nine events of two tenants, handled."""
    events = [
        *history(TENANT, 4, cost=0.1, tokens=(10, 5), latency=1.5),
        *history(TENANT, 2, cost=0.3, model="large", mode="voice"),
        completed(TENANT),
        reply(OTHER, cost=1e-9),
        reply(OTHER, cost=0.25, latency=0.0),
    ]
    emit(*events)
    consume("analytics")
    return events


def rebuild(*arguments: str) -> tuple[int, str]:
    out, err = io.StringIO(), io.StringIO()
    try:
        call_command("rebuild_analytics", *arguments, stdout=out, stderr=err)
    except CommandError as error:
        return error.returncode, out.getvalue() + err.getvalue() + str(error)
    return 0, out.getvalue() + err.getvalue()


def rows(table: str = DailyTotal._meta.db_table) -> list[tuple]:
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT * FROM {table}")
        return sorted(row[1:] for row in cursor.fetchall())


def exists() -> bool:
    return FRESH_TABLE in connection.introspection.table_names()


def test_the_rebuilt_totals_are_the_live_ones(counted):
    status, out = rebuild()
    assert (status, rows(FRESH_TABLE)) == (0, rows())
    assert "9 events of the outbox and 0 of Kafka counted again" in out
    status, out = rebuild("--compare")
    assert (status, exists()) == (0, False)
    assert "the live totals are the same" in out


PLANTED = {
    "a count": ("UPDATE analytics_dailytotal SET messages = messages + 1", "messages 2 live, 1 rebuilt"),
    "a cost": ("UPDATE analytics_dailytotal SET cost_dollars = cost_dollars + 0.000000000001", "cost_dollars"),
    "a latency": ("UPDATE analytics_dailytotal SET replies_to_2s = 0", "replies_to_2s 0 live, 1 rebuilt"),
    "a row too few": ("DELETE FROM analytics_dailytotal", "messages 0 live, 1 rebuilt"),
}  # fmt: skip


@pytest.mark.parametrize(("statement", "shown"), PLANTED.values(), ids=PLANTED)
def test_a_planted_difference_is_found_and_put_right(counted, statement, shown):
    before = rows()
    with connection.cursor() as cursor:
        cursor.execute(f"{statement} WHERE tenant_id = %s AND day = %s AND model = 'small'", [TENANT, "2026-03-29"])
    damaged = rows()
    assert damaged != before

    status, out = rebuild("--compare")
    assert (status, rows(), exists()) == (1, damaged, True)
    assert f"2026-03-29 chat small of {TENANT}: " in out and shown in out and "1 rows differ" in out
    status, out = rebuild("--swap")
    assert (status, rows(), exists()) == (0, before, False)
    assert "1 rows put right" in out
    assert rebuild("--compare")[0] == 0


def test_a_row_too_many_is_removed(counted):
    before = rows()
    DailyTotal.objects.create(tenant_id=OTHER, day=DAY, mode="agent", model="none", failed=2)
    assert "2026-03-31 agent none of" in rebuild("--compare")[1]
    assert rebuild("--swap")[0] == 0
    assert rows() == before


def test_events_that_are_not_handled_yet_are_on_neither_side(counted):
    emit(reply(TENANT, cost=5.0))
    assert rebuild("--compare")[0] == 0
    consume("analytics")
    assert rebuild("--compare")[0] == 0


def test_dead_letters_count_when_they_were_replayed_alone(counted):
    emit(reply(TENANT, cost=float("nan")), reply("nobody", cost=1.0))
    consume("analytics")
    assert DeadLetter.objects.count() == 2
    assert rebuild("--compare")[0] == 0
    DeadLetter.objects.filter(tenant_id="nobody").update(resolution="discarded")
    assert rebuild("--compare")[0] == 0
    DeadLetter.objects.update(resolution="replayed")  # what was not: the events can still not be counted
    assert rebuild("--compare")[0] == 2


def test_from_a_day_on(counted):
    with connection.cursor() as cursor:
        cursor.execute("UPDATE analytics_dailytotal SET messages = 0 WHERE day < '2026-03-30'")
    assert rebuild("--compare", "--since", "2026-03-30")[0] == 0
    assert rebuild("--compare", "--since", "2026-03-29")[0] == 1
    assert rebuild("--swap", "--since", "2026-03-29")[0] == 0
    messages = dict(DailyTotal.objects.filter(model="small", day__lt=DAY).values_list("day__day", "messages"))
    assert messages == {30: 1, 29: 1, 28: 0, 27: 0}
    with pytest.raises(CommandError, match="no day"):
        call_command("rebuild_analytics", "--since", "yesterday")


def test_what_is_counted_while_it_runs_stays(counted, monkeypatch):
    """Between the cut and the swap a consumer counts more, of the row that is wrong as well."""
    DailyTotal.objects.filter(tenant_id=OTHER).update(messages=100)

    def count_meanwhile(self):
        thread = threading.Thread(target=in_another_session, args=(lambda: handle_now("analytics", events=meanwhile),))
        thread.start()
        thread.join(20)
        original(self)

    meanwhile = [reply(OTHER, cost=0.5), reply(OTHER, cost=0.5, model="new")]
    original = Rebuild._count_outbox
    monkeypatch.setattr(Rebuild, "_count_outbox", count_meanwhile)
    status, out = rebuild("--swap")
    assert status == 0 and "9 events of the outbox" in out and "1 rows put right" in out
    messages = {row.model: row.messages for row in DailyTotal.objects.filter(tenant_id=OTHER)}
    assert messages == {"small": 3, "new": 1}


def in_another_session(work) -> None:
    try:
        work()
    finally:
        connection.close()


def test_consumers_go_on_while_it_runs(counted):
    """Several workers count without a pause while the totals are compared again and again."""
    stop = threading.Event()
    process = ConsumerProcess(consumer_named("analytics"))

    def work() -> None:
        while not stop.is_set():
            events = [reply(TENANT, cost=0.1), reply(OTHER, cost=0.1)]
            emit(*events)
            process.handle_batch([make_record(event) for event in events])

    threads = [threading.Thread(target=in_another_session, args=(work,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: DailyTotal.objects.get(tenant_id=OTHER).messages > 10)
        for _ in range(5):
            assert rebuild("--compare")[0] == 0
            assert rebuild("--swap")[0] == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    assert rebuild("--compare")[0] == 0


def test_one_at_a_time(counted):
    with Rebuild():
        results = []
        thread = threading.Thread(target=in_another_session, args=(lambda: results.append(rebuild()),))
        thread.start()
        thread.join(20)
    assert results == [(2, "another rebuild is running")]
    assert rebuild("--compare")[0] == 0


@pytest.mark.parametrize("step", ["_write", "swap"])
def test_one_that_was_interrupted_is_in_nobody_s_way(counted, monkeypatch, step):
    DailyTotal.objects.filter(tenant_id=OTHER).update(messages=100)
    damaged = rows()

    def interrupted(self) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Rebuild, step, interrupted)
        rebuild("--swap")
    assert rows() == damaged
    results = []
    in_another_session(lambda: results.append(rebuild("--swap")))
    assert results[0][0] == 0 and "1 rows put right" in results[0][1]
    assert (rebuild("--compare")[0], exists()) == (0, False)


def test_it_needs_a_transaction_of_its_own(counted):
    with Rebuild() as one, transaction.atomic(), pytest.raises(RuntimeError, match="of its own"):
        one.count()


# What the outbox has no more


@pytest.fixture
def published(embedded_kafka, counted):
    """The nine events, in Kafka as well; some of them twice."""
    Relay().run(until_empty=True)
    OutboxEvent.objects.filter(event_id__in=[event.event_id for event in counted[:5]]).delete()
    return counted


def test_what_was_pruned_is_read_from_kafka(published):
    status, out = rebuild("--compare")
    assert status == 0, out
    assert "4 events of the outbox and 5 of Kafka counted again" in out
    OutboxEvent.objects.all().delete()
    status, out = rebuild("--compare")
    assert status == 0 and "0 events of the outbox and 9 of Kafka counted again" in out


def test_records_that_come_twice_or_are_no_events_count_once_or_not(published, settings):
    producer = Producer({**settings.EVENTS_OUTBOX["KAFKA"]})
    for event in published * 2:
        producer.produce("conversation.events", make_record(event).value, key="k")
    for value in (b"", b"junk", make_record(reply(TENANT, cost=9.0)).value):  # the last one: not handled yet
        producer.produce("conversation.events", value, key="k")
    producer.flush(10)
    assert rebuild("--compare")[0] == 0


def test_a_difference_is_found_in_what_kafka_holds(published):
    DailyTotal.objects.filter(tenant_id=TENANT, model="large").update(cost_dollars=Decimal("0.1"))
    assert rebuild("--compare")[0] == 1
    assert rebuild("--swap")[0] == 0
    assert rebuild("--compare")[0] == 0


def test_what_is_nowhere_any_more_is_said_and_never_swapped(published):
    lost = reply(TENANT, cost=2.0)
    handle_now("analytics", events=[lost])
    before = rows()
    status, out = rebuild("--compare")
    assert status == 1 and "1 events that were counted are neither in the outbox nor in Kafka" in out
    status, out = rebuild("--swap")
    assert (status, rows()) == (2, before)
    assert "Give --since" in out


def test_without_kafka_only_what_is_in_the_outbox_can_be_rebuilt(counted, settings, monkeypatch):
    monkeypatch.setattr(rebuilding, "ASK_SECONDS", 0.2)
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "KAFKA": {"bootstrap.servers": "127.0.0.1:1", "log_level": 0}}
    assert rebuild("--compare")[0] == 0
    OutboxEvent.objects.all().delete()
    before = rows()
    status, out = rebuild("--swap")
    assert (status, rows()) == (2, before)
    assert "Kafka cannot be read" in out


def test_marks_that_were_pruned(published, settings):
    ProcessedEvent.objects.all().delete()
    Relay().run(until_empty=True)
    assert rebuild("--compare")[0] == 1  # nothing seems to be handled
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    status, out = rebuild("--compare", "--unmarked-before", later)
    assert status == 0, out
    assert "4 events of the outbox and 5 of Kafka counted again" in out


def test_what_an_older_version_did_not_count_is_counted_afterwards(published):
    """It went past the ends of conversations, which so have no mark."""
    before = rows()
    end = next(event for event in published if event.event_type == "conversation.completed")
    ProcessedEvent.objects.filter(event_id=end.event_id).delete()
    DailyTotal.objects.filter(completed=1).update(completed=0)
    assert rebuild("--compare")[0] == 0
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    assert rebuild("--swap", "--unmarked-before", later)[0] == 0
    assert rows() == before


def test_what_is_gone_together_with_its_marks_is_never_swapped_away(counted):
    """As in production, where the outbox, Kafka and the marks are all pruned: the totals alone remember."""
    old = [event for event in counted if event.timestamp.day in (27, 28)]
    for rows_of in (OutboxEvent, ProcessedEvent):
        rows_of.objects.filter(event_id__in=[event.event_id for event in old]).delete()
    before = rows()
    assert rebuild("--compare")[0] == 1
    status, out = rebuild("--swap")
    assert (status, rows()) == (2, before)
    assert "of 2 rows the events, or their processed marks, seem to be pruned" in out
    DailyTotal.objects.filter(day=DAY, tenant_id=OTHER).update(messages=7)
    assert rebuild("--swap", "--since", "2026-03-29")[0] == 0
    assert rows() == before


def test_a_day_of_which_some_marks_are_pruned_is_not_swapped(counted):
    OutboxEvent.objects.filter(event_id=counted[-1].event_id).delete()
    ProcessedEvent.objects.filter(event_id=counted[-1].event_id).delete()
    before = rows()
    with Rebuild(unmarked_before=datetime(2026, 4, 1, tzinfo=UTC)) as one:
        one._count_kafka = lambda: None  # it holds nothing
        one.count()
        with pytest.raises(RebuildFailed, match="seem to be pruned"):
            one.swap()
    assert rows() == before


def test_the_group_is_not_the_consumers():
    assert consumer_named("analytics").group_id != rebuilding.GROUP_ID


def test_an_event_twice_in_a_batch_shows(counted):
    """What the marks keep away, and a rebuild would find: an event that was counted twice."""
    count([dataclasses.replace(counted[0])])
    assert rebuild("--compare")[0] == 1
