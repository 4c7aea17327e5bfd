"""The hash chain of the audit log: how an entry is hashed, and how a chain or an exported file is verified.

Nothing but the standard library, so that this file alone verifies an export elsewhere:

    python chain.py audit.jsonl        (or audit.csv; exit status 0: whole, 1: changed, 2: cannot be read)

An entry's hash is the SHA-256, in lower-case hex, of the UTF-8 bytes of a JSON object of its FIELDS, in the canonical
form of RFC 8785 (members sorted by UTF-16 code units, no white space, numbers as ECMAScript writes doubles).
`position` counts 1, 2, ... within the tenant; `previous_hash` is the hash of the entry before, 64 zeros for the
first; times are UTC with six digits: "2026-01-31T14:00:00.000000Z"; `payload` and `metadata` are JSON objects; all else
is text. Whoever changes, removes, inserts or moves an entry breaks this hash or the one of the next entry.

A JSON Lines export has one such object a line, with `hash` as a further member. A CSV export has the COLUMNS as its
header, and `payload` and `metadata` as JSON text. A cell that a spreadsheet would take for a formula, or that begins
with an apostrophe, has an apostrophe in front, which does not belong to the text.
"""

import csv
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

FIELDS = (
    "tenant_id",
    "position",
    "id",
    "event_id",
    "event_type",
    "event_version",
    "user_id",
    "aggregate_id",
    "occurred_at",
    "correlation_id",
    "causation_id",
    "payload",
    "metadata",
    "recorded_at",
    "previous_hash",
)
"""What the hash is of."""
COLUMNS = (*FIELDS, "hash")
"""What an export holds of an entry."""
GENESIS = "0" * 64
"""The previous hash of a tenant's first entry."""
FORMATS = ("jsonl", "csv")

_AS_JSON = ("payload", "metadata")
_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n")
"""What a formula begins with; a client chooses a correlation id."""
_EXACT_INTEGERS = 2**53
_LARGEST_CELL = 2**30
_quoted = json.JSONEncoder(ensure_ascii=False).encode
_written_at_once = json.JSONEncoder(
    ensure_ascii=False, check_circular=False, separators=(",", ":"), sort_keys=True
).encode


class ChainBroken(Exception):
    """A chain that is not what was written. `position`: the first one that is wrong."""

    def __init__(self, position: int, what: str) -> None:
        super().__init__(f"position {position}: {what}")
        self.position = position
        self.what = what


class Unreadable(ValueError):
    """A file that is no export: the sentence names the line."""


def fields_of(entry: Any) -> dict[str, Any]:
    """The FIELDS of an entry that the database holds, in the form in which they are hashed and exported."""
    return {
        "tenant_id": entry.tenant_id,
        "position": entry.position,
        "id": str(entry.id),
        "event_id": str(entry.event_id),
        "event_type": entry.event_type,
        "event_version": entry.event_version,
        "user_id": entry.user_id,
        "aggregate_id": entry.aggregate_id,
        "occurred_at": utc_text(entry.occurred_at),
        "correlation_id": entry.correlation_id,
        "causation_id": entry.causation_id,
        "payload": entry.payload,
        "metadata": entry.metadata,
        "recorded_at": utc_text(entry.recorded_at),
        "previous_hash": entry.previous_hash,
    }


def utc_text(moment: datetime) -> str:
    """A time as it is hashed: UTC, six digits of a second, Z."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


def entry_hash(fields: Mapping[str, Any]) -> str:
    """Return the hash of an entry; other members than FIELDS are not looked at.

    Raises KeyError for a field that is missing, ValueError for a value that JSON does not have.
    """
    return hashlib.sha256(canonical_json({name: fields[name] for name in FIELDS}).encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """Return a value as RFC 8785 writes it. Raises ValueError for what JSON does not have."""
    try:
        return _written_at_once(_as_plain(value))
    except _NotPlain:
        parts: list[str] = []
        _write(value, parts)
        return "".join(parts)


class _NotPlain(Exception):
    """A value that Python's own encoder writes in another way."""


def _as_plain(value: Any) -> Any:
    """The value, so that Python's encoder, ten times as fast, writes it in the canonical form. Raises _NotPlain."""
    kind = type(value)
    if kind is str or value is None or kind is bool:
        return value
    if kind is dict:
        if not all(type(name) is str and name.isascii() for name in value):
            raise _NotPlain
        return {name: _as_plain(item) for name, item in value.items()}
    if kind is list:
        return [_as_plain(item) for item in value]
    if kind is float and value.is_integer():
        value, kind = int(value), int
    if kind is int and -_EXACT_INTEGERS <= value <= _EXACT_INTEGERS:
        return value
    if kind is float and math.isfinite(value) and "e" not in repr(value):
        return value
    raise _NotPlain


def _write(value: Any, parts: list[str]) -> None:
    if isinstance(value, str):
        parts.append(_quoted(value))
    elif value is None or isinstance(value, bool):
        parts.append({None: "null", True: "true", False: "false"}[value])
    elif isinstance(value, int | float):
        parts.append(_number(value))
    elif isinstance(value, Mapping):
        separator = "{"
        for name in value if len(value) < 2 else sorted(value, key=_code_units):
            parts += (separator, _quoted(name), ":")
            _write(value[name], parts)
            separator = ","
        parts.append("}" if value else "{}")
    elif isinstance(value, list | tuple):
        separator = "["
        for item in value:
            parts.append(separator)
            _write(item, parts)
            separator = ","
        parts.append("]" if value else "[]")
    else:
        raise ValueError(f"a {type(value).__name__} is nothing that JSON has")


def _code_units(name: str) -> bytes:
    return name.encode("utf-16-be", "surrogatepass")


def _number(value: int | float) -> str:
    """As ECMAScript writes the double: its shortest digits. The database may give 1e22 back as a whole number."""
    if isinstance(value, int):
        if -_EXACT_INTEGERS <= value <= _EXACT_INTEGERS:
            return str(value)
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
    if not math.isfinite(value):
        raise ValueError("JSON has no such number")
    if value == 0:
        return "0"
    sign, numbers, exponent = Decimal(repr(value)).normalize().as_tuple()
    digits, minus = "".join(map(str, numbers)), "-" if sign else ""
    point = len(digits) + int(exponent)  # digits before the decimal point
    if len(digits) <= point <= 21:
        return minus + digits + "0" * (point - len(digits))
    if 0 < point <= 21:
        return f"{minus}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{minus}0.{'0' * -point}{digits}"
    fraction = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{minus}{digits[0]}{fraction}e{'+' if point > 0 else '-'}{abs(point - 1)}"


class Chain:
    """Follows a tenant's entries in the order of their positions.

    `after_position`, `after_hash`: the entry before the first one, which must continue it. None: begin anywhere, as an
    export of a period does. `position` and `hash`: those of the last entry; `entries`: how many there were.
    """

    def __init__(self, after_position: int | None = 0, after_hash: str = GENESIS) -> None:
        self.position = after_position
        self.hash = after_hash
        self.entries = 0

    def follow(self, entry: Mapping[str, Any]) -> None:
        """Go on to the next entry: its FIELDS and its `hash`. Raises ChainBroken."""
        position = entry["position"]
        if not isinstance(position, int) or isinstance(position, bool) or position < 1:
            raise ChainBroken((self.position or 0) + 1, f"an entry stands at {position!r}, which is no position")
        if self.position is None and position == 1:
            self.position, self.hash = 0, GENESIS
        if self.position is not None:
            self._check_place(self.position, position)
        try:
            found = entry_hash(entry)
        except (ValueError, RecursionError) as error:
            raise ChainBroken(position, f"the entry was changed: {error}") from None
        if entry["hash"] != found:
            raise ChainBroken(position, "the entry was changed: its fields no longer give its hash")
        if self.position is not None and entry["previous_hash"] != self.hash:
            raise ChainBroken(position, "it does not continue the entry before it: one of the two was replaced")
        self.position, self.hash = position, found
        self.entries += 1

    def _check_place(self, last: int, position: int) -> None:
        if position == last and self.entries:
            raise ChainBroken(position, "two entries stand there: the chain is forked")
        if position <= last:
            raise ChainBroken(position, f"it comes after {last}: entries were inserted or moved")
        if position > last + 1:
            raise ChainBroken(last + 1, f"the entry is missing: {position} comes next")


@dataclass(frozen=True)
class Export:
    """What a whole export holds. Positions are None, and the hash is empty, when it holds nothing."""

    tenant_id: str
    entries: int
    first_position: int | None
    last_position: int | None
    last_hash: str


def export_line(fields: Mapping[str, Any], export_format: str) -> Sequence[str] | str:
    """An entry (its COLUMNS) as a line of JSON Lines, or as the cells of a CSV row."""
    if export_format == "jsonl":
        return canonical_json({name: fields[name] for name in COLUMNS}) + "\n"
    return [canonical_json(fields[name]) if name in _AS_JSON else _cell(str(fields[name])) for name in COLUMNS]


def _cell(text: str) -> str:
    return f"'{text}" if text.startswith(("'", *_FORMULAS)) else text


def verify_export(lines: Iterable[str], export_format: str) -> Export:
    """Verify an export, line by line. `export_format`: "jsonl" or "csv".

    That it was not cut off at an end, nothing in it can tell: compare the positions, or the last hash, with those that
    `verify_audit_log --json` gives, or with an earlier export.

    Raises ChainBroken for entries that were changed, removed, inserted or moved, Unreadable for what is no export.
    """
    chain, tenant_id, first = Chain(after_position=None), "", None
    for entry in _read(lines, export_format):
        if chain.entries and entry["tenant_id"] != tenant_id:
            raise ChainBroken(entry["position"], f"an entry of another tenant: {entry['tenant_id']!r}")
        chain.follow(entry)
        tenant_id, first = entry["tenant_id"], first or chain.position
    return Export(tenant_id, chain.entries, first, chain.position, chain.hash if chain.entries else "")


def _read(lines: Iterable[str], export_format: str) -> Iterator[dict[str, Any]]:
    if export_format == "jsonl":
        for number, line in enumerate(lines, start=1):
            yield _entry(_loaded(line, number), number)
    elif export_format == "csv":
        csv.field_size_limit(_LARGEST_CELL)
        rows = csv.reader(lines, strict=True)
        try:
            header = next(rows, None)
            if header != list(COLUMNS):
                raise Unreadable(f"line 1: the header is not {','.join(COLUMNS)}")
            for cells in rows:
                yield _entry_of_cells(cells, rows.line_num)
        except csv.Error as error:
            raise Unreadable(f"line {rows.line_num}: {error}") from None
    else:
        raise ValueError(f"{export_format!r} is no format: use {' or '.join(FORMATS)}")


def _entry_of_cells(cells: Sequence[str], number: int) -> dict[str, Any]:
    if len(cells) != len(COLUMNS):
        raise Unreadable(f"line {number}: {len(cells)} cells instead of {len(COLUMNS)}")
    entry: dict[str, Any] = {name: cell.removeprefix("'") for name, cell in zip(COLUMNS, cells, strict=True)}
    for name in _AS_JSON:
        entry[name] = _loaded(entry[name], number)
    if not entry["position"].isdecimal():
        raise Unreadable(f"line {number}: {entry['position']!r} is no position")
    entry["position"] = int(entry["position"])
    return _entry(entry, number)


def _entry(entry: Any, number: int) -> dict[str, Any]:
    if not isinstance(entry, dict) or set(entry) != set(COLUMNS):
        raise Unreadable(f"line {number}: not an object of {', '.join(COLUMNS)}, and nothing else")
    return entry


def _loaded(text: str, number: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_members)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"line {number}: {error}") from None


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):  # readers differ in which one they take: one could be shown, another one hashed
        raise ValueError("a member is named twice")
    return members


def main(arguments: Sequence[str]) -> int:
    """Verify the file that is named, and say what it holds. 0: whole, 1: changed, 2: cannot be read."""
    if len(arguments) != 1 or Path(arguments[0]).suffix.removeprefix(".") not in FORMATS:
        sys.stderr.write("usage: python chain.py FILE.jsonl|FILE.csv\n")
        return 2
    path = Path(arguments[0])
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            export = verify_export(lines, path.suffix.removeprefix("."))
    except ChainBroken as broken:
        sys.stderr.write(f"{broken}\n")
        return 1
    except (Unreadable, OSError, UnicodeDecodeError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(
        f"whole: {export.entries} entries of tenant {export.tenant_id or '-'}, positions {export.first_position} to "
        f"{export.last_position}, last hash {export.last_hash or '-'}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
