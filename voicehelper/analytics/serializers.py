"""Shapes of the analytics API."""

from datetime import UTC, date, datetime
from typing import Any

from rest_framework import serializers

from voicehelper.conversations.models import Conversation

from .models import DailyTotal

DEFAULT_DAYS = 30
MAX_DAYS = 366


class SummaryQuery(serializers.Serializer[Any]):
    """`from` and `to` are UTC days, both included; left out, the last 30 days. No `mode` means all modes."""

    def get_fields(self) -> dict[str, serializers.Field[Any, Any, Any, Any]]:
        # Not class attributes, because `from` is a Python keyword.
        return {
            "from": serializers.DateField(input_formats=["%Y-%m-%d"], required=False),
            "to": serializers.DateField(input_formats=["%Y-%m-%d"], required=False),
            "mode": serializers.ChoiceField(choices=Conversation.Mode.choices, required=False),
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


class DailyTotalSerializer(serializers.ModelSerializer[DailyTotal]):
    class Meta:
        model = DailyTotal
        fields = ["day", "mode", "conversations", "messages"]
