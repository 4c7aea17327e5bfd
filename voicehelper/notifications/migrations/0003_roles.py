"""What the roles may see and do of this app's new models. A role that somebody has removed stays so."""

from typing import Any

from django.apps import apps as global_apps
from django.contrib.auth.management import create_permissions
from django.db import migrations

LOOK = ("view_delivery", "view_webhookendpoint", "view_notificationpreference")
OPERATE = ("retry_delivery",)


def grant(apps: Any, schema_editor: Any) -> None:
    # A fresh database has no permissions yet: they are made after all migrations.
    app = global_apps.get_app_config("notifications")
    create_permissions(app, verbosity=0, using=schema_editor.connection.alias, apps=apps)
    permissions = apps.get_model("auth", "Permission").objects.filter(content_type__app_label="notifications")
    for role, codenames in (("Viewer", LOOK), ("Operator", LOOK + OPERATE), ("Admin", LOOK + OPERATE)):
        for group in apps.get_model("auth", "Group").objects.filter(name=role):
            group.permissions.add(*permissions.filter(codename__in=codenames))


class Migration(migrations.Migration):
    dependencies = [
        ("auth", "0012_alter_user_first_name_max_length"),
        ("contenttypes", "0002_remove_content_type_name"),
        ("notifications", "0002_deliveries"),
        ("console", "0001_roles"),
    ]

    # Backwards the roles keep what they have: the permissions go with the models.
    operations = [migrations.RunPython(grant, migrations.RunPython.noop)]
