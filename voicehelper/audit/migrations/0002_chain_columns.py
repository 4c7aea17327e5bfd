"""Columns of the hash chain. Empty at first: the next migration fills them, the one after makes that a rule."""

import django.utils.timezone
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("audit", "0001_initial")]

    operations = [
        migrations.CreateModel(
            name="AuditChain",
            fields=[
                ("tenant_id", models.CharField(primary_key=True, serialize=False)),
                ("position", models.BigIntegerField(default=0)),
                ("hash", models.CharField(default="0" * 64, max_length=64)),
                ("dropped_position", models.BigIntegerField(default=0)),
                ("dropped_hash", models.CharField(default="0" * 64, max_length=64)),
            ],
            options={"ordering": ["tenant_id"]},
        ),
        migrations.AddField("auditentry", "position", models.BigIntegerField(null=True)),
        migrations.AddField("auditentry", "previous_hash", models.CharField(max_length=64, null=True)),
        migrations.AddField("auditentry", "hash", models.CharField(max_length=64, null=True)),
        migrations.AlterField("auditentry", "recorded_at", models.DateTimeField(default=django.utils.timezone.now)),
    ]
