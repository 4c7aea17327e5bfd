"""The exported log, and that it can be verified without the database."""

import csv
import io
import json
from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from events_outbox.testing import make_event
from tests.voicehelper.audit.conftest import entries_of
from voicehelper.audit.chain import COLUMNS, ChainBroken, verify_export
from voicehelper.audit.event_handlers import record

both = pytest.mark.parametrize("export_format", ["jsonl", "csv"])


def export(*arguments: str) -> str:
    out = io.StringIO()
    call_command("export_audit_log", *arguments, stdout=out)
    return out.getvalue()


def verified(text: str, export_format: str):
    return verify_export(io.StringIO(text, newline=""), export_format)


@both
def test_an_export_is_verified_and_holds_the_tenant_s_entries_alone(log, charlie, export_format):
    text = export("--tenant", log, "--format", export_format)
    found = verified(text, export_format)
    assert (found.tenant_id, found.entries, found.first_position, found.last_position) == (log, 7, 1, 7)
    assert found.last_hash == entries_of(log)[-1].hash
    assert str(charlie.tenant_id) not in text
    with pytest.raises(ChainBroken) as broken:
        verified(text.replace("Message 2", "Message 9"), export_format)
    assert broken.value.position == 6


def test_what_an_export_holds(log):
    entry = entries_of(log)[3]
    lines = [json.loads(line) for line in export("--tenant", log).splitlines()]
    assert set(lines[3]) == set(COLUMNS)
    assert (lines[3]["event_id"], lines[3]["payload"]["content"]) == (str(entry.event_id), "Message 0")
    rows = list(csv.DictReader(io.StringIO(export("--tenant", log, "--format", "csv"), newline="")))
    assert [row["hash"] for row in rows] == [line["hash"] for line in lines]
    assert json.loads(rows[3]["payload"]) == lines[3]["payload"]


@both
def test_a_period_is_an_unbroken_part_of_the_chain(tenant, export_format):
    now = timezone.now()
    hours = [9, 8, 1, 6, 5, 4]  # the third one came late
    record([make_event("conversation.created", tenant_id=tenant.id, timestamp=now - timedelta(hours=h)) for h in hours])

    def positions(*arguments: str) -> tuple[int | None, int | None]:
        text = export("--tenant", str(tenant.id), "--format", export_format, *arguments)
        found = verified(text, export_format)
        return found.first_position, found.last_position

    assert positions("--since", "5.5h") == (3, 6)
    assert positions("--since", "8.5h", "--until", "7h") == (2, 2)
    assert positions("--until", "5.5h") == (1, 4)
    assert positions("--since", "30m") == (None, None)


@pytest.mark.parametrize("arguments", [["--tenant", "nobody"], ["--tenant", "t", "--since", "1h", "--until", "2h"]])
def test_what_cannot_be_exported(db, arguments):
    with pytest.raises(CommandError) as error:
        export(*arguments)
    assert error.value.returncode == 2


def test_an_entry_that_cannot_be_read_ends_the_export(log, tamper):
    tamper("UPDATE audit_auditentry SET occurred_at = 'infinity' WHERE tenant_id = %s AND position = 3", log)
    with pytest.raises(CommandError, match="position 3") as error:
        export("--tenant", log)
    assert error.value.returncode == 2


def test_texts_that_a_table_could_break_on(tenant):
    odd = '=1+1,"\r\n\x1f\u2028😀'
    record([make_event("conversation.created", tenant_id=tenant.id, aggregate_id=odd, metadata={"a,b": odd})])
    for export_format in ("jsonl", "csv"):
        assert verified(export("--tenant", str(tenant.id), "--format", export_format), export_format).entries == 1


@pytest.mark.parametrize("odd", ["a\rb", "\r", "\n", "'", "'=1", "\"'", " =1", "'@x'"], ids=repr)
def test_texts_that_a_csv_could_break_on(tenant, odd):
    """A lone carriage return, and what looks as if an apostrophe had been put in front."""
    record([make_event("conversation.created", tenant_id=tenant.id, aggregate_id=odd, correlation_id=odd)])
    assert verified(export("--tenant", str(tenant.id), "--format", "csv"), "csv").entries == 1


@pytest.mark.parametrize("formula", ["=1+1", "+1", "-1+1", "@SUM(1)", "\t=1", '=HYPERLINK("http://x","y")'], ids=repr)
def test_what_a_client_chose_is_no_formula_in_a_spreadsheet(tenant, formula):
    record([make_event("conversation.created", tenant_id=tenant.id, correlation_id=formula)])
    text = export("--tenant", str(tenant.id), "--format", "csv")
    [row] = csv.DictReader(io.StringIO(text, newline=""))
    assert row["correlation_id"] == f"'{formula}"
    assert verified(text, "csv").entries == 1
