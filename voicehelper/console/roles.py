"""Who may see and do what in the admin: whose rows, and the roles."""

from collections.abc import Iterator
from typing import Any

from django.apps import apps as global_apps

LOOK = (
    "events_outbox.view_*",
    "conversations.view_*",
    "knowledge.view_*",
    "notifications.view_*",
    "analytics.view_*",
    "audit.view_*",
    "identity.view_tenant",
)
OPERATE = (
    "events_outbox.replay_events",
    "events_outbox.export_events",
    "events_outbox.redrive_undeliverableevent",
    "events_outbox.discard_undeliverableevent",
    "events_outbox.replay_deadletter",
    "events_outbox.discard_deadletter",
    "events_outbox.pause_relay",
    "events_outbox.pause_consumer",
    "notifications.retry_*",  # a pattern: it may not be there yet when the roles are made
)
ADMINISTER = (
    "events_outbox.view_payload",
    "identity.view_*",
    "identity.add_*",
    "identity.change_*",
    "identity.revoke_*",
    "auth.view_group",
)
ROLES = {"Viewer": LOOK, "Operator": LOOK + OPERATE, "Admin": LOOK + OPERATE + ADMINISTER}
"""Groups, and their permissions when they are made: `app.codename`, where "view_*" is that of every model.

What events carry is not among what "view_*" means: to see that is a permission by itself.
"""
NOT_LOOKING = "view_payload"


def create_roles(apps: Any = global_apps) -> list[str]:
    """Make the groups that are missing; return their names. One that is there stays as somebody has made it."""
    group_model = apps.get_model("auth", "Group")
    made = []
    for name, patterns in ROLES.items():
        group, is_new = group_model.objects.get_or_create(name=name)
        if is_new:
            group.permissions.set(_permissions(apps, patterns))
            made.append(name)
    return made


def _permissions(apps: Any, patterns: tuple[str, ...]) -> Iterator[Any]:
    permissions = apps.get_model("auth", "Permission").objects
    for pattern in patterns:
        app_label, _, codename = pattern.partition(".")
        of_app = permissions.filter(content_type__app_label=app_label)
        if codename.endswith("*"):
            yield from of_app.filter(codename__startswith=codename.removesuffix("*")).exclude(codename=NOT_LOOKING)
        else:
            yield of_app.get(codename=codename)


def admin_tenant(user: Any) -> str | None:
    """The tenant whose rows a user of the admin sees; None: all of them (a superuser, an operator of no tenant)."""
    tenant_id = getattr(user, "tenant_id", None)
    return None if user.is_superuser or tenant_id is None else str(tenant_id)
