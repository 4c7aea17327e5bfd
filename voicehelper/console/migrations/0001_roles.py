"""The roles: groups that are made once. Whoever changes them keeps the change."""

from typing import Any

from django.apps import apps as global_apps
from django.contrib.auth.management import create_permissions
from django.db import migrations

from voicehelper.console.roles import create_roles

APPS = ("events_outbox", "identity", "conversations", "notifications", "analytics", "audit", "auth")


def make(apps: Any, schema_editor: Any) -> None:
    # A fresh database has no permissions yet: they are made after all migrations.
    for label in APPS:
        create_permissions(
            global_apps.get_app_config(label), verbosity=0, using=schema_editor.connection.alias, apps=apps
        )
    create_roles(apps)


class Migration(migrations.Migration):
    dependencies = [
        ("auth", "0012_alter_user_first_name_max_length"),
        ("contenttypes", "0002_remove_content_type_name"),
        ("events_outbox", "0005_permissions"),
        ("identity", "0001_initial"),
        ("conversations", "0002_status"),
        ("notifications", "0001_initial"),
        ("analytics", "0001_initial"),
        ("audit", "0001_initial"),
    ]

    # Backwards the groups stay: they have members by then.
    operations = [migrations.RunPython(make, migrations.RunPython.noop)]
