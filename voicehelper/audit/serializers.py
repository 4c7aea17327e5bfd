"""Shapes of the audit API."""

from typing import Any

from rest_framework import serializers

from .models import AuditEntry


class AuditQuery(serializers.Serializer[Any]):
    """`since` (inclusive) and `until` (exclusive) are about when it happened; a time without a zone is UTC."""

    event_type = serializers.CharField(required=False, max_length=128)
    since = serializers.DateTimeField(required=False)
    until = serializers.DateTimeField(required=False)

    def validate(self, attrs: dict[str, Any]) -> dict[str, Any]:
        if "since" in attrs and "until" in attrs and attrs["since"] >= attrs["until"]:
            raise serializers.ValidationError({"since": ["It must be before `until`."]})
        return attrs


class AuditEntrySerializer(serializers.ModelSerializer[AuditEntry]):
    class Meta:
        model = AuditEntry
        fields = [
            "position",
            "id",
            "event_id",
            "event_type",
            "event_version",
            "user_id",
            "aggregate_id",
            "occurred_at",
            "correlation_id",
            "causation_id",
            "payload",
            "metadata",
            "recorded_at",
            "previous_hash",
            "hash",
        ]
        read_only_fields = fields
