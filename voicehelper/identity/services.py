"""Writes of the identity domain."""

from django.contrib.auth.password_validation import validate_password
from django.db import transaction

from events_outbox import emit_event
from voicehelper.proto.identity_pb2 import TenantCreatedPayload, UserRegisteredPayload

from .events import TENANT_CREATED, USER_REGISTERED
from .models import Tenant, User


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
    by: User | None = None,
) -> User:
    """Register a user of a tenant and emit identity.user.registered. `by`: who asked for it, None: a command.

    Raises ValidationError for a password that AUTH_PASSWORD_VALIDATORS refuse, IntegrityError for a username
    that is taken.
    """
    validate_password(password, User(username=username))
    user = User.objects.create_user(username, password=password, tenant=tenant, role=role)
    emit_event(
        USER_REGISTERED,
        UserRegisteredPayload(user_id=str(user.id), username=user.username, role=user.role),
        aggregate_id=user.id,
        tenant_id=tenant.id,
        user_id=by.id if by else "",
    )
    return user
