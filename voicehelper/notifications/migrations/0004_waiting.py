from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("notifications", "0003_roles")]

    operations = [
        migrations.AddIndex(
            model_name="delivery",
            index=models.Index(
                condition=models.Q(("state", "pending")), fields=["channel", "give_up_at"], name="delivery_overdue"
            ),
        ),
        migrations.AddIndex(
            model_name="delivery",
            index=models.Index(
                condition=models.Q(("endpoint__isnull", False), ("state", "pending")),
                fields=["endpoint", "next_attempt_at"],
                name="delivery_waiting",
            ),
        ),
    ]
