"""Writes of the identity domain.

Locks are taken in one order, the tenant's row and then the user's. The user's row orders what happens to a user and
to the user's tokens: it is locked before the first look, and its events are emitted under it.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta
from uuid import UUID

from django.contrib.auth.password_validation import validate_password
from django.db import transaction
from django.db.models import Q
from django.utils import timezone

from events_outbox import NewEvent, emit_event, emit_events
from voicehelper.proto.identity_pb2 import (
    TenantCreatedPayload,
    TokenCreatedPayload,
    TokenRevokedPayload,
    TokenRotatedPayload,
    UserCreatedPayload,
    UserDeactivatedPayload,
    UserRoleChangedPayload,
)

from .events import (
    TENANT_CREATED,
    TOKEN_CREATED,
    TOKEN_REVOKED,
    TOKEN_ROTATED,
    USER_CREATED,
    USER_DEACTIVATED,
    USER_ROLE_CHANGED,
)
from .models import ApiToken, IssuedToken, Scope, Tenant, User

MAX_TOKENS = 50
"""Valid tokens of a user, besides those made by logging in."""
MAX_LOGIN_TOKENS = 10
"""Valid tokens of a user made by logging in: a further login revokes the oldest."""
LOGIN_LIFETIME = timedelta(days=30)
KEPT_WHEN_OVER = timedelta(days=90)
"""How long a token that opens nothing any more can still be looked at; then the user's next one takes it away."""


class Refused(Exception):
    """The write is not possible in the present state; nothing was changed. The text says why."""


class LastAdmin(Refused):
    """A tenant keeps one active admin at least."""


class UserInactive(Refused):
    """The user is deactivated, and gets no token."""


class TokenNotValid(Refused):
    """The token is revoked, expired or was rotated before."""


class TooManyTokens(Refused):
    """The user has as many valid tokens as a user may have."""


@transaction.atomic
def create_tenant(*, name: str, by: User | None = None) -> Tenant:
    """Create a tenant and emit identity.tenant.created. `by`: who asked for it, None: a command.

    Raises IntegrityError for a name that is taken.
    """
    tenant = Tenant.objects.create(name=name)
    emit_event(
        TENANT_CREATED,
        TenantCreatedPayload(tenant_id=str(tenant.id), name=tenant.name),
        aggregate_id=tenant.id,
        tenant_id=tenant.id,
        user_id=by.id if by else "",
    )
    return tenant


@transaction.atomic
def register_user(
    *,
    tenant: Tenant,
    username: str,
    password: str,
    role: str = User.Role.MEMBER,
    email: str = "",
    by: User | None = None,
) -> User:
    """Create a user of a tenant and emit identity.user.created. `by`: who asked for it, None: a command.

    Raises ValidationError for a password that AUTH_PASSWORD_VALIDATORS refuse, IntegrityError for a username
    that is taken.
    """
    validate_password(password, User(username=username, email=email))
    user = User.objects.create_user(username, email=email, password=password, tenant=tenant, role=role)
    emit_event(
        USER_CREATED,
        UserCreatedPayload(user_id=str(user.id), username=user.username, role=user.role),
        aggregate_id=user.id,
        tenant_id=tenant.id,
        user_id=by.id if by else "",
    )
    return user


def lock_user(*, user: User) -> User:
    """Return the user as stored, locked until the transaction ends, in the order of `change_role()` and the others."""
    return _lock_with_tenant(user)[1]


@transaction.atomic
def change_role(*, user: User, role: str, by: User | None = None) -> User:
    """Give a user another role and emit identity.user.role.changed; the same role changes nothing.

    `by`: who asked for it, None: a command. Returns the user as stored. Raises LastAdmin.
    """
    tenant_id, user = _lock_with_tenant(user)
    if user.role == role:
        return user
    _need_another_admin(tenant_id, user)
    old_role, user.role = user.role, role
    user.save(update_fields=["role"])
    emit_event(
        USER_ROLE_CHANGED,
        UserRoleChangedPayload(user_id=str(user.id), old_role=old_role, new_role=role),
        aggregate_id=user.id,
        tenant_id=tenant_id,
        user_id=by.id if by else "",
    )
    return user


@transaction.atomic
def deactivate_user(*, user: User, by: User | None = None) -> User:
    """Shut a user out: revoke the tokens, emit identity.user.deactivated and an identity.token.revoked for each.

    A second time changes nothing. `by`: who asked for it, None: a command. Returns the user as stored. Raises
    LastAdmin.
    """
    tenant_id, user = _lock_with_tenant(user)
    if not user.is_active:
        return user
    _need_another_admin(tenant_id, user)
    user.is_active = False
    user.save(update_fields=["is_active"])
    emit_event(
        USER_DEACTIVATED,
        UserDeactivatedPayload(user_id=str(user.id)),
        aggregate_id=user.id,
        tenant_id=tenant_id,
        user_id=by.id if by else "",
    )
    _revoke(user, user.api_tokens.valid().order_by("id"), reason="The user was deactivated.", by=by)
    return user


@transaction.atomic
def create_token(
    *,
    user: User,
    name: str,
    scopes: Iterable[str],
    expires_at: datetime | None = None,
    by: User | None = None,
) -> IssuedToken:
    """Make a token and emit identity.token.created. `expires_at`: None means never; `by`: None means a command.

    Raises UserInactive, TooManyTokens.
    """
    user = _lock_active(user)
    _forget_old(user)
    if user.api_tokens.valid().filter(by_login=False).count() >= MAX_TOKENS:
        raise TooManyTokens(f"A user has at most {MAX_TOKENS} valid tokens: revoke one first.")
    issued = ApiToken.objects.issue(user=user, name=name, scopes=scopes, expires_at=expires_at)
    _emit_created(issued.token, by)
    return issued


@transaction.atomic
def log_in(*, user: User) -> IssuedToken:
    """Make a token for somebody who has shown a password, for 30 days, and emit identity.token.created.

    The oldest of more than MAX_LOGIN_TOKENS are revoked. Raises UserInactive.
    """
    user = _lock_active(user)
    _forget_old(user)
    kept = user.api_tokens.valid().filter(by_login=True).order_by("-id")[: MAX_LOGIN_TOKENS - 1]
    oldest = user.api_tokens.valid().filter(by_login=True).exclude(id__in=[token.id for token in kept]).order_by("id")
    _revoke(user, oldest, reason="The user has logged in again.", by=user)
    expires_at = timezone.now() + LOGIN_LIFETIME
    issued = ApiToken.objects.issue(user=user, name="login", scopes=Scope.values, expires_at=expires_at, by_login=True)
    _emit_created(issued.token, by=user)
    return issued


@transaction.atomic
def rotate_token(*, token: ApiToken, grace: timedelta, by: User | None = None) -> IssuedToken:
    """Make a token in place of another, emit identity.token.rotated for the old and .created for the new one.

    The old one is valid for `grace` longer, if it does not expire before; one that it took the place of itself is
    revoked. The new one has its name and scopes, and is valid for as long as the old one was meant to be.
    Raises TokenNotValid, UserInactive.
    """
    user = _lock_active(token.user)
    old = ApiToken.objects.get(id=token.id)
    if old.replaced_by_id is not None:
        raise TokenNotValid("The token was rotated before.")
    if old.state != ApiToken.State.VALID:
        raise TokenNotValid(f"The token is {old.state}.")
    # Or rotation would be a way around the limits on how many are valid.
    _revoke(user, ApiToken.objects.valid().filter(replaced_by=old), reason="Its replacement was rotated.", by=by)
    now = timezone.now()
    issued = ApiToken.objects.issue(
        user=user,
        name=old.name,
        scopes=old.scopes,
        expires_at=now + (old.expires_at - old.created_at) if old.expires_at else None,
        by_login=old.by_login,
    )
    end = now + grace
    old.replaced_by, old.expires_at = issued.token, min(old.expires_at or end, end)
    old.save(update_fields=["replaced_by", "expires_at"])
    emit_event(
        TOKEN_ROTATED,
        TokenRotatedPayload(token_id=str(old.id), user_id=str(user.id), replaced_by=str(issued.token.id)),
        aggregate_id=user.id,
        tenant_id=user.own_tenant_id,
        user_id=by.id if by else "",
    )
    _emit_created(issued.token, by)
    return issued


@transaction.atomic
def revoke_token(*, token: ApiToken, reason: str, by: User | None = None) -> bool:
    """Make a token worthless from now on and emit identity.token.revoked. False: it was revoked before."""
    user = _lock(token.user_id)
    return _revoke(user, ApiToken.objects.filter(id=token.id, revoked_at__isnull=True), reason=reason, by=by) > 0


def _lock(user_id: UUID) -> User:
    # NO KEY: the key stays, so rows that refer to the user need not wait.
    return User.objects.select_for_update(no_key=True).get(id=user_id)


def _lock_active(user: User) -> User:
    locked = _lock(user.id)
    if not locked.is_active:
        raise UserInactive("The user is deactivated.")
    return locked


def _lock_with_tenant(user: User) -> tuple[UUID, User]:
    """Return the tenant's id and the user, both rows locked: of two who leave an admin's place at once, one waits."""
    tenant = Tenant.objects.select_for_update(no_key=True).get(id=user.own_tenant_id)
    return tenant.id, _lock(user.id)


def _need_another_admin(tenant_id: UUID, user: User) -> None:
    """Raise LastAdmin if the user is the only active admin of the tenant, whose row is locked."""
    admins = User.objects.filter(tenant_id=tenant_id, role=User.Role.ADMIN, is_active=True)
    is_admin = user.is_active and user.role == User.Role.ADMIN
    if is_admin and not admins.exclude(id=user.id).exists():
        raise LastAdmin("The tenant has no other admin.")


def _forget_old(user: User) -> None:
    """Delete the tokens, of a user whose row is locked, that have been over for long."""
    before = timezone.now() - KEPT_WHEN_OVER
    user.api_tokens.filter(Q(revoked_at__lt=before) | Q(expires_at__lt=before)).delete()


def _emit_created(token: ApiToken, by: User | None) -> None:
    payload = TokenCreatedPayload(
        token_id=str(token.id), user_id=str(token.user_id), name=token.name, scopes=token.scopes
    )
    if token.expires_at is not None:
        payload.expires_at.FromDatetime(token.expires_at)
    emit_event(
        TOKEN_CREATED,
        payload,
        aggregate_id=token.user_id,
        tenant_id=token.user.own_tenant_id,
        user_id=by.id if by else "",
    )


def _revoke(user: User, chosen: Iterable[ApiToken], *, reason: str, by: User | None) -> int:
    """Revoke tokens of a user whose row is locked; return how many those are."""
    ids = [token.id for token in chosen]
    ApiToken.objects.filter(id__in=ids).update(revoked_at=timezone.now())
    if user.tenant_id is not None:  # an operator's tokens open nothing, and no tenant is told of them
        emit_events(
            NewEvent(
                event_type=TOKEN_REVOKED,
                payload=TokenRevokedPayload(token_id=str(token_id), user_id=str(user.id), reason=reason),
                aggregate_id=user.id,
                tenant_id=user.tenant_id,
                user_id=by.id if by else "",
            )
            for token_id in ids
        )
    return len(ids)
