"""Roles that look at the domain look at documents, too: those that are there already were made without them."""

from typing import Any

from django.apps import apps as global_apps
from django.contrib.auth.management import create_permissions
from django.db import migrations

ROLES = ("Viewer", "Operator", "Admin")


def add(apps: Any, schema_editor: Any) -> None:
    alias = schema_editor.connection.alias
    # A fresh database has no permissions yet: they are made after all migrations.
    create_permissions(global_apps.get_app_config("knowledge"), verbosity=0, using=alias, apps=apps)
    permission = apps.get_model("auth", "Permission").objects.get(
        content_type__app_label="knowledge", codename="view_document"
    )
    for group in apps.get_model("auth", "Group").objects.filter(name__in=ROLES):
        group.permissions.add(permission)


class Migration(migrations.Migration):
    dependencies = [("knowledge", "0001_initial"), ("console", "0001_roles")]

    operations = [migrations.RunPython(add, migrations.RunPython.noop)]
