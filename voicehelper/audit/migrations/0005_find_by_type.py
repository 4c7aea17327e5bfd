"""Entries of a type that is rare are found without reading all of the tenant's."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("audit", "0004_append_only")]

    operations = [
        migrations.AddIndex(
            "auditentry", models.Index(fields=["tenant_id", "event_type", "position"], name="audit_tenant_type")
        ),
    ]
