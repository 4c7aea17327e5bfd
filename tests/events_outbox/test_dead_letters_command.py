"""`manage.py dead_letters`: list, show, replay, discard; filters, dry run, exit status, audit trail."""

import json
import uuid

import pytest
from django.core.management import CommandError, call_command

from events_outbox import PermanentEventError
from events_outbox.consumer import ConsumerProcess
from events_outbox.models import DeadLetter, OperatorAction
from events_outbox.operators import system_operator
from events_outbox.records import Record
from tests.events_outbox.test_consumer import handle, record_of

pytestmark = pytest.mark.django_db(transaction=True)


class Desk:
    def __init__(self, consumer):
        self.consumer, self.name = consumer, consumer.name
        self.broken, self.handled = set(), []
        consumer.handles("conversation.created")(self._on_created)

    def _on_created(self, event):
        if event.aggregate_id in self.broken:
            raise PermanentEventError("bad\nevent")
        self.handled.append((event.aggregate_id, int(event.metadata["number"])))


@pytest.fixture
def desk(make_consumer):
    return Desk(make_consumer(guard=None))


@pytest.fixture
def letters(desk, emit):
    """Letters of a0, b0, a1 and of a record that is no event."""
    desk.broken = {"a", "b"}
    rows = [emit("a", 0), emit("b", 0, user_id="u1"), emit("a", 1)]
    ConsumerProcess(desk.consumer).handle_batch(
        [
            *[
                Record(row.topic, 1, n, row.aggregate_id.encode(), bytes(row.value), [("event_type", b"x\xff")])
                for n, row in enumerate(rows)
            ],
            Record("default.events", 0, 9, None, b"junk"),
        ]
    )
    found = list(DeadLetter.objects.order_by("id"))
    assert len(found) == 4
    return found


@pytest.fixture
def run(capsys):
    def run(*arguments):
        try:
            call_command("dead_letters", *map(str, arguments))
        finally:
            run.out = capsys.readouterr().out
        return run.out

    return run


def open_ids():
    return list(DeadLetter.objects.open().order_by("id").values_list("pk", flat=True))


def listed(run, *arguments):
    return [letter["id"] for letter in json.loads(run("list", "--json", *arguments))]


def test_the_list_shows_what_is_open(run, desk, letters):
    head, *rows, count = run("list").splitlines()
    assert head.split()[:2] == ["id", "failed"] and count == "4 dead letters"
    assert [int(row.split()[0]) for row in rows] == [letter.pk for letter in letters]
    for shown in (desk.name, "conversation.created", "permanent", "open", "PermanentEventError: bad event"):
        assert shown in rows[0]
    run("discard", letters[0].pk, "--reason", "test data")
    assert run("list", "--limit", 2).splitlines()[-1] == "2 of 3"
    (_, row, count) = run("list", "--closed").splitlines()
    assert count == "1 dead letters" and "discarded" in row and row.endswith(f"{system_operator()}: test data")
    assert run("list", "--consumer", "nobody") == "0 dead letters\n"


def test_filters(run, desk, letters, make_consumer, emit):
    a0, b0, a1, junk = (letter.pk for letter in letters)
    DeadLetter.objects.filter(pk=b0).update(tenant_id="t2")
    DeadLetter.objects.filter(pk=junk).update(created_at="2020-01-01T00:00Z")
    for arguments, found in [
        ((), [a0, b0, a1, junk]),
        (("--consumer", desk.name), [a0, b0, a1, junk]),
        (("--consumer", "another"), []),
        (("--event-type", "conversation.created"), [a0, b0, a1]),
        (("--event-type", "conversation.*"), [a0, b0, a1]),
        (("--event-type", "document.*"), []),
        (("--reason", "unparsable"), [junk]),
        (("--topic", "default.events"), [junk]),
        (("--aggregate-id", "a"), [a0, a1]),
        (("--tenant-id", "t2"), [b0]),
        (("--event-id", letters[1].event_id), [b0]),
        (("--since", "1h"), [a0, b0, a1]),
        (("--until", "1h"), [junk]),
        (("--aggregate-id", "a", "--tenant-id", "t2"), []),
        (("--limit", "1"), [a0]),
    ]:
        assert listed(run, *arguments) == found, arguments


def test_json_tells_everything(run, desk, letters):
    with pytest.raises(CommandError):
        run("replay", letters[0].pk)
    letter = json.loads(run("list", "--json", "--aggregate-id", "a"))[0]
    assert letter["error"] == "PermanentEventError: bad\nevent" and letter["key"] == "a"
    assert (letter["consumer"], letter["state"], letter["attempts"], letter["replays"]) == (desk.name, "open", 2, 1)
    assert letter["failed_by"] == system_operator() and letter["history"][0]["by"] == "consumer"
    assert json.loads(run("list", "--json", "--closed")) == []


def test_show_tells_what_happened(run, letters):
    with pytest.raises(CommandError):
        run("replay", letters[0].pk)
    run("discard", letters[0].pk, "--reason", "test data")
    for name in (letters[0].pk, letters[0].event_id):
        text = run("show", name)
        for shown in (
            '"title": "hello"',
            "conversation.events/1/0, key a",
            "  event_type: x\\xff",
            "error:       PermanentEventError: bad",
            "earlier failure 1 of 1",
            "permanent by consumer, attempts 1: PermanentEventError: bad",
            f"dead_letter.replay_failed by {system_operator()} PermanentEventError: bad",
            f"dead_letter.discarded by {system_operator()} test data",
            "state:       discarded",
        ):
            assert shown in text, shown
        assert text.count("Traceback (most recent call last)") == 2
    assert "not decodable" in run("show", letters[3].pk)


def test_show_names_one_letter(run, letters, make_consumer):
    another = DeadLetter.objects.get(pk=letters[0].pk)
    another.pk, another.consumer = None, "another"
    another.save()
    with pytest.raises(CommandError, match=rf"several consumers have it: .*{another.pk} \(another\)"):
        run("show", another.event_id)
    with pytest.raises(CommandError, match="no such dead letter"):
        run("show", another.pk + 1)


def test_replay_handles_what_it_can_and_tells_what_failed(run, desk, letters):
    desk.broken = {"b"}
    with pytest.raises(CommandError, match="2 failed or refused") as failed:
        run("replay", "--all")
    assert failed.value.returncode == 1
    assert (
        run.out.splitlines()
        == [
            f"dead letter {letters[1].pk}: PermanentEventError: bad event",
            f"dead letter {letters[3].pk}: not a BaseEvent: Error parsing message",
            "2 of 4 replayed",
        ]
        or "not a BaseEvent" in run.out
    )
    assert desk.handled == [("a", 0), ("a", 1)]
    assert open_ids() == [letters[1].pk, letters[3].pk]
    assert set(OperatorAction.objects.values_list("by", flat=True)) == {system_operator()}


def test_replay_by_filter_and_limit(run, desk, letters):
    desk.broken = set()
    assert run("replay", "--aggregate-id", "a", "--limit", 1) == "1 of 1 replayed\n"
    assert desk.handled == [("a", 0)]
    assert run("replay", letters[2].event_id) == "1 of 1 replayed\n"
    assert desk.handled == [("a", 0), ("a", 1)]
    assert run("replay", "--aggregate-id", "a") == "0 of 0 replayed\n"


def test_a_dry_run_changes_nothing(run, desk, letters):
    desk.broken = set()
    with pytest.raises(CommandError, match="1 failed"):
        run("replay", "--all", "--dry-run")
    assert run.out.splitlines()[-1] == "3 of 4 would be replayed"
    assert f"dead letter {letters[3].pk}: not a BaseEvent" in run.out
    assert run("discard", "--all", "--reason", "x", "--dry-run") == "4 would be discarded\n"
    assert desk.handled == [] and len(open_ids()) == 4 and not OperatorAction.objects.exists()


def test_force_is_for_what_was_replayed_in_vain_too_often(run, desk, letters, settings):
    settings.EVENTS_OUTBOX = {**settings.EVENTS_OUTBOX, "MAX_REPLAYS": 1}
    with pytest.raises(CommandError):
        run("replay", letters[0].pk)
    desk.broken = set()
    with pytest.raises(CommandError):
        run("replay", letters[0].pk)
    assert "replayed in vain 1 times" in run.out and desk.handled == []
    assert run("replay", letters[0].pk, "--force") == "1 of 1 replayed\n"


@pytest.mark.parametrize("action", [("replay",), ("discard", "--reason", "test data")])
def test_what_waited_behind_is_handled_at_once(run, make_consumer, emit, action, monkeypatch):
    monkeypatch.setattr("events_outbox.letter_actions.RELEASE_AT_ONCE", 1)
    desk = Desk(make_consumer(on_failure="park_key", guard=None))
    desk.broken = {"a"}
    handle(desk.consumer, [record_of(emit("a", n), n) for n in range(3)])
    desk.broken = set()
    out = run(*action, open_ids()[0])
    assert out.endswith("2 that waited behind were handled\n") and open_ids() == []
    assert desk.handled[-2:] == [("a", 1), ("a", 2)]


def test_those_behind_a_failed_one_are_left_alone(run, make_consumer, emit):
    desk = Desk(make_consumer(on_failure="park_key", guard=None))
    desk.broken = {"a"}
    handle(desk.consumer, [record_of(emit("a", n), n) for n in range(3)])
    with pytest.raises(CommandError, match="1 failed or refused, 2 left alone behind them"):
        run("replay", "--consumer", desk.name)
    assert "(2 chosen ones left alone behind it)" in run.out


def test_discard_by_filter(run, desk, letters):
    assert run("discard", "--aggregate-id", "a", "--reason", "test data") == "2 discarded\n"
    assert open_ids() == [letters[1].pk, letters[3].pk] and desk.handled == []
    assert set(OperatorAction.objects.values_list("action", "reason")) == {("dead_letter.discarded", "test data")}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("replay",), "say what to replay"),
        (("replay", "--all", "--topic", "x"), "say what to replay"),
        (("replay", "1", "--all"), "say what to replay"),
        (("discard", "--reason", "x"), "say what to discard"),
        (("discard", "--all", "--reason", " "), "say why"),
        (("discard", "--all"), "required: --reason"),
        (("discard", "999999", "--reason", "x"), "no dead letter 999999"),
        (("replay", "nothing"), "neither an id nor an event id"),
        (("replay", str(uuid.UUID(int=1))), "no dead letter of event"),
        (("replay", "999999"), "1 failed"),
        (("list", "--reason", "nothing"), "invalid choice"),
    ],
)
def test_what_cannot_be_done_changes_nothing(run, letters, arguments, says):
    with pytest.raises(CommandError, match=says):
        run(*arguments)
    assert len(open_ids()) == 4 and not OperatorAction.objects.exists()
