from typing import Any

from django.db import migrations, models

from events_outbox import partitions
from events_outbox.conf import outbox_settings


def store(apps: Any, schema_editor: Any) -> None:
    """Settings of the storage, and the partitioned outbox where EVENTS_OUTBOX["PARTITION_ROWS"] asks for it."""
    if schema_editor.connection.vendor != "postgresql":
        return  # a system check says that this cannot work
    rows = outbox_settings().PARTITION_ROWS
    if rows is None:
        schema_editor.execute(f"ALTER TABLE {partitions.OUTBOX} SET ({partitions.AUTOVACUUM})")
    elif apps.get_model("events_outbox", "OutboxEvent").objects.exists():
        raise RuntimeError(
            'EVENTS_OUTBOX["PARTITION_ROWS"] is chosen before the first migrate, but the outbox holds events already: '
            "unset it, or empty the outbox first"
        )
    else:
        partitions.partition_new_table(schema_editor.execute, rows)
    # One row that is updated all the time: room for its versions on its own page, and vacuum soon.
    schema_editor.execute(
        "ALTER TABLE events_outbox_relaycursor SET (fillfactor = 20, autovacuum_vacuum_threshold = 200, "
        "autovacuum_vacuum_scale_factor = 0)"
    )


class Migration(migrations.Migration):
    dependencies = [
        ("events_outbox", "0001_initial"),
    ]

    operations = [
        migrations.AddField(
            model_name="relaycursor",
            name="events_per_second",
            field=models.FloatField(default=0, help_text="Published over about the last ten seconds."),
        ),
        migrations.AddField(
            model_name="undeliverableevent",
            name="discard_reason",
            field=models.TextField(blank=True, default=""),
        ),
        migrations.AddField(
            model_name="undeliverableevent",
            name="discarded_at",
            field=models.DateTimeField(help_text="Given up by an operator: it holds back nothing any more.", null=True),
        ),
        migrations.AddField(
            model_name="undeliverableevent",
            name="discarded_by",
            field=models.CharField(blank=True, default="", max_length=150),
        ),
        migrations.AlterField(
            model_name="outboxevent",
            name="aggregate_id",
            field=models.CharField(max_length=255),
        ),
        migrations.AlterField(
            model_name="outboxevent",
            name="correlation_id",
            field=models.CharField(max_length=255),
        ),
        migrations.AddIndex(
            model_name="outboxevent",
            index=models.Index(fields=["aggregate_id"], name="outbox_aggregate"),
        ),
        migrations.AddIndex(
            model_name="outboxevent",
            index=models.Index(fields=["correlation_id"], name="outbox_correlation"),
        ),
        migrations.AddIndex(
            model_name="undeliverableevent",
            index=models.Index(
                condition=models.Q(("redrive_requested_at__isnull", False)),
                fields=["id"],
                name="undeliverable_redrive",
            ),
        ),
        migrations.AddIndex(
            model_name="undeliverableevent",
            index=models.Index(
                condition=models.Q(("discarded_at__isnull", False)),
                fields=["id"],
                name="undeliverable_discarded",
            ),
        ),
        migrations.RunPython(store, migrations.RunPython.noop),
    ]
