"""Who may use the API."""

from typing import Any

from rest_framework.exceptions import PermissionDenied
from rest_framework.permissions import BasePermission
from rest_framework.request import Request

from monitoring.context import tenant_id

from .models import User


class IsTenantMember(BasePermission):
    """Lets in a user who is logged in and belongs to a tenant."""

    message = "Your account belongs to no tenant."

    def has_permission(self, request: Request, view: Any) -> bool:
        if not isinstance(request.user, User) or request.user.tenant_id is None:
            return False
        # The log lines of the request name the tenant from here on.
        tenant_id.set(str(request.user.tenant_id))
        return True


def member_of(request: Request) -> User:
    """Return the user of a request that `IsTenantMember` let in. Raises PermissionDenied for any other."""
    if not isinstance(request.user, User):
        raise PermissionDenied
    return request.user
