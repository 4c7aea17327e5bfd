"""API of the audit log: for the admins of a tenant, of their own tenant."""

from typing import Any

from django.db.models import QuerySet
from drf_spectacular.utils import extend_schema
from rest_framework import generics
from rest_framework.permissions import BasePermission
from rest_framework.request import Request
from rest_framework.response import Response

from voicehelper.identity.models import User
from voicehelper.identity.permissions import HasScope, IsTenantMember, member_of
from voicehelper.pagination import ByPosition

from .models import AuditEntry
from .serializers import AuditEntrySerializer, AuditQuery


class IsTenantAdmin(BasePermission):
    """Lets in the admins of a tenant; comes after IsTenantMember."""

    message = "Only the admins of the tenant may read its audit log."

    def has_permission(self, request: Request, view: Any) -> bool:
        return isinstance(request.user, User) and request.user.role == User.Role.ADMIN


class LastFirst(ByPosition):
    """By position within the chain, the last one first."""

    ordering = "-position"


class AuditView(generics.ListAPIView[AuditEntry]):
    """GET the tenant's audit log, the last entry first."""

    serializer_class = AuditEntrySerializer
    pagination_class = LastFirst
    permission_classes = (IsTenantMember, HasScope, IsTenantAdmin)
    queryset = AuditEntry.objects.none()  # for the schema

    @extend_schema(parameters=[AuditQuery])
    def get(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        return super().get(request, *args, **kwargs)

    def get_queryset(self) -> QuerySet[AuditEntry]:
        query = AuditQuery(data=self.request.query_params)
        query.is_valid(raise_exception=True)
        entries = AuditEntry.objects.for_tenant(member_of(self.request).own_tenant_id)
        conditions = {"event_type": "event_type", "since": "occurred_at__gte", "until": "occurred_at__lt"}
        return entries.filter(**{conditions[name]: value for name, value in query.validated_data.items()})
