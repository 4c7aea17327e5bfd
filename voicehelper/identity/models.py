"""Tenants, their users, and the tokens with which these use the API."""

from collections.abc import Iterable
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from django.contrib.auth.models import AbstractUser
from django.contrib.postgres.fields import ArrayField
from django.core.exceptions import PermissionDenied
from django.db import models
from django.db.models import Q
from django.utils import timezone
from uuid_utils.compat import uuid7

from . import tokens


class Tenant(models.Model):
    """An organisation. Nothing of one tenant is visible to the users of another."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    name = models.CharField(max_length=200, unique=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name


class User(AbstractUser):
    """A person who logs in. `role` is the standing within the tenant; `is_staff` opens the admin site."""

    class Role(models.TextChoices):
        ADMIN = "admin"
        MEMBER = "member"

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    tenant = models.ForeignKey(
        Tenant,
        on_delete=models.PROTECT,
        null=True,
        blank=True,
        related_name="users",
        help_text="Empty only for operators, who use the admin site and not the API.",
    )
    role = models.CharField(max_length=10, choices=Role.choices, default=Role.MEMBER)

    @property
    def own_tenant_id(self) -> UUID:
        """The tenant that the user acts for. Raises PermissionDenied for an operator, who has none."""
        if self.tenant_id is None:
            raise PermissionDenied("Your account belongs to no tenant.")
        return self.tenant_id


class Scope(models.TextChoices):
    """What a token may be used for, at most: what its user may not do, no token can."""

    READ = "read"
    WRITE = "write"
    ADMIN = "admin"


class IssuedToken(NamedTuple):
    """A new token, and its text, which is nowhere else: whoever asked for it is told once."""

    token: "ApiToken"
    text: str


class ApiTokenQuerySet(models.QuerySet["ApiToken"]):
    def issue(
        self,
        *,
        user: User,
        name: str,
        scopes: Iterable[str] = Scope.values,
        expires_at: datetime | None = None,
        by_login: bool = False,
        last_used_at: datetime | None = None,
    ) -> IssuedToken:
        """Make a token, without an event: `services.create_token()` is what others call."""
        token_id = uuid7()
        text = tokens.new_text(token_id)
        token = self.create(
            id=token_id,
            user=user,
            name=name,
            scopes=[scope for scope in Scope.values if scope in set(scopes)],
            prefix=tokens.prefix_of(token_id),
            secret_hash=tokens.hash_of(text),
            expires_at=expires_at,
            by_login=by_login,
            last_used_at=last_used_at,
        )
        return IssuedToken(token, text)

    def with_text(self, text: str) -> "ApiToken | None":
        """Return the token that this is the text of, with its user, valid or not. One statement, by index."""
        if (token_id := tokens.id_in(text)) is not None:
            condition = Q(id=token_id)
        elif tokens.is_old(text):
            condition = Q(secret_hash=tokens.hash_of(text))
        else:
            return None
        token = self.select_related("user").filter(condition).first()
        if token is None or not tokens.is_same_hash(token.secret_hash, tokens.hash_of(text)):
            return None
        return token

    def valid(self) -> "ApiTokenQuerySet":
        """Those that are neither revoked nor expired."""
        return self.filter(Q(expires_at__isnull=True) | Q(expires_at__gt=timezone.now()), revoked_at__isnull=True)

    def shown_to(self, user: User) -> "ApiTokenQuerySet":
        """One's own; to an admin those of everybody in the tenant."""
        if user.role == User.Role.ADMIN:
            return self.filter(user__tenant_id=user.own_tenant_id)
        return self.filter(user=user, user__tenant_id=user.own_tenant_id)


class ApiToken(models.Model):
    """A key to the API, of a user. What is kept of it is a hash: its text is shown once, when it is made.

    It is valid until `expires_at`, if there is one, or until it is revoked. Rotation makes another and lets this one
    expire after a grace period.
    """

    class State(models.TextChoices):
        VALID = "valid"
        EXPIRED = "expired"
        REVOKED = "revoked"

    NAME_MAX_CHARS = 100

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    # No index of its own: the one below begins with it.
    user = models.ForeignKey(User, on_delete=models.CASCADE, related_name="api_tokens", db_index=False)
    name = models.CharField(max_length=NAME_MAX_CHARS, help_text="What it is for.")
    scopes = ArrayField(models.CharField(max_length=10, choices=Scope.choices))
    prefix = models.CharField(max_length=40, help_text="What the token begins with, to know it by.")
    secret_hash = models.CharField(max_length=64, unique=True, editable=False)
    by_login = models.BooleanField(default=False, help_text="Made by logging in with a password.")
    created_at = models.DateTimeField(auto_now_add=True)
    last_used_at = models.DateTimeField(null=True, help_text="To the minute.")
    expires_at = models.DateTimeField(null=True, help_text="Empty: it does not expire.")
    revoked_at = models.DateTimeField(null=True)
    replaced_by = models.OneToOneField(
        "self", on_delete=models.SET_NULL, null=True, related_name="replaces", help_text="The token it was rotated to."
    )

    objects = ApiTokenQuerySet.as_manager()

    class Meta:
        verbose_name = "API token"
        ordering = ["-id"]
        default_permissions = ("view",)
        permissions = [("revoke_apitoken", "Can revoke API token")]
        indexes = [models.Index(fields=["user", "-id"], name="api_token_newest_first")]
        constraints = [
            models.CheckConstraint(
                condition=Q(scopes__contained_by=Scope.values) & Q(scopes__len__gt=0), name="api_token_scopes"
            )
        ]

    def __str__(self) -> str:
        return f"{self.name} ({self.prefix})"

    @property
    def state(self) -> "ApiToken.State":
        """Whether it is valid now."""
        if self.revoked_at is not None:
            return self.State.REVOKED
        if self.expires_at is not None and self.expires_at <= timezone.now():
            return self.State.EXPIRED
        return self.State.VALID
