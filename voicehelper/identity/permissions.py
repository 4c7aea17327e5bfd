"""Who may use the API, and for what."""

from typing import Any

from rest_framework.exceptions import PermissionDenied
from rest_framework.permissions import SAFE_METHODS, BasePermission
from rest_framework.request import Request

from monitoring.context import tenant_id

from .models import ApiToken, Scope, User


class IsTenantMember(BasePermission):
    """Lets in a user who is logged in and belongs to a tenant."""

    message = "Your account belongs to no tenant."

    def has_permission(self, request: Request, view: Any) -> bool:
        if not isinstance(request.user, User) or request.user.tenant_id is None:
            return False
        # The log lines of the request name the tenant from here on.
        tenant_id.set(str(request.user.tenant_id))
        return True


class HasScope(BasePermission):
    """Lets in a token that has the scope: `read` to look, `write` to change something.

    A view says with `scopes = {"POST": Scope.ADMIN}` which one a method takes instead. Who comes without a token, with
    the session of the admin site, is limited by the user's role alone.
    """

    def has_permission(self, request: Request, view: Any) -> bool:
        scope = scope_for(request.method or "", view)
        self.message = f"The token lacks the scope {scope}."
        return not isinstance(request.auth, ApiToken) or scope in request.auth.scopes


class AdminsChange(BasePermission):
    """Lets everybody look, and the admins of the tenant change something. For views that name it."""

    message = "Only an admin of the tenant may do this."

    def has_permission(self, request: Request, view: Any) -> bool:
        return request.method in SAFE_METHODS or member_of(request).role == User.Role.ADMIN


def scope_for(method: str, view: Any) -> Scope:
    """The scope that a token needs for this method of the view."""
    by_method: dict[str, Scope] = getattr(view, "scopes", {})
    return by_method.get(method, Scope.READ if method in SAFE_METHODS else Scope.WRITE)


def member_of(request: Request) -> User:
    """Return the user of a request that `IsTenantMember` let in. Raises PermissionDenied for any other."""
    if not isinstance(request.user, User):
        raise PermissionDenied
    return request.user
