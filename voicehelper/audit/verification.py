"""Reading the chains: is the log what was written, and a tenant's part of it as a file."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.db import DataError, connection, transaction
from django.db.models import Max, Min

from .chain import COLUMNS, GENESIS, Chain, ChainBroken, export_line, fields_of
from .models import AuditChain, AuditEntry

CHUNK_ROWS = 500
"""Entries that are in memory at a time; one can have a megabyte."""

_UNREADABLE = (DataError, ValueError, RecursionError)
"""What reading a time outside of Python's, a number of too many digits or endless nesting raises."""

# From one tenant to the next by index: as many look-ups as there are tenants, whatever the number of entries.
TENANTS = """
WITH RECURSIVE found (tenant_id) AS (
    (SELECT tenant_id FROM audit_auditentry ORDER BY tenant_id LIMIT 1)
    UNION ALL
    SELECT (SELECT tenant_id FROM audit_auditentry WHERE tenant_id > found.tenant_id ORDER BY tenant_id LIMIT 1)
      FROM found WHERE found.tenant_id IS NOT NULL
)
SELECT tenant_id FROM found WHERE tenant_id IS NOT NULL UNION SELECT tenant_id FROM audit_auditchain ORDER BY 1
"""

# What migration 0004 has put there, and always fires.
GUARDS = {
    "audit_auditentry": ("audit_is_append_only", "audit_is_not_truncated"),
    "audit_auditchain": ("audit_is_append_only", "audit_chain_goes_on", "audit_is_not_truncated"),
}
GUARDS_OFF = """
SELECT table_name, trigger_name FROM unnest(%s::text[], %s::text[]) AS wanted (table_name, trigger_name)
 WHERE NOT EXISTS (SELECT FROM pg_trigger
                    WHERE tgrelid = to_regclass(table_name) AND tgname = trigger_name AND tgenabled = 'A')
"""


class UnknownTenant(LookupError):
    """The log knows nothing of this tenant."""


@dataclass(frozen=True)
class Verified:
    """What became of a tenant's chain. `bad_position`: the first one that is wrong, None when all is as it was written.

    `entries`: how many were read and right. `position`, `hash`: of the last entry, as the chain's row has it (None and
    empty where that row is gone). `begins_after`: the last position that retention has deleted.
    """

    tenant_id: str
    entries: int
    position: int | None
    hash: str
    begins_after: int
    bad_position: int | None = None
    what: str = ""


def tenants() -> list[str]:
    """The tenants that have entries, or a chain."""
    with connection.cursor() as cursor:
        cursor.execute(TENANTS)
        return [tenant_id for (tenant_id,) in cursor.fetchall()]


def guards_off() -> list[str]:
    """The triggers that should keep the log append-only, and are switched off or gone."""
    pairs = [(table, trigger) for table, triggers in GUARDS.items() for trigger in triggers]
    with connection.cursor() as cursor:
        cursor.execute(GUARDS_OFF, [list(column) for column in zip(*pairs, strict=True)])
        return [f"{trigger} of {table}" for table, trigger in cursor.fetchall()]


def verify(tenant_id: str, kept: tuple[int, str] | None = None) -> Verified:
    """Read a tenant's chain as it is at one moment, from its beginning to its end or the first wrong position.

    `kept`: the position and hash of an earlier last entry, which must still be so unless retention has dropped it.
    Raises UnknownTenant when the log knows nothing of the tenant.
    """
    kept_position, kept_hash = kept or (0, GENESIS)
    with one_moment():
        head = AuditChain.objects.filter(tenant_id=tenant_id).first()
        chain = Chain() if head is None else Chain(head.dropped_position, head.dropped_hash)
        bad_position, what = None, ""
        try:
            for entry in _entries(tenant_id):
                chain.follow({**fields_of(entry), "hash": entry.hash})
                if chain.position == kept_position and chain.hash != kept_hash:
                    raise ChainBroken(kept_position, "its hash is not the one that was kept: the chain was made anew")
            if head is None and kept is None and not chain.entries:
                raise UnknownTenant(f"the audit log has no tenant {tenant_id!r}")
            if (last := chain.position or 0) < kept_position:
                raise ChainBroken(last + 1, f"the chain went to {kept_position} once: its end was cut off")
            _check_end(chain, head)
        except ChainBroken as broken:
            bad_position, what = broken.position, broken.what
    return Verified(
        tenant_id=tenant_id,
        entries=chain.entries,
        position=head.position if head else None,
        hash=head.hash if head else "",
        begins_after=head.dropped_position if head else 0,
        bad_position=bad_position,
        what=what,
    )


def _check_end(chain: Chain, head: AuditChain | None) -> None:
    last = chain.position or 0
    if head is None:
        raise ChainBroken(last, "the row that says where the chain ends is gone")
    if last < head.position:
        raise ChainBroken(last + 1, f"the entries from here to {head.position} are missing")
    if last > head.position:
        raise ChainBroken(head.position + 1, f"the chain ends at {head.position}: entries were inserted after it")
    if chain.hash != head.hash:
        raise ChainBroken(last, "its hash is not the one that the chain ends with: entries were replaced")


def export(
    tenant_id: str, export_format: str, *, since: datetime | None = None, until: datetime | None = None
) -> Iterator[str]:
    """Yield the lines of a tenant's entries, oldest first; for CSV with a header.

    `since` (inclusive), `until` (exclusive): when it happened. What comes is the unbroken part of the chain that holds
    all of those entries, so that it can be verified; entries that came late may have others between them.

    Raises UnknownTenant when the log knows nothing of the tenant, ChainBroken for an entry that cannot be read.
    """
    # All quoted: by itself the writer does not see that a carriage return ends a line as well.
    writer = csv.writer(_Echo(), lineterminator="\n", quoting=csv.QUOTE_ALL)
    with one_moment():
        entries = AuditEntry.objects.filter(tenant_id=tenant_id)
        if not entries.exists() and not AuditChain.objects.filter(tenant_id=tenant_id).exists():
            raise UnknownTenant(f"the audit log has no tenant {tenant_id!r}")
        within = entries
        if since is not None:
            within = within.filter(occurred_at__gte=since)
        if until is not None:
            within = within.filter(occurred_at__lt=until)
        ends = within.aggregate(first=Min("position"), last=Max("position"))
        if export_format == "csv":
            yield writer.writerow(COLUMNS)
        if ends["first"] is not None:
            for entry in _entries(tenant_id, **ends):
                line = export_line({**fields_of(entry), "hash": entry.hash}, export_format)
                yield line if isinstance(line, str) else writer.writerow(line)


def _entries(tenant_id: str, first: int | None = None, last: int | None = None) -> Iterator[AuditEntry]:
    """Raises ChainBroken for an entry that holds what none was written with, and Python cannot even read."""
    entries = AuditEntry.objects.filter(tenant_id=tenant_id).order_by("position", "id")
    if first is not None and last is not None:
        entries = entries.filter(position__range=(first, last))
    found = None
    try:
        for found in entries.iterator(chunk_size=CHUNK_ROWS):
            yield found
        return
    except _UNREADABLE:
        pass
    # It is among the next ones: one by one, so that those before it are still followed.
    if found is not None:
        entries = entries.filter(position__gt=found.position)
    for id_, position in list(entries.values_list("id", "position")[:CHUNK_ROWS]):
        try:
            entry = entries.get(id=id_)
        except _UNREADABLE as error:
            raise ChainBroken(position, f"the entry was changed: it cannot be read: {error}") from None
        yield entry


@contextmanager
def one_moment() -> Iterator[None]:
    """A transaction that sees the database as it is at its first statement; within a transaction that one goes on."""
    is_outermost = not connection.in_atomic_block
    with transaction.atomic():
        if is_outermost:
            with connection.cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        yield


class _Echo:
    """Hands back what a CSV writer makes, instead of keeping it."""

    def write(self, text: str) -> str:
        return text


def as_json(verified: Verified) -> dict[str, Any]:
    """What `verify_audit_log --json` says of a tenant."""
    return {
        "tenant_id": verified.tenant_id,
        "is_whole": verified.bad_position is None,
        "entries": verified.entries,
        "position": verified.position,
        "hash": verified.hash,
        "begins_after": verified.begins_after,
        "first_bad_position": verified.bad_position,
        "what": verified.what,
    }
