"""Shapes of the analytics API."""

from datetime import UTC, date, datetime
from typing import Any

from rest_framework import serializers

from voicehelper.conversations.models import Conversation

from .figures import figures
from .models import MEASURES, DailyTotal

DEFAULT_DAYS = 30
MAX_DAYS = 366


class TotalsQuery(serializers.Serializer[Any]):
    """`from` and `to` are UTC days, both included; left out, the last 30 days. No `mode` means all, no `model` too."""

    def get_fields(self) -> dict[str, serializers.Field[Any, Any, Any, Any]]:
        # Not class attributes, because `from` is a Python keyword.
        return {
            "from": serializers.DateField(input_formats=["%Y-%m-%d"], required=False),
            "to": serializers.DateField(input_formats=["%Y-%m-%d"], required=False),
            "mode": serializers.ChoiceField(choices=Conversation.Mode.choices, required=False),
            "model": serializers.CharField(max_length=200, required=False),
        }

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        last = attrs.setdefault("to", datetime.now(UTC).date())
        if "from" not in attrs:
            attrs["from"] = date.fromordinal(max(last.toordinal() - DEFAULT_DAYS + 1, 1))
        if attrs["from"] > last:
            raise serializers.ValidationError({"from": ["It must not be after `to`."]})
        if (last - attrs["from"]).days >= MAX_DAYS:
            raise serializers.ValidationError({"from": [f"At most {MAX_DAYS} days can be asked for."]})
        return attrs


class FiguresSerializer(serializers.Serializer[Any]):
    """What `figures()` makes of totals."""

    conversations = serializers.IntegerField()
    completed = serializers.IntegerField()
    failed = serializers.IntegerField()
    success_rate = serializers.FloatField(allow_null=True, help_text="Completed of all that ended, 0 to 1.")
    messages = serializers.IntegerField()
    replies = serializers.IntegerField(help_text="Messages that a model answered with.")
    input_tokens = serializers.IntegerField()
    output_tokens = serializers.IntegerField()
    cost_dollars = serializers.RegexField(r"^\d+(\.\d+)?$", help_text="Exact, as text.")
    latency_average_seconds = serializers.FloatField(allow_null=True)
    latency_p95_seconds = serializers.FloatField(allow_null=True, help_text="Estimated; at most 30.")


class ModeFiguresSerializer(FiguresSerializer):
    day = serializers.DateField()
    mode = serializers.CharField()


class SummarySerializer(serializers.Serializer[Any]):
    """The whole range, and each day and mode of it, all models together."""

    def get_fields(self) -> dict[str, serializers.Field[Any, Any, Any, Any]]:
        return {
            "from": serializers.DateField(),
            "to": serializers.DateField(),
            "mode": serializers.CharField(allow_null=True),
            "model": serializers.CharField(allow_null=True),
            "totals": FiguresSerializer(),
            "rows": ModeFiguresSerializer(many=True),
        }


class DailyTotalSerializer(FiguresSerializer):
    """One day, mode and model; the model is empty for what no model answered."""

    day = serializers.DateField()
    mode = serializers.CharField()
    model = serializers.CharField(allow_blank=True)

    def to_representation(self, instance: DailyTotal) -> dict[str, Any]:
        totals = {name: getattr(instance, name) for name in MEASURES}
        return {"day": instance.day, "mode": instance.mode, "model": instance.model, **figures(totals)}
