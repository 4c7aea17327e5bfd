"""Shapes of the notification API."""

from rest_framework import serializers

from .models import Notification


class NotificationSerializer(serializers.ModelSerializer[Notification]):
    class Meta:
        model = Notification
        fields = ["id", "kind", "aggregate_id", "subject", "created_at", "read_at"]
