"""Chains the entries that are there already, tenant by tenant in the order of their ids.

A thousand at a time, each step a transaction of its own: it can be stopped and goes on where it was. Entries that an
older version's consumer adds meanwhile are chained by the next migration, which keeps it from adding more.
"""

from typing import Any
from uuid import UUID

from django.db import migrations, transaction

from voicehelper.audit.chain import entry_hash, fields_of

STEP_ROWS = 1000

UPDATE = """
UPDATE audit_auditentry AS entry
   SET position = chained.position, previous_hash = chained.previous_hash, hash = chained.hash
  FROM unnest(%s::uuid[], %s::bigint[], %s::text[], %s::text[]) AS chained (id, position, previous_hash, hash)
 WHERE entry.id = chained.id
"""
# From one tenant to the next by index.
TENANTS = """
WITH RECURSIVE found (tenant_id) AS (
    (SELECT tenant_id FROM audit_auditentry ORDER BY tenant_id LIMIT 1)
    UNION ALL
    SELECT (SELECT tenant_id FROM audit_auditentry WHERE tenant_id > found.tenant_id ORDER BY tenant_id LIMIT 1)
      FROM found WHERE found.tenant_id IS NOT NULL
)
SELECT tenant_id FROM found WHERE tenant_id IS NOT NULL
"""


def chain_entries(apps: Any, schema_editor: Any) -> None:
    connection = schema_editor.connection
    with connection.cursor() as cursor:
        cursor.execute(TENANTS)
        tenant_ids = [tenant_id for (tenant_id,) in cursor.fetchall()]
    for tenant_id in tenant_ids:
        # From where the last step ended, by index. A second round, from the start, is for what came in late.
        for _ in range(2):
            last_id = None
            while last_id := _step(apps, connection, tenant_id, last_id):
                pass


def _step(apps: Any, connection: Any, tenant_id: str, after_id: UUID | None) -> UUID | None:
    """Chain the tenant's next entries and return the id of the last one. None: there are none left."""
    chains, entries = apps.get_model("audit", "AuditChain").objects, apps.get_model("audit", "AuditEntry").objects
    with transaction.atomic(using=connection.alias):
        chains.get_or_create(tenant_id=tenant_id)
        chain = chains.select_for_update().get(tenant_id=tenant_id)
        rest = entries.filter(tenant_id=tenant_id, position__isnull=True)
        if after_id is not None:
            rest = rest.filter(id__gt=after_id)
        todo = list(rest.order_by("id")[:STEP_ROWS])
        if not todo:
            return None
        for entry in todo:
            entry.position, entry.previous_hash = chain.position + 1, chain.hash
            entry.hash = entry_hash(fields_of(entry))
            chain.position, chain.hash = entry.position, entry.hash
        chain.save(update_fields=["position", "hash"])
        columns = ("id", "position", "previous_hash", "hash")
        with connection.cursor() as cursor:
            cursor.execute(UPDATE, [[getattr(entry, name) for entry in todo] for name in columns])
    last_id: UUID = todo[-1].id
    return last_id


class Migration(migrations.Migration):
    atomic = False  # each step is a transaction

    dependencies = [("audit", "0002_chain_columns")]

    operations = [migrations.RunPython(chain_entries, migrations.RunPython.noop)]
