"""Every entry is in a chain, and the database refuses to change or delete one.

Consumers of a version before this one cannot add entries any more: stop them first, else what they fail on waits as
their dead letters and is to be replayed.

What is refused, and how it is allowed:

- UPDATE and DELETE of entries, and of a chain's row whatever would take it back: allowed in a transaction that has set
  voicehelper.audit_maintenance to its own id (`services.audit_maintenance()`). A setting of a session, role or database
  opens nothing, since it can name no transaction that is to come; and no trigger has to be switched off for retention,
  where somebody might forget to switch it on again.
- TRUNCATE, in any case. Only the table's owner can do something about that, with ALTER TABLE ... DISABLE TRIGGER
  audit_is_not_truncated, as tests do in their own database, where every test empties the tables.

A superuser can do anything; the hash chain shows it.
"""

from importlib import import_module
from typing import Any

from django.db import migrations, models

LOCK = "LOCK TABLE audit_auditentry IN SHARE ROW EXCLUSIVE MODE"

APPEND_ONLY = """
CREATE FUNCTION audit_is_maintained() RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT current_setting('voicehelper.audit_maintenance', true) = pg_current_xact_id_if_assigned()::text
$$;

CREATE FUNCTION audit_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP <> 'TRUNCATE' AND coalesce(audit_is_maintained(), false) THEN
        RETURN NULL;
    END IF;
    RAISE EXCEPTION '% of % is refused: the audit log is append-only', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation',
              HINT = 'See voicehelper/audit/migrations/0004_append_only.py for what retention and tests may do.';
END $$;

CREATE FUNCTION audit_chain_goes_on() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF coalesce(audit_is_maintained(), false)
       OR (NEW.tenant_id = OLD.tenant_id
           AND (NEW.position > OLD.position OR (NEW.position = OLD.position AND NEW.hash = OLD.hash))
           AND NEW.dropped_position = OLD.dropped_position AND NEW.dropped_hash = OLD.dropped_hash) THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION '% of % is refused: a chain of the audit log only goes on', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation',
              HINT = 'See voicehelper/audit/migrations/0004_append_only.py for what retention and tests may do.';
END $$;

CREATE TRIGGER audit_is_append_only BEFORE UPDATE OR DELETE ON audit_auditentry
    FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse();
CREATE TRIGGER audit_is_append_only BEFORE DELETE ON audit_auditchain
    FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse();
CREATE TRIGGER audit_chain_goes_on BEFORE UPDATE ON audit_auditchain
    FOR EACH ROW EXECUTE FUNCTION audit_chain_goes_on();
CREATE TRIGGER audit_is_not_truncated BEFORE TRUNCATE ON audit_auditentry
    FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse();
CREATE TRIGGER audit_is_not_truncated BEFORE TRUNCATE ON audit_auditchain
    FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse();

-- Also with session_replication_role = replica, which leaves out ordinary triggers.
ALTER TABLE audit_auditentry ENABLE ALWAYS TRIGGER audit_is_append_only;
ALTER TABLE audit_auditchain ENABLE ALWAYS TRIGGER audit_is_append_only;
ALTER TABLE audit_auditchain ENABLE ALWAYS TRIGGER audit_chain_goes_on;
ALTER TABLE audit_auditentry ENABLE ALWAYS TRIGGER audit_is_not_truncated;
ALTER TABLE audit_auditchain ENABLE ALWAYS TRIGGER audit_is_not_truncated;
"""
UNDO = """
DROP TRIGGER audit_is_append_only ON audit_auditentry;
DROP TRIGGER audit_is_not_truncated ON audit_auditentry;
DROP TRIGGER audit_is_append_only ON audit_auditchain;
DROP TRIGGER audit_chain_goes_on ON audit_auditchain;
DROP TRIGGER audit_is_not_truncated ON audit_auditchain;
DROP FUNCTION audit_chain_goes_on();
DROP FUNCTION audit_refuse();
DROP FUNCTION audit_is_maintained();
"""


def chain_the_rest(apps: Any, schema_editor: Any) -> None:
    import_module("voicehelper.audit.migrations.0003_chain_entries").chain_entries(apps, schema_editor)


class Migration(migrations.Migration):
    dependencies = [("audit", "0003_chain_entries")]

    operations = [
        migrations.RunSQL(LOCK, migrations.RunSQL.noop),
        migrations.RunPython(chain_the_rest, migrations.RunPython.noop),
        migrations.AlterField(
            "auditentry",
            "position",
            models.BigIntegerField(help_text="1, 2, ... within the tenant, without gaps."),
        ),
        migrations.AlterField(
            "auditentry",
            "previous_hash",
            models.CharField(help_text="The hash of the tenant's entry before this one.", max_length=64),
        ),
        migrations.AlterField(
            "auditentry", "hash", models.CharField(help_text="SHA-256 of all other fields.", max_length=64)
        ),
        migrations.AddConstraint(
            "auditentry", models.UniqueConstraint(fields=("tenant_id", "position"), name="audit_position")
        ),
        migrations.AddIndex("auditentry", models.Index(fields=["tenant_id", "occurred_at"], name="audit_tenant_time")),
        migrations.RunSQL(APPEND_ONLY, UNDO),
    ]
