"""Whatever somebody with all rights does to the log, it is found, and the first wrong position is named."""

import io
import json
import threading
from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command
from django.db import IntegrityError, connection, transaction
from django.utils import timezone

from events_outbox.testing import make_event
from tests.voicehelper.audit.conftest import entries_of
from voicehelper.audit.chain import entry_hash, fields_of
from voicehelper.audit.event_handlers import record
from voicehelper.audit.models import AuditChain, AuditEntry
from voicehelper.audit.services import audit_maintenance, drop_oldest
from voicehelper.audit.verification import GUARDS, UnknownTenant, tenants, verify

SET = "UPDATE audit_auditentry SET {} WHERE tenant_id = %s AND position = 3"
CHANGES = {
    "event_type": "event_type = 'conversation.failed'",
    "event_version": "event_version = 'v2'",
    "user_id": "user_id = 'mallory'",
    "aggregate_id": "aggregate_id = 'other'",
    "occurred_at": "occurred_at = occurred_at + interval '1 microsecond'",
    "recorded_at": "recorded_at = recorded_at - interval '1 day'",
    "correlation_id": "correlation_id = ''",
    "causation_id": "causation_id = 'made up'",
    "payload": "payload = jsonb_set(payload, '{username}', '\"mallory\"')",
    "metadata": """metadata = '{"source": "elsewhere"}'""",
    "id": "id = gen_random_uuid()",
    "event_id": "event_id = gen_random_uuid()",
    "previous_hash": "previous_hash = repeat('0', 64)",
    "hash": "hash = repeat('a', 64)",
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_field(log, charlie, tamper, change):
    tamper(SET.format(change), log)
    assert (verify(log).bad_position, verify(log).entries) == (3, 2)
    assert "changed" in verify(log).what
    assert verify(str(charlie.tenant_id)).bad_position is None


UNREADABLE = {
    "no moment": "occurred_at = 'infinity'",
    "before Christ": "recorded_at = '4000-01-01 BC'",
    "too many digits": "payload = '1e99999'",
    "deep": "payload = (repeat('[', 700) || repeat(']', 700))::jsonb",
    "deeper": "metadata = (repeat('[', 3000) || repeat(']', 3000))::jsonb",
}


@pytest.mark.parametrize("change", UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("rows", [1, 2, 500])
def test_a_field_that_cannot_even_be_read(log, charlie, tamper, monkeypatch, change, rows):
    """Another tenant's log is verified all the same, and an entry changed before is the first one."""
    monkeypatch.setattr("voicehelper.audit.verification.CHUNK_ROWS", rows)
    tamper(SET.format(change), log)
    assert (verify(log).bad_position, verify(log).entries) == (3, 2)
    assert "the entry was changed" in verify(log).what
    status, out, _ = verified()
    assert status == 1
    assert f"{charlie.tenant_id}: 2 entries" in out
    tamper("UPDATE audit_auditentry SET user_id = 'mallory' WHERE tenant_id = %s AND position = 2", log)
    assert verify(log).bad_position == 2


def test_a_field_that_is_changed_with_its_hash(log, tamper):
    entry = entries_of(log)[2]
    entry.user_id = "mallory"
    tamper(SET.format("user_id = 'mallory', hash = %s"), entry_hash(fields_of(entry)), log)
    assert verify(log).bad_position == 4
    assert "replaced" in verify(log).what


def rewrite(log, tamper, first: int) -> None:
    """Change an entry and hash it, and all after it, anew."""
    entries = entries_of(log)
    entries[first - 1].user_id = "mallory"
    for before, entry in zip([None, *entries], entries, strict=False):
        if entry.position >= first:
            if before is not None:
                entry.previous_hash = before.hash
            entry.hash = entry_hash(fields_of(entry))
            tamper(
                "UPDATE audit_auditentry SET user_id = %s, previous_hash = %s, hash = %s WHERE id = %s",
                entry.user_id, entry.previous_hash, entry.hash, entry.id
            )  # fmt: skip


@pytest.mark.parametrize("first", [1, 3, 7])
def test_a_chain_that_is_written_anew_from_there_on(log, tamper, first):
    rewrite(log, tamper, first)
    assert verify(log).bad_position == 7
    assert "not the one that the chain ends with" in verify(log).what


@pytest.mark.parametrize(
    ("condition", "position"),
    [("position = 1", 1), ("position = 4", 4), ("position = 7", 7), ("position > 4", 5), ("position > 0", 1)],
    ids=["the first", "in the middle", "the last", "the end", "all"],
)
def test_removed_entries(log, tamper, condition, position):
    tamper(f"DELETE FROM audit_auditentry WHERE tenant_id = %s AND {condition}", log)
    assert verify(log).bad_position == position
    assert "missing" in verify(log).what


COPY = """
INSERT INTO audit_auditentry (id, tenant_id, position, event_id, event_type, event_version, user_id, aggregate_id,
       occurred_at, correlation_id, causation_id, payload, metadata, recorded_at, previous_hash, hash)
SELECT gen_random_uuid(), tenant_id, {}, gen_random_uuid(), event_type, event_version, user_id, aggregate_id,
       occurred_at, correlation_id, causation_id, payload, metadata, recorded_at, previous_hash, hash
  FROM audit_auditentry WHERE tenant_id = %s AND position = 3"""


@pytest.mark.parametrize(("position", "bad"), [("0", 1), ("-1", 1), ("8", 8), ("20", 8)])
def test_an_inserted_entry(log, tamper, position, bad):
    tamper(COPY.format(position), log)
    assert verify(log).bad_position == bad


def test_an_entry_that_is_inserted_well_after_the_end(log, tamper):
    """It continues the chain rightly, but no consumer has put it there."""
    last = entries_of(log)[-1]
    forged = AuditEntry(
        tenant_id=log, position=8, previous_hash=last.hash, event_id=last.id, event_type="x", event_version="v1",
        aggregate_id="a", occurred_at=last.occurred_at, payload={}, metadata={}
    )  # fmt: skip
    forged.hash = entry_hash(fields_of(forged))
    forged.save(force_insert=True)
    assert verify(log).bad_position == 8
    assert "inserted after it" in verify(log).what


def test_a_fork(log, tamper):
    with pytest.raises(IntegrityError), transaction.atomic():  # not without changing the table
        tamper(COPY.format("3"), log)
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE audit_auditentry DROP CONSTRAINT audit_position")
    # Two entries that both continue the second one.
    forged = entries_of(log)[2]
    forged.id, forged.event_id, forged.user_id = forged.event_id, forged.id, "mallory"
    forged.hash = entry_hash(fields_of(forged))
    forged.save(force_insert=True)
    assert verify(log).bad_position == 3
    assert "forked" in verify(log).what


def test_moved_entries(log, tamper):
    tamper(
        """UPDATE audit_auditentry SET position = -(CASE position WHEN 3 THEN 4 ELSE 3 END)
            WHERE tenant_id = %s AND position IN (3, 4)""",
        log,
    )
    tamper("UPDATE audit_auditentry SET position = -position WHERE position < 0")
    assert verify(log).bad_position == 3


def test_an_entry_of_another_tenant(log, charlie, tamper):
    other = str(charlie.tenant_id)
    tamper("UPDATE audit_auditentry SET tenant_id = %s, position = 3 WHERE tenant_id = %s AND position = 7", other, log)
    assert (verify(log).bad_position, verify(other).bad_position) == (7, 3)


def test_the_chain_s_row_is_changed_or_gone(log, tamper):
    tamper("UPDATE audit_auditchain SET position = 5 WHERE tenant_id = %s", log)
    assert (verify(log).bad_position, verify(log).what) == (6, "the chain ends at 5: entries were inserted after it")
    tamper("UPDATE audit_auditchain SET position = 9 WHERE tenant_id = %s", log)
    assert verify(log).bad_position == 8
    tamper("DELETE FROM audit_auditchain WHERE tenant_id = %s", log)
    assert (verify(log).bad_position, verify(log).position) == (7, None)


def test_who_says_that_a_wrong_beginning_was_dropped_is_found(log, tamper):
    tamper("DELETE FROM audit_auditentry WHERE tenant_id = %s AND position <= 2", log)
    tamper("UPDATE audit_auditchain SET dropped_position = 2 WHERE tenant_id = %s", log)
    assert verify(log).bad_position == 3


def test_a_log_that_nobody_touched(log, charlie, bob):
    for tenant_id, entries in ((log, 7), (str(charlie.tenant_id), 2)):
        verified = verify(tenant_id)
        assert (verified.bad_position, verified.what, verified.entries, verified.position) == (
            None,
            "",
            entries,
            entries,
        )
    with pytest.raises(UnknownTenant):
        verify("nobody")


# Append-only


def refused(statement: str, *parameters) -> None:
    with pytest.raises(IntegrityError, match="is refused"), transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(statement, parameters)


def test_the_database_refuses_to_change_the_log(log):
    before = list(AuditEntry.objects.values()), list(AuditChain.objects.values())
    refused("UPDATE audit_auditentry SET user_id = 'mallory'")
    refused("UPDATE audit_auditentry SET user_id = 'mallory' WHERE false")
    refused("DELETE FROM audit_auditentry WHERE position = 7")
    refused("INSERT INTO audit_auditentry SELECT * FROM audit_auditentry ON CONFLICT (id) DO UPDATE SET user_id = 'm'")
    refused("DELETE FROM audit_auditchain")
    refused("UPDATE audit_auditchain SET position = position - 1")
    refused("UPDATE audit_auditchain SET hash = repeat('a', 64)")
    refused("UPDATE audit_auditchain SET dropped_position = 1")
    refused("UPDATE audit_auditchain SET tenant_id = tenant_id || 'x'")
    said = "UPDATE of audit_auditentry is refused: the audit log is append-only"
    with pytest.raises(IntegrityError, match=said), transaction.atomic():
        AuditEntry.objects.update(user_id="mallory")
    assert (list(AuditEntry.objects.values()), list(AuditChain.objects.values())) == before


def test_also_for_a_replica(log):
    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL session_replication_role = replica")
    refused("DELETE FROM audit_auditentry")


@pytest.mark.parametrize("path", ["", "elsewhere"])
def test_the_triggers_work_with_any_search_path(log, path):
    """A logical replica applies what was appended with an empty one."""
    move = "UPDATE public.audit_auditchain SET position = position + 1, hash = repeat('a', 64)"
    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL session_replication_role = replica")
        cursor.execute("CREATE SCHEMA elsewhere")
        cursor.execute("CREATE FUNCTION elsewhere.audit_is_maintained() RETURNS boolean RETURN true")
        cursor.execute("SELECT set_config('search_path', %s, true)", [path])
        cursor.execute(move)
        assert cursor.rowcount == 2
    refused(move.replace("+", "-"))
    refused("DELETE FROM public.audit_auditentry")
    with connection.cursor() as cursor:
        cursor.execute("SET LOCAL search_path TO DEFAULT")


@pytest.mark.parametrize("table", ["audit_auditentry", "audit_auditchain"])
def test_the_database_refuses_to_truncate_it(log, table):
    """Tests have this trigger switched off, for the emptying of tables after them: on again for this one."""
    with connection.cursor() as cursor:
        cursor.execute(f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER audit_is_not_truncated")
    refused(f"TRUNCATE {table}")
    with audit_maintenance():
        refused(f"TRUNCATE {table}")


def test_no_setting_but_that_of_the_transaction_itself_opens_it(log):
    for value in ("on", "true", "1", ""):
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.execute("SELECT set_config('voicehelper.audit_maintenance', %s, false)", [value])
            refused("DELETE FROM audit_auditentry")
    with audit_maintenance():
        AuditEntry.objects.filter(position=7).delete()
    refused("DELETE FROM audit_auditentry")  # the same transaction, but the block is left


@pytest.mark.django_db(transaction=True)
def test_what_one_transaction_has_opened_is_closed_to_the_next(log):
    with connection.cursor() as cursor:
        cursor.execute("SELECT set_config('voicehelper.audit_maintenance', pg_current_xact_id()::text, false)")
    refused("DELETE FROM audit_auditentry")
    with connection.cursor() as cursor:
        cursor.execute("RESET voicehelper.audit_maintenance")


# Retention


def test_the_oldest_entries_are_dropped_and_the_rest_stays_provable(log, charlie, tamper):
    for position, days in ((1, 30), (2, 29), (3, 28)):
        age(log, position, days, tamper)
    before = timezone.now() - timedelta(days=10)

    assert drop_oldest(tenant_id=log, before=before) == 3
    assert drop_oldest(tenant_id=log, before=before) == 0
    assert [entry.position for entry in entries_of(log)] == [4, 5, 6, 7]
    assert (verify(log).bad_position, verify(log).begins_after, verify(log).entries) == (None, 3, 4)
    assert verify(str(charlie.tenant_id)).entries == 2
    record([make_event("conversation.created", tenant_id=log)])
    assert (verify(log).bad_position, verify(log).entries) == (None, 5)


def test_the_last_entry_stays(log):
    assert drop_oldest(tenant_id=log, before=timezone.now() + timedelta(days=1)) == 6
    assert (verify(log).bad_position, verify(log).entries) == (None, 1)
    assert drop_oldest(tenant_id="nobody", before=timezone.now()) == 0
    assert "nobody" not in tenants()


def age(log: str, position: int, days: int, tamper) -> None:
    """Have an entry been recorded so many days ago, with a chain that says the same."""
    entries = entries_of(log)
    entries[position - 1].recorded_at -= timedelta(days=days)
    previous = None
    for entry in entries:
        entry.previous_hash = previous or entry.previous_hash
        entry.hash = previous = entry_hash(fields_of(entry))
        tamper(
            "UPDATE audit_auditentry SET recorded_at = %s, previous_hash = %s, hash = %s WHERE id = %s",
            entry.recorded_at, entry.previous_hash, entry.hash, entry.id
        )  # fmt: skip
    tamper("UPDATE audit_auditchain SET hash = %s WHERE tenant_id = %s", previous, log)


# The command


@pytest.fixture
def guarded(log) -> None:
    """All triggers as they are in production: see `tests/conftest.py`."""
    with connection.cursor() as cursor:
        for table in GUARDS:
            cursor.execute(f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER audit_is_not_truncated")


def verified(*arguments: str) -> tuple[int, str, str]:
    out = io.StringIO()
    try:
        call_command("verify_audit_log", *arguments, stdout=out)
    except CommandError as error:
        return error.returncode, out.getvalue(), str(error)
    return 0, out.getvalue(), ""


def test_the_command_on_a_whole_log(log, charlie, guarded):
    status, out, _ = verified()
    assert status == 0
    assert out.splitlines() == sorted(
        f"{tenant_id}: {count} entries, last hash {entries_of(tenant_id)[-1].hash}"
        for tenant_id, count in ((log, 7), (str(charlie.tenant_id), 2))
    )


def test_the_command_names_the_first_bad_position_of_each_tenant(log, charlie, tamper, guarded):
    tamper(SET.format("user_id = 'mallory'"), log)
    status, out, error = verified()
    assert (status, error) == (1, "the log of 1 tenant is not what was written")
    assert f"{log}: BAD at position 3: the entry was changed" in out
    assert f"{charlie.tenant_id}: 2 entries" in out
    assert verified("--tenant", str(charlie.tenant_id))[0] == 0

    status, out, _ = verified("--tenant", log, "--json")
    assert status == 1
    assert json.loads(out) == {
        "tenant_id": log,
        "is_whole": False,
        "entries": 2,
        "position": 7,
        "hash": entries_of(log)[-1].hash,
        "begins_after": 0,
        "first_bad_position": 3,
        "what": "the entry was changed: its fields no longer give its hash",
    }


@pytest.mark.parametrize("how", ["DISABLE", "ENABLE", "ENABLE REPLICA"])
def test_the_command_tells_of_a_trigger_that_is_off(log, guarded, how):
    """Also of one that does not fire for a replica, or for nobody but one."""
    assert verified("--tenant", log)[0] == 0
    for table, triggers in GUARDS.items():
        for trigger in triggers:
            with connection.cursor() as cursor:
                cursor.execute(f"ALTER TABLE {table} {how} TRIGGER {trigger}")
                status, out, error = verified("--tenant", log)
                cursor.execute(f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER {trigger}")
            assert (status, error) == (1, f"the trigger {trigger} of {table} is switched off or gone")
            assert "7 entries" in out
    with connection.cursor() as cursor:
        cursor.execute("DROP TRIGGER audit_is_append_only ON audit_auditentry")
    assert verified("--tenant", log)[0] == 1


def test_the_command_finds_a_tenant_whose_entries_or_chain_are_gone(log, charlie, tamper):
    tamper("DELETE FROM audit_auditentry WHERE tenant_id = %s", log)
    tamper("DELETE FROM audit_auditchain WHERE tenant_id = %s", str(charlie.tenant_id))
    status, out, _ = verified()
    assert status == 1
    assert f"{log}: BAD at position 1" in out and f"{charlie.tenant_id}: BAD at position 2" in out


@pytest.fixture
def kept(log, charlie, tmp_path, guarded):
    """What `--json` wrote once, kept elsewhere."""
    path = tmp_path / "kept.jsonl"
    path.write_text(verified("--json")[1])
    return path


def cut_off(log: str, tamper, after: int) -> None:
    """The end of a chain, and the row that says where it is, as if there had never been more."""
    tamper("DELETE FROM audit_auditentry WHERE tenant_id = %s AND position > %s", log, after)
    last = entries_of(log)[-1]
    tamper("UPDATE audit_auditchain SET position = %s, hash = %s WHERE tenant_id = %s", after, last.hash, log)


def test_what_was_kept_shows_an_end_that_was_cut_off_with_all_that_told_of_it(log, charlie, tamper, kept):
    assert verified("--against", str(kept))[0] == 0
    record([make_event("conversation.created", tenant_id=log)])
    assert verified("--against", str(kept))[0] == 0
    cut_off(log, tamper, 5)
    assert verified()[0] == 0
    status, out, _ = verified("--against", str(kept))
    assert status == 1
    assert f"{log}: BAD at position 6: the chain went to 7 once" in out and f"{charlie.tenant_id}: 2 entries" in out
    for _ in range(4):  # the chain has gone on since, past where it was
        record([make_event("conversation.created", tenant_id=log)])
    assert verified()[0] == 0
    assert f"{log}: BAD at position 7: its hash is not the one that was kept" in verified("--against", str(kept))[1]


def test_what_was_kept_shows_a_tenant_that_is_gone(log, charlie, tamper, kept):
    for table in GUARDS:
        tamper(f"DELETE FROM {table} WHERE tenant_id = %s", log)
    assert verified()[0] == 0
    assert f"{log}: BAD at position 1: the chain went to 7 once" in verified("--against", str(kept))[1]
    assert verified("--against", str(kept), "--tenant", log)[0] == 1
    assert verified("--against", str(kept), "--tenant", str(charlie.tenant_id))[0] == 0


def test_what_retention_has_dropped_since_is_no_matter(log, kept):
    for _ in range(2):
        record([make_event("conversation.created", tenant_id=log)])
    assert drop_oldest(tenant_id=log, before=timezone.now() + timedelta(days=1)) == 8
    assert verified("--against", str(kept))[0] == 0


@pytest.mark.parametrize(
    "text", ["nonsense", "[]", "{}", '{"is_whole": true, "tenant_id": "t", "position": null}', "\xff"]
)
def test_what_was_kept_is_no_output_of_the_command(log, tmp_path, text):
    path = tmp_path / "kept.jsonl"
    path.write_text(text, encoding="latin-1")
    status, _, error = verified("--against", str(path))
    assert status == 2 and "not what --json writes" in error
    assert verified("--against", str(tmp_path / "missing"))[0] == 2


def test_the_command_cannot_tell_of_an_unknown_tenant_or_without_the_table(log):
    assert verified("--tenant", "nobody")[0] == 2
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE audit_auditchain RENAME TO gone")
    status, _, error = verified("--tenant", log)
    assert status == 2 and "could not be read" in error


@pytest.mark.django_db(transaction=True)
def test_entries_that_are_appended_while_it_reads_do_no_harm(log, monkeypatch):
    """The end of the chain is that of the moment at which reading began."""
    monkeypatch.setattr("voicehelper.audit.verification.CHUNK_ROWS", 2)
    original, appended = fields_of, []

    def append_meanwhile(entry):
        if not appended:
            appended.append(True)
            record_in_another_session(log)
        return original(entry)

    monkeypatch.setattr("voicehelper.audit.verification.fields_of", append_meanwhile)
    assert (verify(log).bad_position, appended) == (None, [True])
    assert entries_of(log)[-1].position == 8


def record_in_another_session(tenant_id: str) -> None:
    def work() -> None:
        try:
            record([make_event("conversation.created", tenant_id=tenant_id)])
        finally:
            connection.close()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
