"""The canonical form of JSON, and exports that are verified without a database."""

import csv
import io
import json
import math
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voicehelper.audit import chain
from voicehelper.audit.chain import (
    COLUMNS,
    GENESIS,
    ChainBroken,
    Unreadable,
    canonical_json,
    entry_hash,
    export_line,
    verify_export,
)

# Appendix B of RFC 8785: the bits of the double, and how it is written.
RFC_NUMBERS = {
    0x0000000000000000: "0",
    0x8000000000000000: "0",
    0x0000000000000001: "5e-324",
    0x8000000000000001: "-5e-324",
    0x7FEFFFFFFFFFFFFF: "1.7976931348623157e+308",
    0x4340000000000000: "9007199254740992",
    0xC340000000000000: "-9007199254740992",
    0x4430000000000000: "295147905179352830000",
    0x44B52D02C7E14AF5: "9.999999999999997e+22",
    0x44B52D02C7E14AF6: "1e+23",
    0x44B52D02C7E14AF7: "1.0000000000000001e+23",
    0x444B1AE4D6E2EF4E: "999999999999999700000",
    0x444B1AE4D6E2EF4F: "999999999999999900000",
    0x444B1AE4D6E2EF50: "1e+21",
    0x3EB0C6F7A0B5ED8C: "9.999999999999997e-7",
    0x3EB0C6F7A0B5ED8D: "0.000001",
    0x41B3DE4355555553: "333333333.3333332",
    0x41B3DE4355555554: "333333333.33333325",
    0x41B3DE4355555555: "333333333.3333333",
    0x41B3DE4355555556: "333333333.3333334",
    0x41B3DE4355555557: "333333333.33333343",
    0xBECBF647612F3696: "-0.0000033333333333333333",
    0x43143FF3C1CB0959: "1424953923781206.2",
}


@pytest.mark.parametrize(("bits", "text"), RFC_NUMBERS.items(), ids=RFC_NUMBERS.values())
def test_numbers_are_written_as_the_rfc_says(bits, text):
    (number,) = struct.unpack(">d", bits.to_bytes(8, "big"))
    assert canonical_json(number) == text
    assert canonical_json({"é": [number]}) == f'{{"é":[{text}]}}'  # by the slow way


def test_members_are_sorted_by_utf_16_and_nothing_is_escaped_without_need():
    value = {"\u20ac": "Euro", "\r": "CR", "\ufb33": "Dalet", "1": "One", "\U0001f600": "Smile", "\x80": "", "\xf6": ""}
    members = ['"\\r":"CR"', '"1":"One"', '"\x80":""', '"ö":""', '"€":"Euro"', '"😀":"Smile"', '"\ufb33":"Dalet"']
    assert canonical_json(value) == "{" + ",".join(members) + "}"
    assert canonical_json('\u20ac$\x0f\nA\'B"\\\\"/\x7f\u2028') == '"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/\x7f\u2028"'
    assert canonical_json([None, True, False, {}, []]) == "[null,true,false,{},[]]"


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(PLAIN)
def test_both_ways_of_writing_agree_and_what_is_read_back_is_written_the_same(value):
    parts: list[str] = []
    try:
        chain._write(value, parts)
    except ValueError:  # a whole number that is no double
        with pytest.raises(ValueError):
            canonical_json(value)
        return
    assert canonical_json(value) == "".join(parts)
    assert canonical_json(json.loads("".join(parts))) == "".join(parts)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, {1, 2}, b"x"], ids=repr)
def test_what_json_does_not_have(value):
    with pytest.raises(ValueError):
        canonical_json({"x": value})


def made_entries(count: int, first: int = 1, tenant_id: str = "t-1") -> list[dict]:
    entries, previous = [], GENESIS if first == 1 else "f" * 64
    for position in range(first, first + count):
        entry = {name: f"{name} {position}" for name in COLUMNS}
        entry |= {"tenant_id": tenant_id, "position": position, "previous_hash": previous}
        entry |= {"payload": {"text": f'"{position}",\r\n=1+1', "cost": 1e22, "list": [0.5]}, "metadata": {}}
        entry["hash"] = previous = entry_hash(entry)
        entries.append(entry)
    return entries


def exported(entries: list[dict], export_format: str) -> str:
    if export_format == "jsonl":
        return "".join(export_line(entry, "jsonl") for entry in entries)
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([COLUMNS, *(export_line(entry, "csv") for entry in entries)])
    return out.getvalue()


def verified(text: str, export_format: str):
    return verify_export(io.StringIO(text, newline=""), export_format)


both = pytest.mark.parametrize("export_format", ["jsonl", "csv"])


@both
@pytest.mark.parametrize("first", [1, 40])
def test_a_whole_export(export_format, first):
    entries = made_entries(3, first)
    export = verified(exported(entries, export_format), export_format)
    assert (export.tenant_id, export.entries) == ("t-1", 3)
    assert (export.first_position, export.last_position) == (first, first + 2)
    assert export.last_hash == entries[-1]["hash"]


@both
def test_an_empty_export(export_format):
    assert verified(exported([], export_format), export_format).entries == 0


def swapped(entries):
    entries[1], entries[2] = entries[2], entries[1]


def rehashed(entries):
    entries[1]["user_id"] = "mallory"
    entries[1]["hash"] = entry_hash(entries[1])


TAMPERED = {
    "a field": (lambda entries: entries[1].update(user_id="mallory"), 2),
    "the payload": (lambda entries: entries[1]["payload"].update(cost=1), 2),
    "a time": (lambda entries: entries[2].update(occurred_at="2026-01-01T00:00:00.000000Z"), 3),
    "the hash": (lambda entries: entries[1].update(hash="0" * 64), 2),
    "a field and its hash": (rehashed, 3),
    "removed": (lambda entries: entries.pop(1), 2),
    "removed at the start": (lambda entries: entries.pop(0), None),
    "repeated": (lambda entries: entries.insert(1, entries[0]), 1),
    "moved": (swapped, 2),
    "another tenant's": (lambda entries: entries.insert(4, made_entries(1, 5, "t-2")[0]), 5),
    "a chain that begins anew": (lambda entries: entries.extend(made_entries(1)), 1),
}


@both
@pytest.mark.parametrize(("change", "position"), TAMPERED.values(), ids=TAMPERED)
def test_a_changed_export(export_format, change, position):
    entries = made_entries(4)
    change(entries)
    if position is None:  # an export may begin anywhere: the first position tells
        assert verified(exported(entries, export_format), export_format).first_position == 2
        return
    with pytest.raises(ChainBroken) as broken:
        verified(exported(entries, export_format), export_format)
    assert broken.value.position == position


UNREADABLE = [
    ("jsonl", "{}\n", "line 1"),
    ("jsonl", "[1]\n", "line 1"),
    ("jsonl", "nonsense\n", "line 1"),
    ("jsonl", '{"a":1,"a":2}\n', "named twice"),
    ("jsonl", "[" * 100_000, "line 1"),
    ("csv", "", "header"),
    ("csv", "a,b\n", "header"),
    ("csv", ",".join(COLUMNS) + "\n1,2\n", "2 cells"),
    ("csv", ",".join(COLUMNS) + "\nt,x" + ",{}" * 14 + "\n", "no position"),
    ("csv", ",".join(COLUMNS) + "\nt,1" + ",x" * 14 + "\n", "line 2"),
]


@pytest.mark.parametrize(("export_format", "text", "message"), UNREADABLE)
def test_what_is_no_export(export_format, text, message):
    with pytest.raises(Unreadable, match=message):
        verified(text, export_format)


def test_a_member_more_is_no_export():
    line = json.loads(export_line(made_entries(1)[0], "jsonl"))
    with pytest.raises(Unreadable):
        verified(json.dumps({**line, "note": "not hashed"}), "jsonl")


@both
def test_the_file_alone_verifies_an_export(tmp_path, export_format):
    """With the standard library alone (-I -S): as somebody else would."""
    entries = made_entries(3)
    path = tmp_path / f"audit.{export_format}"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", "-S", chain.__file__, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    path.write_text(exported(entries, export_format), newline="")
    whole = run(str(path))
    assert (whole.returncode, whole.stderr) == (0, "")
    assert entries[-1]["hash"] in whole.stdout and "3 entries of tenant t-1" in whole.stdout
    del entries[1]
    path.write_text(exported(entries, export_format), newline="")
    assert (run(str(path)).returncode, run(str(path)).stderr) == (1, "position 2: the entry is missing: 3 comes next\n")
    path.write_text("nonsense")
    assert (
        run(str(path)).returncode == run(str(tmp_path / "missing.csv")).returncode == run("audit.xlsx").returncode == 2
    )
