"""Shapes of the audit API."""

from datetime import datetime
from typing import Any

from rest_framework import serializers

from .chain import COLUMNS, utc_text
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


class HashedMoment(serializers.DateTimeField):
    """A time as the hash is of it: with six digits of a second also where they are zeros."""

    def to_representation(self, value: datetime) -> str:
        return utc_text(value)


class AuditEntrySerializer(serializers.ModelSerializer[AuditEntry]):
    occurred_at = HashedMoment(read_only=True)
    recorded_at = HashedMoment(read_only=True)

    class Meta:
        model = AuditEntry
        fields = [name for name in COLUMNS if name != "tenant_id"]  # it is the reader's own
        read_only_fields = fields
