"""Shapes of the notification API."""

from typing import Any

from rest_framework import serializers

from .kinds import KINDS, USER_CHANNELS
from .models import Delivery, Notification, WebhookEndpoint
from .webhooks import secret_of

KIND_CHOICES = sorted(KINDS)
MOST_PREFERENCES = len(KIND_CHOICES) * len(USER_CHANNELS)


class NotificationSerializer(serializers.ModelSerializer[Notification]):
    class Meta:
        model = Notification
        fields = ["id", "kind", "aggregate_id", "subject", "body", "created_at", "read_at"]
        read_only_fields = fields


class PreferenceSerializer(serializers.Serializer[Any]):
    kind = serializers.ChoiceField(choices=KIND_CHOICES)
    channel = serializers.ChoiceField(choices=[channel.value for channel in USER_CHANNELS])
    enabled = serializers.BooleanField()
    can_be_changed = serializers.BooleanField(read_only=True)


class PreferencesSerializer(serializers.Serializer[Any]):
    preferences = PreferenceSerializer(many=True, max_length=MOST_PREFERENCES)  # type: ignore[call-arg]  # of a list

    def validate_preferences(self, preferences: list[dict[str, Any]]) -> list[dict[str, Any]]:
        named = [(preference["kind"], preference["channel"]) for preference in preferences]
        if len(set(named)) < len(named):
            raise serializers.ValidationError("A kind and channel is there twice.")
        return preferences


class _WebhookFields(serializers.Serializer[Any]):
    description = serializers.CharField(max_length=200, allow_blank=True, required=False)
    kinds = serializers.ListField(
        child=serializers.ChoiceField(choices=KIND_CHOICES), max_length=len(KIND_CHOICES), required=False
    )


class NewWebhook(_WebhookFields):
    url = serializers.CharField(max_length=WebhookEndpoint.URL_MAX_CHARS)


class ChangedWebhook(_WebhookFields):
    active = serializers.BooleanField(required=False)


class WebhookSerializer(serializers.ModelSerializer[WebhookEndpoint]):
    kinds = serializers.ListField(child=serializers.CharField(), read_only=True)

    class Meta:
        model = WebhookEndpoint
        fields = ["id", "url", "description", "kinds", "active", "failures", "created_at"]
        read_only_fields = fields


class WebhookWithSecretSerializer(WebhookSerializer):
    secret = serializers.SerializerMethodField(help_text="Shown this once.")

    class Meta(WebhookSerializer.Meta):
        fields = [*WebhookSerializer.Meta.fields, "secret"]
        read_only_fields = fields

    def get_secret(self, endpoint: WebhookEndpoint) -> str:
        return secret_of(endpoint)


class WebhookDeliverySerializer(serializers.ModelSerializer[Delivery]):
    class Meta:
        model = Delivery
        fields = [
            "id",
            "kind",
            "event_id",
            "state",
            "attempts",
            "next_attempt_at",
            "last_error",
            "created_at",
            "finished_at",
        ]
        read_only_fields = fields
