"""Who may see and do what in the admin: whose rows, and the roles."""

from typing import Any

from voicehelper.identity.models import User


def admin_tenant(user: Any) -> str | None:
    """The tenant whose rows a user of the admin sees; None: all of them (a superuser, an operator of no tenant)."""
    if not isinstance(user, User) or user.is_superuser or user.tenant_id is None:
        return None
    return str(user.tenant_id)
