"""Event types of the identity domain."""

from events_outbox import register_event
from voicehelper.proto.identity_pb2 import TenantCreatedPayload, UserRegisteredPayload

TENANT_CREATED = register_event("identity.tenant.created", TenantCreatedPayload)
USER_REGISTERED = register_event("identity.user.registered", UserRegisteredPayload)
