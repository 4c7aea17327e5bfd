"""Writes of the audit log."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime

from django.db import DataError, connection, transaction
from django.utils import timezone
from google.protobuf.json_format import MessageToDict

from events_outbox import Event, PermanentEventError

from .chain import GENESIS, entry_hash, fields_of
from .models import AuditChain, AuditEntry

# Makes the rows that are missing, and locks all of them, one after the other in the order given.
LOCK_CHAINS = """
INSERT INTO audit_auditchain AS chain (tenant_id, position, hash, dropped_position, dropped_hash)
SELECT tenant_id, 0, %(genesis)s, 0, %(genesis)s FROM unnest(%(tenants)s::text[]) AS wanted (tenant_id)
ON CONFLICT (tenant_id) DO UPDATE SET position = chain.position
RETURNING tenant_id, position, hash
"""
MOVE_CHAINS = """
UPDATE audit_auditchain AS chain SET position = moved.position, hash = moved.hash
  FROM unnest(%s::text[], %s::bigint[], %s::text[]) AS moved (tenant_id, position, hash)
 WHERE chain.tenant_id = moved.tenant_id
"""
Heads = dict[str, tuple[int, str]]
"""Tenant -> position and hash of its last entry."""


# Without a savepoint: the batch is one transaction, and all of it is done again when this raises.
@transaction.atomic(savepoint=False)
def append_entries(*, events: Sequence[Event]) -> int:
    """Append events to the chains of their tenants, in their order; return how many were not in the log already.

    Raises PermanentEventError for a text that PostgreSQL cannot hold (a NUL character); nothing was written then.
    """
    try:
        return _append(events)
    except DataError as error:
        # Its first line alone: the others quote what somebody has written, and would do so in the log.
        raise PermanentEventError(f"PostgreSQL cannot hold it: {str(error).partition(chr(10))[0]}") from None


def _append(events: Sequence[Event]) -> int:
    entries = [_entry(event) for event in {event.event_id: event for event in events}.values()]
    # The locks come before it is asked what is there, and are held to the commit: who appends to the same tenant waits,
    # and then sees these entries. Sorted, so that workers lock the rows in one order and never deadlock.
    heads = lock_chains(sorted({entry.tenant_id for entry in entries}))
    # An event replayed after its processed mark was pruned is in the log already.
    known = set(
        AuditEntry.objects.filter(event_id__in=[entry.event_id for entry in entries])
        .order_by()
        .values_list("event_id", flat=True)
    )
    new = [entry for entry in entries if entry.event_id not in known]
    recorded_at = timezone.now()
    for entry in new:
        entry.recorded_at = recorded_at
        position, previous_hash = heads[entry.tenant_id]
        entry.position, entry.previous_hash = position + 1, previous_hash
        entry.hash = entry_hash(fields_of(entry))
        heads[entry.tenant_id] = entry.position, entry.hash
    if new:
        AuditEntry.objects.bulk_create(new)
        move_chains({entry.tenant_id: heads[entry.tenant_id] for entry in new})
    return len(new)


def _entry(event: Event) -> AuditEntry:
    return AuditEntry(
        event_id=event.event_id,
        event_type=event.event_type,
        event_version=event.event_version,
        tenant_id=event.tenant_id,
        user_id=event.user_id,
        aggregate_id=event.aggregate_id,
        occurred_at=event.timestamp,
        correlation_id=event.correlation_id,
        causation_id=event.causation_id,
        payload=MessageToDict(
            event.payload, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        ),
        metadata=dict(event.metadata),
    )


def lock_chains(tenant_ids: Sequence[str]) -> Heads:
    """Lock the chains of these tenants to the end of the transaction, in this order, and return where they stand."""
    with connection.cursor() as cursor:
        cursor.execute(LOCK_CHAINS, {"genesis": GENESIS, "tenants": list(tenant_ids)})
        return {tenant_id: (position, hash_) for tenant_id, position, hash_ in cursor.fetchall()}


def move_chains(heads: Heads) -> None:
    """Note the last entries of chains that are locked."""
    tenant_ids = sorted(heads)
    with connection.cursor() as cursor:
        cursor.execute(
            MOVE_CHAINS,
            [tenant_ids, [heads[tenant][0] for tenant in tenant_ids], [heads[tenant][1] for tenant in tenant_ids]],
        )


@contextmanager
def audit_maintenance() -> Iterator[None]:
    """A transaction in which the database lets entries be changed and deleted: for retention and for tests.

    It takes the transaction's own id, so nothing that is set for a session, a role or a database opens the log, and
    what was opened is closed again at the end. TRUNCATE stays refused.
    """
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SELECT set_config('voicehelper.audit_maintenance', pg_current_xact_id()::text, true)")
        yield
        # Where this is part of a larger transaction. After an error it is rolled back, and this setting with it.
        with connection.cursor() as cursor:
            cursor.execute("SELECT set_config('voicehelper.audit_maintenance', '', true)")


def drop_oldest(*, tenant_id: str, before: datetime) -> int:
    """Delete the beginning of a tenant's chain, for retention; return how many entries it had.

    That is all entries before the first one that was recorded at `before` or later; the last entry stays in any case.
    The chain notes where it begins now, and verifies as before.
    """
    with audit_maintenance():
        if AuditChain.objects.select_for_update().filter(tenant_id=tenant_id).first() is None:
            return 0
        entries = AuditEntry.objects.filter(tenant_id=tenant_id)
        kept = entries.filter(recorded_at__gte=before).order_by("position").first()
        kept = kept or entries.order_by("-position").first()
        last = kept and entries.filter(position__lt=kept.position).order_by("-position").first()
        if last is None:
            return 0
        count, _ = entries.filter(position__lte=last.position).delete()
        AuditChain.objects.filter(tenant_id=tenant_id).update(dropped_position=last.position, dropped_hash=last.hash)
    return count
