"""`manage.py create_demo [--json]`: two tenants with people to try the product with (development only)."""

import json
from argparse import ArgumentParser
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.db import transaction
from rest_framework.authtoken.models import Token

from voicehelper.identity.models import Tenant, User
from voicehelper.identity.services import create_tenant, register_user

PASSWORD = "demo-password"  # noqa: S105  (known to everybody: the command runs in development only)
# username, tenant, role, may use the admin site
PEOPLE = (
    ("alice", "Demo", User.Role.ADMIN, True),
    ("bob", "Demo", User.Role.MEMBER, False),
    ("charlie", "Other", User.Role.ADMIN, False),
)


class Command(BaseCommand):
    help = "Create the demo tenants and users where they are missing, and show how to log in."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="print JSON instead of lines")

    def handle(self, *args: Any, **options: Any) -> None:
        if not settings.IS_DEV:
            raise CommandError("create_demo makes users with a known password: it runs in development only")
        demo = create_demo()
        if options["json"]:
            self.stdout.write(json.dumps(demo))
            return
        for user in demo["users"]:
            self.stdout.write(
                "{username} / {password} ({role} of {tenant})  Authorization: Token {token}".format(**user)
            )


@transaction.atomic
def create_demo() -> dict[str, Any]:
    """Create what is missing; return the tenant and the users. A second run changes nothing."""
    users = []
    for username, tenant_name, role, is_operator in PEOPLE:
        user = User.objects.filter(username=username).first()
        if user is None:
            tenant = Tenant.objects.filter(name=tenant_name).first() or create_tenant(name=tenant_name)
            user = register_user(tenant=tenant, username=username, password=PASSWORD, role=role)
            user.is_staff = user.is_superuser = is_operator
            user.save(update_fields=["is_staff", "is_superuser"])
        token, _ = Token.objects.get_or_create(user=user)
        users.append(
            {
                "username": username,
                "password": PASSWORD,
                "tenant": tenant_name,
                "role": user.role,
                "token": token.key,
            }
        )
    return {"tenant": PEOPLE[0][1], "users": users}
