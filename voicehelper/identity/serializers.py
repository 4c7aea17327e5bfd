"""Shapes of the identity API."""

from rest_framework import serializers

from .models import Tenant, User


class TenantSerializer(serializers.ModelSerializer[Tenant]):
    class Meta:
        model = Tenant
        fields = ["id", "name"]


class MeSerializer(serializers.ModelSerializer[User]):
    tenant = TenantSerializer()

    class Meta:
        model = User
        fields = ["id", "username", "role", "tenant"]
