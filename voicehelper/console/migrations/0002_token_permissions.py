"""The role Admin may look at API tokens and revoke them. Groups that are there already get no other change."""

from typing import Any

from django.apps import apps as global_apps
from django.contrib.auth.management import create_permissions
from django.db import migrations

CODENAMES = ("view_apitoken", "revoke_apitoken")


def add(apps: Any, schema_editor: Any) -> None:
    # Permissions are made after all migrations.
    identity = global_apps.get_app_config("identity")
    create_permissions(identity, verbosity=0, using=schema_editor.connection.alias, apps=apps)
    permissions = apps.get_model("auth", "Permission").objects.filter(
        content_type__app_label="identity", codename__in=CODENAMES
    )
    for group in apps.get_model("auth", "Group").objects.filter(name="Admin"):
        group.permissions.add(*permissions)


class Migration(migrations.Migration):
    dependencies = [("console", "0001_roles"), ("identity", "0002_api_tokens")]

    operations = [migrations.RunPython(add, migrations.RunPython.noop)]
