"""Shapes of the identity API. Text fields refuse NUL characters and unpaired surrogates by themselves."""

from datetime import datetime, timedelta
from typing import Any

from django.utils import timezone
from rest_framework import serializers

from .models import ApiToken, Scope, Tenant, User

LONGEST_LIFETIME = timedelta(days=3650)
LONGEST_GRACE_SECONDS = 7 * 86_400
DEFAULT_GRACE_SECONDS = 3600


class TenantSerializer(serializers.ModelSerializer[Tenant]):
    class Meta:
        model = Tenant
        fields = ["id", "name"]
        read_only_fields = fields


class OwnTenantSerializer(serializers.ModelSerializer[Tenant]):
    class Meta:
        model = Tenant
        fields = ["id", "name", "created_at"]
        read_only_fields = fields


class MeSerializer(serializers.ModelSerializer[User]):
    tenant = TenantSerializer(read_only=True)

    class Meta:
        model = User
        fields = ["id", "username", "role", "tenant"]
        read_only_fields = fields


class UserSerializer(serializers.ModelSerializer[User]):
    email = serializers.CharField(read_only=True, help_text="Empty where the user has none.")
    created_at = serializers.DateTimeField(source="date_joined", read_only=True)

    class Meta:
        model = User
        fields = ["id", "username", "email", "role", "is_active", "created_at"]
        read_only_fields = fields


class NewUser(serializers.Serializer[Any]):
    username = serializers.CharField(max_length=150)
    password = serializers.CharField(max_length=1000, trim_whitespace=False, write_only=True)
    email = serializers.EmailField(max_length=254, allow_blank=True, default="")
    role = serializers.ChoiceField(choices=User.Role.choices, default=User.Role.MEMBER)

    # As they will be stored: to normalise can make a text longer, or of other characters.

    def validate_username(self, name: str) -> str:
        normal = User.normalize_username(name)
        User._meta.get_field("username").run_validators(normal)
        return normal

    def validate_email(self, email: str) -> str:
        normal = User.objects.normalize_email(email)
        User._meta.get_field("email").run_validators(normal)
        return normal


class UserChange(serializers.Serializer[Any]):
    role = serializers.ChoiceField(choices=User.Role.choices, required=False)
    is_active = serializers.BooleanField(required=False, help_text="false deactivates the user, for good.")


class TokenSerializer(serializers.ModelSerializer[ApiToken]):
    user_id = serializers.UUIDField(read_only=True)
    scopes = serializers.ListField(child=serializers.ChoiceField(choices=Scope.choices), read_only=True)
    state = serializers.ChoiceField(choices=ApiToken.State.choices, read_only=True)
    replaced_by = serializers.UUIDField(source="replaced_by_id", read_only=True, allow_null=True)

    class Meta:
        model = ApiToken
        fields = [
            "id",
            "user_id",
            "name",
            "scopes",
            "prefix",
            "state",
            "created_at",
            "last_used_at",
            "expires_at",
            "revoked_at",
            "replaced_by",
        ]
        read_only_fields = fields


class IssuedTokenSerializer(TokenSerializer):
    """With the token itself, which is shown this once."""

    token = serializers.CharField(read_only=True)

    class Meta(TokenSerializer.Meta):
        fields = [*TokenSerializer.Meta.fields, "token"]
        read_only_fields = fields


class LoginAnswer(serializers.Serializer[Any]):
    token = serializers.CharField()
    expires_at = serializers.DateTimeField()


class NewToken(serializers.Serializer[Any]):
    name = serializers.CharField(max_length=ApiToken.NAME_MAX_CHARS)
    scopes = serializers.ListField(
        child=serializers.ChoiceField(choices=Scope.choices), min_length=1, max_length=len(Scope)
    )
    expires_at = serializers.DateTimeField(allow_null=True, default=None, help_text="Left out: it does not expire.")

    def validate_expires_at(self, moment: datetime | None) -> datetime | None:
        now = timezone.now()
        if moment is not None and moment <= now:
            raise serializers.ValidationError("It must be in the future.")
        if moment is not None and moment > now + LONGEST_LIFETIME:
            raise serializers.ValidationError(f"It must be within {LONGEST_LIFETIME.days} days.")
        return moment


class Rotation(serializers.Serializer[Any]):
    grace_seconds = serializers.IntegerField(
        min_value=0,
        max_value=LONGEST_GRACE_SECONDS,
        default=DEFAULT_GRACE_SECONDS,
        help_text="How long the old token goes on being valid.",
    )
