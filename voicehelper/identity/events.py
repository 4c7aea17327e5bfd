"""Event types of the identity domain. The aggregate is the user, of tenant.created the tenant."""

from events_outbox import register_event
from voicehelper.proto.identity_pb2 import (
    TenantCreatedPayload,
    TokenCreatedPayload,
    TokenRevokedPayload,
    TokenRotatedPayload,
    UserCreatedPayload,
    UserDeactivatedPayload,
    UserRegisteredPayload,
    UserRoleChangedPayload,
)

TENANT_CREATED = register_event("identity.tenant.created", TenantCreatedPayload)
USER_CREATED = register_event("identity.user.created", UserCreatedPayload)
USER_ROLE_CHANGED = register_event("identity.user.role.changed", UserRoleChangedPayload)
USER_DEACTIVATED = register_event("identity.user.deactivated", UserDeactivatedPayload)
TOKEN_CREATED = register_event("identity.token.created", TokenCreatedPayload)
TOKEN_ROTATED = register_event("identity.token.rotated", TokenRotatedPayload)
TOKEN_REVOKED = register_event("identity.token.revoked", TokenRevokedPayload)

# Nobody emits it any more: identity.user.created took its place. It stays in the catalog so that what was emitted
# before can still be published, replayed and handled.
USER_REGISTERED = register_event("identity.user.registered", UserRegisteredPayload)
