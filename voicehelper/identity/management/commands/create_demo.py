"""`manage.py create_demo [--json] [--known FILE]`: two tenants with people to try the product with.

In development only.
"""

import json
from argparse import ArgumentParser
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.db import transaction
from django.utils import timezone

from voicehelper.identity.models import ApiToken, Scope, Tenant, User
from voicehelper.identity.services import create_tenant, create_token, register_user, revoke_token

PASSWORD = "demo-password"  # noqa: S105  (known to everybody: the command runs in development only)
NAME = "demo"
MAX_TOKENS = 10
"""Of that name, of each of them: who runs this by hand time and again gets a new one each time."""
TOKEN_LIFETIME = timedelta(days=30)
STILL_GOOD = timedelta(days=1)
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
        parser.add_argument(
            "--known", metavar="FILE", help="what --json printed before: tokens in it that are valid are shown again"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        if not settings.IS_DEV:
            raise CommandError("create_demo makes users with a known password: it runs in development only")
        demo = create_demo(known=_tokens_in(options["known"]) if options["known"] else {})
        if options["json"]:
            self.stdout.write(json.dumps(demo))
            return
        for user in demo["users"]:
            self.stdout.write(
                "{username} / {password} ({role} of {tenant})  Authorization: Token {token}".format(**user)
            )


@transaction.atomic
def create_demo(*, known: Mapping[str, str]) -> dict[str, Any]:
    """Create what is missing; return the tenant and the users. `known`: tokens of before, by username.

    The database does not know what a token looks like: who has no known one that is valid gets a new one.
    """
    users = []
    for username, tenant_name, role, is_operator in PEOPLE:
        user = User.objects.filter(username=username).first()
        if user is None:
            tenant = Tenant.objects.filter(name=tenant_name).first() or create_tenant(name=tenant_name)
            user = register_user(tenant=tenant, username=username, password=PASSWORD, role=role)
            user.is_staff = user.is_superuser = is_operator
            user.save(update_fields=["is_staff", "is_superuser"])
        users.append(
            {
                "username": username,
                "password": PASSWORD,
                "tenant": tenant_name,
                "role": user.role,
                "token": _token_of(user, known.get(username, "")),
            }
        )
    return {"tenant": PEOPLE[0][1], "users": users}


def _token_of(user: User, known: str) -> str:
    """A token of the user; empty for one whom somebody has deactivated."""
    if not user.is_active:
        return ""
    now = timezone.now()
    token = ApiToken.objects.with_text(known)
    is_valid = token is not None and token.user_id == user.id and token.state == ApiToken.State.VALID
    if token is not None and is_valid and (token.expires_at is None or token.expires_at > now + STILL_GOOD):
        return known
    for oldest in user.api_tokens.valid().filter(name=NAME).order_by("-id")[MAX_TOKENS - 1 :]:
        revoke_token(token=oldest, reason="The demo has newer ones.")
    return create_token(user=user, name=NAME, scopes=Scope.values, expires_at=now + TOKEN_LIFETIME).text


def _tokens_in(path: str) -> dict[str, str]:
    """The tokens by username in a file that `--json` was written to; none if it is not there, or is no such file."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        return {str(user["username"]): str(user["token"]) for user in json.loads(Path(path).read_text())["users"]}
    return {}
