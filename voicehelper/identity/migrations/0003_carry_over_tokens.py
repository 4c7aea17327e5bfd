"""The tokens of rest_framework.authtoken become API tokens, so that they go on working; their table goes.

That app kept each token in plain text, as the key of its row, and the admin wrote it into its log as well. It is no
longer installed, so its migrations are not there to depend on: on a new database there is no such table.

Backwards its table comes back empty, where that app's migrations once made it, and users log in again: the tokens
cannot be told from their hashes.
"""

from typing import Any

from django.db import migrations
from django.db.migrations.recorder import MigrationRecorder

from voicehelper.identity import tokens

TABLE = "authtoken_token"
# Before anything is read: a token that somebody gets meanwhile is not lost.
LOCK = "LOCK TABLE authtoken_token IN ACCESS EXCLUSIVE MODE"
# In one statement, however many there are. The ids are UUIDs of version 7, of the time when the token was made, and the
# hash is `tokens.hash_of()`.
CARRY_OVER = """
INSERT INTO identity_apitoken (id, user_id, name, scopes, prefix, secret_hash, by_login, created_at)
SELECT (left(ms, 8) || '-' || right(ms, 4) || '-7' || substr(gen_random_uuid()::text, 16))::uuid,
       user_id, 'before scopes', ARRAY['read', 'write', 'admin'], left(key, %s),
       encode(sha256(convert_to(key, 'UTF8')), 'hex'), false, created
  FROM authtoken_token
 CROSS JOIN LATERAL (SELECT lpad(to_hex(floor(extract(epoch FROM created) * 1000)::bigint), 12, '0')) AS time (ms)
"""
DROP = "DROP TABLE authtoken_token"
CLEAN_LOG = """
UPDATE django_admin_log SET object_repr = left(object_repr, %s)
 WHERE content_type_id IN (SELECT id FROM django_content_type WHERE app_label = 'authtoken')
"""
CREATE = """
CREATE TABLE authtoken_token (
    key varchar(40) PRIMARY KEY,
    created timestamptz NOT NULL,
    user_id uuid NOT NULL UNIQUE REFERENCES identity_user (id) DEFERRABLE INITIALLY DEFERRED
)
"""


def carry_over(apps: Any, schema_editor: Any) -> None:
    connection = schema_editor.connection
    with connection.cursor() as cursor:
        if TABLE not in connection.introspection.table_names(cursor):
            return
        cursor.execute(LOCK)
        cursor.execute(CARRY_OVER, [tokens.SHOWN_OF_AN_OLD_TOKEN])
        cursor.execute(DROP)
        cursor.execute(CLEAN_LOG, [tokens.SHOWN_OF_AN_OLD_TOKEN])


def bring_back_the_table(apps: Any, schema_editor: Any) -> None:
    if ("authtoken", "0001_initial") not in MigrationRecorder(schema_editor.connection).applied_migrations():
        return  # they make it themselves
    with schema_editor.connection.cursor() as cursor:
        cursor.execute(CREATE)


class Migration(migrations.Migration):
    dependencies = [
        ("identity", "0002_api_tokens"),
        ("admin", "0003_logentry_add_action_flag_choices"),
        ("contenttypes", "0002_remove_content_type_name"),
    ]

    operations = [migrations.RunPython(carry_over, bring_back_the_table)]
