"""Tenants and their users."""

from uuid import UUID

from django.contrib.auth.models import AbstractUser
from django.core.exceptions import PermissionDenied
from django.db import models
from uuid_utils.compat import uuid7


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
