"""Dead letters: history, replay, discard, release in order, and the races between them on real connections."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from django.db import DatabaseError, connection, transaction
from django.db.models.functions import Now

from events_outbox import PermanentEventError, RetryPolicy, handlers, letter_actions, pauses
from events_outbox.consumer import ConsumerProcess
from events_outbox.leader import open_session
from events_outbox.letter_actions import (
    AlreadyClosed,
    Outcome,
    ReplayFailed,
    ReplayRefused,
    discard,
    release,
    replay,
    replay_one,
)
from events_outbox.models import DeadLetter, OperatorAction, ProcessedEvent
from events_outbox.pruning import prune_marks
from events_outbox.records import Record
from tests.events_outbox.conftest import counted, eventually
from tests.events_outbox.test_consumer import handle, record_of
from voicehelper.identity.models import Tenant

pytestmark = pytest.mark.django_db(transaction=True)


class Desk:
    """A consumer of conversation.created: it notes what it handles, and fails on what is `broken`."""

    def __init__(self, consumer):
        self.consumer = consumer
        self.broken = {}  # (aggregate, number) -> what to raise
        self.calls = []  # every call of the handler
        self.hold = {}  # (aggregate, number) -> a gate that the handler waits at
        consumer.handles("conversation.created")(self._on_created)

    def _on_created(self, event):
        place = (event.aggregate_id, int(event.metadata["number"]))
        self.calls.append(place)
        Tenant.objects.create(name=f"{event.aggregate_id} {place[1]} {len(self.calls)}")
        if gate := self.hold.get(place):
            gate.arrived.set()
            assert gate.open.wait(20), "nobody opened the gate"
        if error := self.broken.get(place):
            raise error

    @property
    def effects(self):
        """What is handled and committed, in order."""
        return [
            (name.split()[0], int(name.split()[1]))
            for name in Tenant.objects.order_by("id").values_list("name", flat=True)
        ]

    def handle(self, *rows):
        handle(self.consumer, [record_of(row, n) for n, row in enumerate(rows)])


class Gate:
    def __init__(self):
        self.arrived, self.open = threading.Event(), threading.Event()


@pytest.fixture
def desk(make_consumer):
    return Desk(make_consumer(retry=RetryPolicy(max_retries=0)))


@pytest.fixture
def parking(make_consumer):
    return Desk(make_consumer(on_failure="park_key", guard=None))


@pytest.fixture
def aside():
    """Run a function in a thread, on a database connection of its own; returns its future."""

    def run(function, *arguments, **options):
        def job():
            try:
                return function(*arguments, **options)
            finally:
                connection.close()

        return pool.submit(job)

    with ThreadPoolExecutor(4) as pool:
        yield run


def letter_of(row):
    return DeadLetter.objects.get(event_id=row.event_id)


def ids(*rows):
    return [letter_of(row).pk for row in rows]


def states():
    return list(DeadLetter.objects.order_by("id").values_list("reason", "resolution"))


def trail():
    return list(OperatorAction.objects.order_by("id").values_list("action", "subject", "by"))


def is_waiting_for_a_lock():
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_locks WHERE NOT granted")
        return cursor.fetchone()[0] > 0


@pytest.fixture
def failed(desk, emit):
    """A letter of an event that fails, and can be mended."""
    desk.broken["a", 0] = ValueError("no good")
    row = emit("a")
    desk.handle(row)
    desk.calls.clear()
    return row


# -- what a letter remembers -----------------------------------------------------------------------------------------


def test_a_replay_handles_the_event_and_closes_the_letter(desk, failed):
    desk.broken.clear()
    before = ProcessedEvent.objects.get()
    replay_one(letter_of(failed).pk, by="alice")
    letter = letter_of(failed)
    assert (letter.resolution, letter.resolved_by, letter.attempts, letter.replays) == ("replayed", "alice", 1, 0)
    assert letter.resolved_at and letter.history == [] and letter.error == "ValueError: no good"
    assert desk.effects == [("a", 0)]
    assert trail() == [("dead_letter.replayed", str(letter.pk), "alice")]
    assert OperatorAction.objects.get().detail == {"event_id": str(failed.event_id)}
    # Its mark lives as long as that of an event that is handled now.
    mark = ProcessedEvent.objects.get()
    assert mark.pk > before.pk and mark.processed_at > before.processed_at
    with pytest.raises(AlreadyClosed, match="replayed already"):
        replay_one(letter.pk, by="alice")
    desk.handle(failed)
    assert desk.effects == [("a", 0)] and len(trail()) == 1


def test_an_event_that_fails_again_keeps_its_history(desk, failed):
    first = letter_of(failed)
    desk.broken["a", 0] = PermanentEventError("never")
    with pytest.raises(ReplayFailed, match="PermanentEventError: never"):
        replay_one(first.pk, by="alice")
    desk.broken["a", 0] = ValueError("\x00 again")
    with pytest.raises(ReplayFailed):
        replay_one(first.pk, by="bob")
    letter = letter_of(failed)
    assert (letter.reason, letter.error, letter.failed_by) == (
        "failed",
        "ValueError: \N{REPLACEMENT CHARACTER} again",
        "bob",
    )
    assert (letter.attempts, letter.replays, letter.resolution) == (3, 2, "")
    assert [(h["reason"], h["error"], h["by"], h["attempts"]) for h in letter.history] == [
        ("failed", "ValueError: no good", "consumer", 1),
        ("permanent", "PermanentEventError: never", "alice", 2),
    ]
    assert letter.history[0]["at"] == first.failed_at.isoformat() < letter.history[1]["at"]
    assert "no good" in letter.history[0]["traceback"] and "again" in letter.traceback
    assert [(action, by) for action, _, by in trail()] == [
        ("dead_letter.replay_failed", "alice"),
        ("dead_letter.replay_failed", "bob"),
    ]
    assert desk.effects == []


@pytest.mark.parametrize("closed", [True, False])
def test_an_event_that_comes_back_after_its_mark_was_pruned_and_fails_again_keeps_its_history(desk, failed, closed):
    letter = letter_of(failed)
    if closed:
        discard([letter.pk], reason="test data", by="alice")
    ProcessedEvent.objects.all().delete()
    desk.broken["a", 0] = ValueError("still")
    handle(desk.consumer, [record_of(failed, 7)])
    again = letter_of(failed)
    assert again.pk == letter.pk and again.offset == 7
    assert (again.error, again.attempts, again.replays) == ("ValueError: still", 2, 0)
    assert (again.resolution, again.resolved_by, again.resolution_reason, again.resolved_at) == ("", "", "", None)
    assert [h["error"] for h in again.history] == ["ValueError: no good"]


def test_the_mark_of_an_open_letter_is_not_pruned(desk, failed, emit):
    desk.handle(emit("b"))
    ProcessedEvent.objects.update(processed_at=Now() - timedelta(days=9))
    with open_session() as session:
        assert sum(prune_marks(session, timedelta(days=8))) == 1
        assert ProcessedEvent.objects.get().event_id == failed.event_id
        discard(ids(failed), reason="test data", by="alice")
        assert sum(prune_marks(session, timedelta(days=8))) == 1


def test_a_replay_marks_an_event_whose_mark_is_gone(desk, failed):
    ProcessedEvent.objects.all().delete()
    desk.broken.clear()
    replay_one(letter_of(failed).pk, by="alice")
    desk.handle(failed)
    assert desk.effects == [("a", 0)]


def test_a_redelivery_waits_for_a_replay_that_renews_its_mark(desk, failed, aside):
    desk.broken.clear()
    gate = desk.hold["a", 0] = Gate()
    replayed = aside(replay_one, letter_of(failed).pk, by="alice")
    assert gate.arrived.wait(20)
    redelivered = aside(desk.handle, failed)
    eventually(is_waiting_for_a_lock)
    gate.open.set()
    replayed.result(20)
    redelivered.result(20)
    assert desk.effects == [("a", 0)] and len(desk.calls) == 1


# -- what is no replay, and what is no failure -----------------------------------------------------------------------


def test_replays_are_capped(desk, failed, settings):
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "MAX_REPLAYS": 2}
    letter_id = letter_of(failed).pk
    for _ in range(2):
        with pytest.raises(ReplayFailed):
            replay_one(letter_id, by="alice")
    with pytest.raises(ReplayRefused, match="in vain 2 times"):
        replay_one(letter_id, by="alice")
    assert len(desk.calls) == 2 and len(trail()) == 2
    desk.broken.clear()
    replay_one(letter_id, by="alice", force=True)
    assert desk.effects == [("a", 0)]


def test_what_cannot_be_replayed_is_refused_and_left_as_it_was(desk, failed, monkeypatch):
    letter = letter_of(failed)
    with pytest.raises(ReplayRefused, match="no such dead letter"):
        replay_one(letter.pk + 1, by="alice")
    with monkeypatch.context() as patch:
        patch.setattr(desk.consumer, "route", lambda *_: None)
        with pytest.raises(ReplayRefused, match=r"no handler of conversation\.created"):
            replay_one(letter.pk, by="alice")
    with monkeypatch.context() as patch:
        patch.setattr(handlers, "_consumers", {})
        with pytest.raises(ReplayRefused, match="no consumer named"):
            replay_one(letter.pk, by="alice")
    after = letter_of(failed)
    assert (after.attempts, after.replays, after.history) == (1, 0, []) and not trail()


def test_a_record_that_is_no_event_fails_again_without_an_attempt(desk):
    handle(desk.consumer, [Record("conversation.events", 0, 0, None, b"junk")])
    with pytest.raises(ReplayFailed, match="not a BaseEvent"):
        replay_one(DeadLetter.objects.get().pk, by="alice")
    letter = DeadLetter.objects.get()
    assert (letter.reason, letter.attempts, letter.replays, len(letter.history)) == ("unparsable", 0, 1, 1)


def test_a_database_that_disturbs_a_replay_is_no_failure_of_the_event(desk, failed, monkeypatch):
    monkeypatch.setattr(letter_actions, "DISTURBED_SECONDS", 0.001)
    desk.broken.clear()
    disturbances = [
        "SELECT pg_terminate_backend(pg_backend_pid())",
        *[f"DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{state}'; END $$" for state in ("40001", "40P01")],
    ]
    statements = []

    def disturb(execute, sql, parameters, many, context):
        if statements and "INSERT INTO" in sql and "identity_tenant" in sql:
            sql, parameters = statements.pop(), None
        return execute(sql, parameters, many, context)

    with connection.execute_wrapper(disturb):
        statements[:] = disturbances * 2
        with pytest.raises(ReplayRefused, match="database was in the way"):
            replay_one(letter_of(failed).pk, by="alice")
    letter = letter_of(failed)
    assert (letter.attempts, letter.replays, letter.history) == (1, 0, []) and not trail()
    calls = len(desk.calls)
    with connection.execute_wrapper(disturb):
        statements[:] = disturbances
        replay_one(letter.pk, by="alice")
    assert len(desk.calls) == calls + 4 and desk.effects == [("a", 0)]


def test_a_database_that_is_away_refuses_a_replay(desk, failed, monkeypatch):
    letter_id = letter_of(failed).pk
    connection.close()
    with monkeypatch.context() as patch:
        patch.setitem(connection.settings_dict, "HOST", "/nowhere")
        with pytest.raises(ReplayRefused, match="database was in the way"):
            replay_one(letter_id, by="alice")
    assert letter_of(failed).history == []


def test_a_hook_that_fails_after_the_commit_does_not_undo_a_replay(make_consumer, emit):
    consumer, row = make_consumer(retry=RetryPolicy(max_retries=0)), emit("a")
    is_mended = False

    @consumer.handles("conversation.created")
    def on_created(event):
        if not is_mended:
            raise ValueError
        transaction.on_commit(lambda: 1 / 0)
        Tenant.objects.create(name="done")

    handle(consumer, [record_of(row)])
    is_mended = True
    replay_one(letter_of(row).pk, by="alice")
    assert letter_of(row).resolution == "replayed" and Tenant.objects.count() == 1
    assert counted("consumer_commit_hook_failures_total", consumer=consumer.name) == 1


def test_a_database_error_that_the_handler_swallowed_is_a_failure(make_consumer, emit):
    consumer, row = make_consumer(retry=RetryPolicy(max_retries=0)), emit("a")

    @consumer.handles("conversation.created")
    def on_created(event):
        try:
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1 / 0")
        except DatabaseError:
            pass

    handle(consumer, [record_of(row)])
    with pytest.raises(ReplayFailed):
        replay_one(letter_of(row).pk, by="alice")
    assert letter_of(row).replays == 1


# -- many ------------------------------------------------------------------------------------------------------------


def test_many_are_replayed_in_order_and_one_that_fails_costs_only_itself(desk, emit):
    rows = [emit("a", 0), emit("b", 0), emit("a", 1), emit("b", 1)]
    desk.broken = {(row.aggregate_id, n // 2): ValueError() for n, row in enumerate(rows)}
    desk.handle(*rows)
    desk.broken = {("a", 0): ValueError("bad")}
    desk.calls.clear()
    first, *others = letter_ids = ids(*rows)
    rehearsed = list(replay(letter_ids[::-1], by="alice", dry_run=True))
    assert rehearsed == [Outcome(letter_id) for letter_id in letter_ids]
    assert not desk.calls and not trail() and DeadLetter.objects.open().count() == 4
    outcomes = list(replay([*reversed(letter_ids), first + 100], by="alice"))
    assert outcomes == [
        Outcome(first, "ValueError: bad"),
        *[Outcome(letter_id) for letter_id in others],
        Outcome(first + 100, "there is no such dead letter"),
    ]
    assert desk.calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert list(replay([others[0]], by="alice")) == [Outcome(others[0], "replayed already")]


def test_a_consumer_that_parks_keys_replays_key_after_key_and_stops_at_a_failure(parking, emit):
    rows = [emit(key, n) for n in range(3) for key in ("a", "b")]
    parking.broken = {(key, 0): PermanentEventError("bad") for key in ("a", "b")}
    parking.handle(*rows)
    assert [reason for reason, _ in states()] == ["permanent"] * 2 + ["behind"] * 4
    parking.calls.clear()
    del parking.broken["b", 0]
    a, b = ids(*rows[0::2]), ids(*rows[1::2])
    assert list(replay(b[1:], by="alice")) == [
        Outcome(b[1], f"dead letter {b[0]} of the same key comes first: replay or discard it", waiting=1)
    ]
    rehearsed = list(replay([*a, *b[1:]], by="alice", dry_run=True))
    assert [(o.letter_id, bool(o.error), o.waiting) for o in rehearsed] == [
        *[(letter_id, False, 0) for letter_id in a],
        (b[1], True, 1),
    ]
    assert list(replay([*a, *b], by="alice")) == [
        Outcome(a[0], "PermanentEventError: bad", waiting=2),
        *[Outcome(letter_id) for letter_id in b],
    ]
    assert parking.calls == [("a", 0), ("b", 0), ("b", 1), ("b", 2)]
    assert parking.effects == [("b", 0), ("b", 1), ("b", 2)]


def test_discarding_takes_a_reason_and_all_or_none(desk, emit):
    desk.broken = {("a", 0): ValueError(), ("b", 0): ValueError()}
    rows = [emit("a"), emit("b")]
    desk.handle(*rows)
    desk.calls.clear()
    letter_ids = ids(*rows)
    for chosen, reason, says in [
        (letter_ids, " ", "say why"),
        ([*letter_ids, letter_ids[1] + 1], "x", f"no dead letter {letter_ids[1] + 1}"),
    ]:
        with pytest.raises(ReplayRefused, match=says):
            discard(chosen, reason=reason, by="alice")
    assert DeadLetter.objects.open().count() == 2 and not trail()
    assert discard(letter_ids[:1], reason=" test data ", by="a" * 200) == 1
    letter = letter_of(rows[0])
    assert (letter.resolution, letter.resolution_reason, letter.resolved_by) == ("discarded", "test data", "a" * 150)
    action = OperatorAction.objects.get()
    assert (action.action, action.subject, action.reason) == ("dead_letter.discarded", str(letter.pk), "test data")
    with pytest.raises(AlreadyClosed, match=f"already: {letter.pk}"):
        discard(letter_ids, reason="again", by="alice")
    assert DeadLetter.objects.open().count() == 1 and not desk.calls


# -- what waits behind -----------------------------------------------------------------------------------------------


@pytest.fixture
def parked(parking, emit):
    """A letter and two parked behind it; nothing is broken any more."""
    rows = [emit("a", n) for n in range(3)]
    parking.broken["a", 0] = PermanentEventError("bad")
    parking.handle(*rows)
    assert states() == [("permanent", ""), ("behind", ""), ("behind", "")]
    assert [letter.attempts for letter in DeadLetter.objects.order_by("id")] == [1, 0, 0]
    parking.broken.clear()
    parking.calls.clear()
    return rows


@pytest.mark.parametrize("way", ["replay", "discard"])
def test_what_waited_behind_a_closed_letter_is_released_in_order(parking, parked, emit, way):
    assert release(parking.consumer) == 0 and parking.calls == []
    if way == "replay":
        replay_one(letter_of(parked[0]).pk, by="alice")
    else:
        discard(ids(parked[0]), reason="test data", by="alice")
    assert [letter.state for letter in DeadLetter.objects.order_by("id")][1:] == ["released", "open"]
    parking.handle(emit("a", 3))  # it comes before they are released: behind them
    assert release(parking.consumer) == 3
    assert parking.effects[-3:] == [("a", 1), ("a", 2), ("a", 3)]
    assert {letter.resolved_by for letter in DeadLetter.objects.all()} == {"alice", "consumer"}
    assert len(trail()) == 1  # of the operator
    parking.handle(emit("a", 4))
    assert parking.effects[-1] == ("a", 4) and release(parking.consumer) == 0


def test_letters_of_a_key_that_are_discarded_together_are_not_released(parking, parked, aside, monkeypatch):
    lock = letter_actions.dead_letters.lock

    def lock_after_a_release(*arguments):
        aside(release, parking.consumer).result(20)
        return lock(*arguments)

    monkeypatch.setattr(letter_actions.dead_letters, "lock", lock_after_a_release)
    discard(ids(*parked[:2]), reason="test data", by="alice")
    monkeypatch.undo()
    assert release(parking.consumer) == 1
    assert parking.effects == [("a", 2)]


def test_release_leaves_alone_what_has_failed_since_it_looked(parking, parked):
    discard(ids(parked[0]), reason="test data", by="alice")
    parking.broken["a", 1] = PermanentEventError("bad")

    def replay_in_vain():
        with pytest.raises(ReplayFailed):
            replay_one(letter_of(parked[1]).pk, by="bob")
        return False

    assert release(parking.consumer, should_stop=replay_in_vain) == 0
    assert parking.calls == [("a", 1)] and letter_of(parked[1]).failed_by == "bob"


def test_a_running_consumer_releases(parking, parked):
    replay_one(letter_of(parked[0]).pk, by="alice")
    ConsumerProcess(parking.consumer)._release_parked()
    assert parking.effects == [("a", 0), ("a", 1), ("a", 2)]


def test_a_follower_that_fails_heads_its_key_then(parking, parked, emit):
    parking.broken["a", 1] = ValueError("worse")
    parking.handle(emit("b", 0))
    replay_one(letter_of(parked[0]).pk, by="alice")
    assert release(parking.consumer) == 0
    assert parking.calls.count(("a", 1)) == 1 + parking.consumer.retry.max_retries
    letter = letter_of(parked[1])
    assert (letter.reason, letter.error, letter.attempts, letter.state) == ("failed", "ValueError: worse", 4, "open")
    assert (letter.replays, letter.failed_by) == (0, "consumer") and [h["reason"] for h in letter.history] == ["behind"]
    assert release(parking.consumer) == 0 and parking.calls.count(("a", 1)) == 4
    parking.broken.clear()
    assert list(replay([letter.pk], by="alice")) == [Outcome(letter.pk)]
    assert release(parking.consumer) == 1
    assert parking.effects == [("b", 0), ("a", 0), ("a", 1), ("a", 2)]


def test_a_follower_that_has_no_handler_any_more_heads_its_key(parking, parked, monkeypatch):
    discard(ids(parked[0]), reason="test data", by="alice")
    with monkeypatch.context() as patch:
        patch.setattr(parking.consumer, "route", lambda *_: None)
        assert release(parking.consumer) == 0
    letter = letter_of(parked[1])
    assert (letter.reason, letter.attempts) == ("failed", 0) and "no handler of" in letter.error


def test_release_stops_when_told_and_waits_while_paused(parking, parked):
    discard(ids(parked[0]), reason="test data", by="alice")
    pauses.pause(parking.consumer.name, by="alice", reason="bad deploy")
    assert release(parking.consumer) == 0
    pauses.resume(parking.consumer.name, by="alice")
    assert release(parking.consumer, should_stop=lambda: True) == 0
    assert release(parking.consumer, should_stop=lambda: bool(parking.calls)) == 1
    assert parking.effects == [("a", 1)]
    # It stops between retries too, and the event has lost nothing by it.
    parking.broken["a", 2] = ValueError()
    assert release(parking.consumer, should_stop=lambda: parking.calls[-1] == ("a", 2)) == 0
    assert parking.calls == [("a", 1), ("a", 2)] and letter_of(parked[2]).state == "released"


def test_release_is_done_in_portions(parking, parked, monkeypatch):
    monkeypatch.setattr(letter_actions, "RELEASE_AT_ONCE", 1)
    discard(ids(parked[0]), reason="test data", by="alice")
    assert [release(parking.consumer) for _ in range(3)] == [1, 1, 0]
    assert parking.effects == [("a", 1), ("a", 2)]


def test_a_follower_that_always_ends_its_connection_heads_its_key(parking, parked, monkeypatch):
    monkeypatch.setattr(letter_actions, "DISTURBED_SECONDS", 0)
    discard(ids(parked[0]), reason="test data", by="alice")

    def end_connection(execute, sql, parameters, many, context):
        if "INSERT INTO" in sql and "identity_tenant" in sql:
            sql, parameters = "SELECT pg_terminate_backend(pg_backend_pid())", None
        return execute(sql, parameters, many, context)

    with connection.execute_wrapper(end_connection):
        assert release(parking.consumer) == 0
    assert letter_of(parked[1]).reason == "failed"


def test_an_event_that_comes_back_behind_others_is_released_with_them(parking, parked, emit):
    replay_one(letter_of(parked[0]).pk, by="alice")
    parking.broken["a", 1] = PermanentEventError("bad")
    release(parking.consumer)
    ProcessedEvent.objects.filter(event_id=parked[0].event_id).delete()
    parking.handle(parked[0])  # behind the one that failed now, in whose place it stood before
    assert letter_of(parked[0]).state == "released"
    assert release(parking.consumer) == 1
    ProcessedEvent.objects.filter(event_id=parked[1].event_id).delete()
    parking.handle(parked[1])  # one that is open waits already
    letter = letter_of(parked[1])
    assert (letter.reason, letter.error, len(letter.history)) == ("permanent", "PermanentEventError: bad", 1)


def test_records_without_a_key_park_nothing(parking, emit):
    row = emit("a")
    good = Record(row.topic, 0, 1, None, bytes(row.value))
    handle(parking.consumer, [Record(row.topic, 0, 0, None, b"junk"), good])
    assert parking.effects == [("a", 0)] and [reason for reason, _ in states()] == ["unparsable"]


# -- races -----------------------------------------------------------------------------------------------------------


def test_a_fresh_event_beside_the_release_of_the_last_letter_is_handled_after_it(parking, parked, emit, aside):
    discard(ids(*parked[:2]), reason="test data", by="alice")
    gate = parking.hold["a", 2] = Gate()
    released = aside(release, parking.consumer)
    assert gate.arrived.wait(20)
    fresh = aside(parking.handle, emit("a", 3))
    eventually(is_waiting_for_a_lock)
    gate.open.set()
    assert released.result(20) == 1
    fresh.result(20)
    assert parking.effects == [("a", 2), ("a", 3)] and not DeadLetter.objects.open().exists()


@pytest.mark.parametrize("way", ["replay", "discard"])
def test_a_letter_is_not_closed_while_an_event_is_being_parked_behind_it(parking, parked, emit, aside, way):
    discard(ids(*parked[1:]), reason="test data", by="alice")
    gate = parking.hold["b", 0] = Gate()
    batch = aside(parking.handle, emit("a", 3), emit("b", 0))
    assert gate.arrived.wait(20)  # "a" 3 is parked, and not committed
    (head,) = ids(parked[0])
    if way == "replay":
        closed = aside(replay_one, head, by="alice")
    else:
        closed = aside(discard, [head], reason="test data", by="alice")
    with pytest.raises(TimeoutError):
        closed.result(0.3)
    assert release(parking.consumer) == 0
    gate.open.set()
    batch.result(20)
    closed.result(20)
    assert release(parking.consumer) == 1
    assert parking.effects[-1] == ("a", 3) and not DeadLetter.objects.open().exists()


def test_a_key_that_is_being_handled_for_long_is_refused(parking, parked, emit, aside, monkeypatch):
    monkeypatch.setattr(letter_actions, "LOCK_SECONDS", 0.05)
    gate = parking.hold["b", 0] = Gate()
    batch = aside(parking.handle, emit("a", 3), emit("b", 0))
    assert gate.arrived.wait(20)
    (head,) = ids(parked[0])
    with pytest.raises(ReplayRefused, match="being handled"):
        replay_one(head, by="alice")
    with pytest.raises(ReplayRefused, match="being handled"):
        discard([head], reason="test data", by="alice")
    gate.open.set()
    batch.result(20)
    assert letter_of(parked[0]).state == "open" and not trail()


@pytest.mark.parametrize("keyed", [True, False])
def test_two_replays_of_one_letter_handle_it_once(desk, emit, aside, keyed):
    row = emit("a")
    desk.broken["a", 0] = ValueError()
    handle(desk.consumer, [Record(row.topic, 0, 0, b"a" if keyed else None, bytes(row.value))])
    desk.broken.clear()
    desk.calls.clear()
    gate = desk.hold["a", 0] = Gate()
    letter_id = letter_of(row).pk
    first = aside(replay_one, letter_id, by="alice")
    assert gate.arrived.wait(20)
    second = aside(replay_one, letter_id, by="bob")
    with pytest.raises(TimeoutError):
        second.result(0.2)
    gate.open.set()
    first.result(20)
    with pytest.raises(AlreadyClosed):
        second.result(20)
    assert desk.effects == [("a", 0)] and len(desk.calls) == 1 and len(trail()) == 1


def test_a_replay_beside_a_release_of_the_same_letter_handles_it_once(parking, parked, aside):
    discard(ids(parked[0]), reason="test data", by="alice")
    gate = parking.hold["a", 1] = Gate()
    released = aside(release, parking.consumer)
    assert gate.arrived.wait(20)
    replayed = aside(lambda: list(replay(ids(*parked[1:]), by="bob")))
    with pytest.raises(TimeoutError):
        replayed.result(0.2)
    assert release(parking.consumer) == 0  # another member leaves the key alone
    gate.open.set()
    released.result(20)
    assert all(outcome.error in ("", "replayed already") for outcome in replayed.result(20))
    release(parking.consumer)
    assert parking.effects == [("a", 1), ("a", 2)] == parking.calls


def test_members_that_release_at_the_same_time_handle_each_once_and_in_order(parking, emit, aside):
    rows = [emit(f"k{key}", n) for n in range(6) for key in range(4)]
    parking.broken = {(f"k{key}", 0): PermanentEventError() for key in range(4)}
    parking.handle(*rows)
    discard(ids(*rows[:4]), reason="test data", by="alice")

    def member():
        while DeadLetter.objects.open().exists():
            release(parking.consumer)

    for future in [aside(member) for _ in range(3)]:
        future.result(30)
    effects = parking.effects
    assert sorted(effects) == sorted((f"k{key}", n) for key in range(4) for n in range(1, 6))
    for key in range(4):
        assert [n for k, n in effects if k == f"k{key}"] == [1, 2, 3, 4, 5]


# -- at size ---------------------------------------------------------------------------------------------------------


def test_finding_what_is_parked_costs_a_look_into_the_index_for_each_key(parking, emit):
    """EXPLAIN with 100,000 open letters, half of them of one key."""
    parking.handle(emit("a"))
    with connection.cursor() as cursor:
        cursor.execute(
            """INSERT INTO events_outbox_deadletter (consumer, event_id, event_type, tenant_id, topic, partition,
                       "offset", key, value, headers, reason, error, traceback, attempts, replays, history, resolution,
                       failed_by, resolved_by, resolution_reason, released_at)
               SELECT %s, gen_random_uuid(), 'conversation.created', 't1', 'conversation.events', 0, n,
                      convert_to(CASE WHEN n %% 2 = 0 THEN 'one' ELSE 'key ' || n END, 'UTF8'), 'x', '[]', 'behind',
                      'x', 'x', 0, 0, '[]', '', 'consumer', '', '', CASE WHEN n %% 1000 = 1 THEN now() END
                 FROM generate_series(1, 100000) n""",
            [parking.consumer.name],
        )
        cursor.execute("ANALYZE events_outbox_deadletter")
    plans = []

    def explain(execute, sql, parameters, many, context):
        if "FROM" in sql and "deadletter" in sql:
            execute(f"EXPLAIN (ANALYZE, BUFFERS, COSTS OFF) {sql}", parameters, many, context)
            plans.append("\n".join(row[0] for row in context["cursor"].fetchall()))
        return execute(sql, parameters, many, context)

    topic = "conversation.events"
    keys = {(topic, key) for key in (b"one", b"key 1", b"nobody's", *(b"none %d" % n for n in range(100)))}
    with connection.execute_wrapper(explain):
        assert DeadLetter.objects.parked(parking.consumer.name, keys) == {(topic, b"one"), (topic, b"key 1")}
        assert DeadLetter.objects.open().of_key(parking.consumer.name, topic, b"one").first().offset == 2
        assert len(DeadLetter.objects.released(parking.consumer.name)[:10]) == 10
        assert DeadLetter.objects.parked("another", keys) == set()
    parked_plan, first_plan, released_plan, other_plan = plans
    assert "Index Scan using open_dead_letters" in parked_plan and "loops=103" in parked_plan
    assert "Index Scan using open_dead_letters" in first_plan and "Sort" not in first_plan
    assert "Index Scan using released_dead_letters" in released_plan and "Sort" not in released_plan
    assert "never executed" in other_plan  # without open letters there is no look for each key
    for plan in plans:
        assert "Seq Scan" not in plan and "Rows Removed" not in plan, plan
