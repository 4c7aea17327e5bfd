from django.db import migrations


class Migration(migrations.Migration):
    dependencies = [
        ("events_outbox", "0004_workers"),
    ]

    operations = [
        migrations.AlterModelOptions(
            name="consumerpause",
            options={
                "ordering": ["consumer"],
                "permissions": [("pause_consumer", "Can pause and resume consumers")],
                "verbose_name": "consumer pause",
            },
        ),
        migrations.AlterModelOptions(
            name="deadletter",
            options={
                "ordering": ["-id"],
                "permissions": [
                    ("replay_deadletter", "Can replay dead letters"),
                    ("discard_deadletter", "Can discard dead letters"),
                ],
                "verbose_name": "dead letter",
            },
        ),
        migrations.AlterModelOptions(
            name="outboxevent",
            options={
                "ordering": ["-id"],
                "permissions": [
                    ("view_payload", "Can read the payload of events"),
                    ("replay_events", "Can replay events"),
                    ("export_events", "Can export lists as CSV"),
                ],
                "verbose_name": "event",
            },
        ),
        migrations.AlterModelOptions(
            name="relaycursor",
            options={
                "permissions": [("pause_relay", "Can pause and resume the relay")],
                "verbose_name": "relay cursor",
                "verbose_name_plural": "relay cursor",
            },
        ),
        migrations.AlterModelOptions(
            name="undeliverableevent",
            options={
                "ordering": ["-id"],
                "permissions": [
                    ("redrive_undeliverableevent", "Can redrive undeliverable events"),
                    ("discard_undeliverableevent", "Can discard undeliverable events"),
                ],
                "verbose_name": "undeliverable event",
            },
        ),
    ]
