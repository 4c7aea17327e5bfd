"""The open ones among many discarded, for the admin's lists."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("events_outbox", "0005_permissions")]

    operations = [
        migrations.AddIndex(
            model_name="undeliverableevent",
            index=models.Index(
                condition=models.Q(("discarded_at__isnull", True)), fields=["id"], name="undeliverable_open"
            ),
        ),
    ]
