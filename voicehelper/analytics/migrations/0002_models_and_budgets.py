"""Totals of each model, with tokens, cost, ends and latency; and the days of the budget alert.

Consumers of the version before this one cannot count any more: stop them first, else what they fail on waits as their
dead letters and is to be replayed.
"""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("analytics", "0001_initial"),
    ]

    operations = [
        migrations.CreateModel(
            name="BudgetDay",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("tenant_id", models.UUIDField()),
                ("day", models.DateField()),
                ("cost_exceeded", models.BooleanField(default=False)),
                ("tokens_exceeded", models.BooleanField(default=False)),
            ],
            options={
                "ordering": ["-day"],
            },
        ),
        migrations.AlterModelOptions(
            name="dailytotal",
            options={"ordering": ["-day", "mode", "model"]},
        ),
        migrations.RemoveConstraint(
            model_name="dailytotal",
            name="daily_total_key",
        ),
        migrations.AddField(
            model_name="dailytotal",
            name="completed",
            field=models.BigIntegerField(default=0),
        ),
        migrations.AddField(
            model_name="dailytotal",
            name="cost_dollars",
            field=models.DecimalField(decimal_places=12, default=0, max_digits=24),
        ),
        migrations.AddField(
            model_name="dailytotal",
            name="failed",
            field=models.BigIntegerField(default=0),
        ),
        migrations.AddField(
            model_name="dailytotal",
            name="input_tokens",
            field=models.BigIntegerField(default=0),
        ),
        migrations.AddField(
            model_name="dailytotal",
            name="latency_seconds",
            field=models.DecimalField(decimal_places=6, default=0, help_text="Of all replies together.", max_digits=20),
        ),
        migrations.AddField(
            model_name="dailytotal",
            name="model",
            field=models.CharField(blank=True, default="", max_length=200),
        ),
        migrations.AddField(
            model_name="dailytotal",
            name="output_tokens",
            field=models.BigIntegerField(default=0),
        ),
        migrations.AddField(
            model_name="dailytotal",
            name="replies",
            field=models.BigIntegerField(default=0, help_text="Messages that a model answered with."),
        ),
        migrations.AddField(
            model_name="dailytotal",
            name="replies_over_30s",
            field=models.BigIntegerField(default=0),
        ),
        migrations.AddField(
            model_name="dailytotal",
            name="replies_to_100ms",
            field=models.BigIntegerField(default=0),
        ),
        migrations.AddField(
            model_name="dailytotal",
            name="replies_to_10s",
            field=models.BigIntegerField(default=0),
        ),
        migrations.AddField(
            model_name="dailytotal",
            name="replies_to_1s",
            field=models.BigIntegerField(default=0),
        ),
        migrations.AddField(
            model_name="dailytotal",
            name="replies_to_2s",
            field=models.BigIntegerField(default=0),
        ),
        migrations.AddField(
            model_name="dailytotal",
            name="replies_to_30s",
            field=models.BigIntegerField(default=0),
        ),
        migrations.AddField(
            model_name="dailytotal",
            name="replies_to_500ms",
            field=models.BigIntegerField(default=0),
        ),
        migrations.AddField(
            model_name="dailytotal",
            name="replies_to_5s",
            field=models.BigIntegerField(default=0),
        ),
        migrations.AddConstraint(
            model_name="dailytotal",
            constraint=models.UniqueConstraint(
                fields=("tenant_id", "day", "mode", "model"), name="daily_total_of_model"
            ),
        ),
        migrations.AddConstraint(
            model_name="budgetday",
            constraint=models.UniqueConstraint(fields=("tenant_id", "day"), name="budget_day_key"),
        ),
    ]
