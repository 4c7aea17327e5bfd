"""API of the notification domain. Everybody sees their own only; webhooks are for the tenant's admins."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from django.db import transaction
from django.db.models import QuerySet
from django.http import Http404
from django.shortcuts import get_object_or_404
from drf_spectacular.utils import extend_schema
from rest_framework import generics, status
from rest_framework.exceptions import APIException, ValidationError
from rest_framework.permissions import BasePermission
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from voicehelper.caching import need_match
from voicehelper.idempotency.once import once, refuses_key
from voicehelper.identity.models import User
from voicehelper.identity.permissions import HasScope, IsTenantMember, member_of
from voicehelper.openapi import Problem

from .kinds import KINDS, USER_CHANNELS
from .models import Delivery, Notification, NotificationPreference, WebhookEndpoint
from .serializers import (
    ChangedWebhook,
    NewWebhook,
    NotificationSerializer,
    PreferencesSerializer,
    WebhookDeliverySerializer,
    WebhookSerializer,
    WebhookWithSecretSerializer,
)
from .services import (
    PreferenceRefused,
    TooManyWebhooks,
    change_webhook,
    create_webhook,
    delete_webhook,
    lock_preferences,
    mark_read,
    rotate_webhook_secret,
    set_preferences,
    try_webhook,
)
from .webhooks import AddressRefused


class Conflict(APIException):
    status_code = status.HTTP_409_CONFLICT


class IsTenantAdmin(BasePermission):
    """Lets in an admin of a tenant; comes after IsTenantMember."""

    message = "This is for the admins of your tenant."

    def has_permission(self, request: Request, view: Any) -> bool:
        return member_of(request).role == User.Role.ADMIN


FOR_ADMINS = (IsTenantMember, HasScope, IsTenantAdmin)


class NotificationsView(generics.ListAPIView[Notification]):
    """GET one's notifications, newest first."""

    serializer_class = NotificationSerializer

    def get_queryset(self) -> QuerySet[Notification]:
        return Notification.objects.for_recipient(member_of(self.request))


class NotificationReadView(APIView):
    """POST to mark one's notification as read."""

    @extend_schema(request=None, responses=NotificationSerializer)
    @once
    def post(self, request: Request, pk: UUID) -> Response:
        try:
            notification = mark_read(recipient=member_of(request), notification_id=pk)
        except Notification.DoesNotExist as error:
            raise Http404("No such notification.") from error
        return Response(NotificationSerializer(notification).data)


class NotificationPreferencesView(APIView):
    """GET what one is told of, and how; PUT what one prefers: what is left out follows the default."""

    @extend_schema(responses=PreferencesSerializer)
    def get(self, request: Request) -> Response:
        return Response({"preferences": _preferences_of(member_of(request))})

    @extend_schema(request=PreferencesSerializer, responses=PreferencesSerializer)
    def put(self, request: Request) -> Response:
        new = PreferencesSerializer(data=request.data)
        new.is_valid(raise_exception=True)
        chosen = [
            (preference["kind"], preference["channel"], preference["enabled"])
            for preference in new.validated_data["preferences"]
        ]
        user = member_of(request)

        def current() -> dict[str, Any]:
            lock_preferences(user=user)
            return {"preferences": _preferences_of(user)}

        try:
            with transaction.atomic():
                need_match(self, current)
                set_preferences(user=user, preferences=chosen)
        except PreferenceRefused as error:
            raise ValidationError({"preferences": [str(error)]}) from error
        return self.get(request)


def _preferences_of(user: User) -> list[dict[str, Any]]:
    own = {
        (preference.kind, preference.channel): preference.enabled
        for preference in NotificationPreference.objects.filter(user=user)
    }
    return [
        {
            "kind": name,
            "channel": channel.value,
            "enabled": kind.is_fixed(channel) or own.get((name, channel.value), kind.is_default(channel)),
            "can_be_changed": not kind.is_fixed(channel),
        }
        for name, kind in KINDS.items()
        for channel in USER_CHANNELS
    ]


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what the services refuse into answers."""
    try:
        yield
    except WebhookEndpoint.DoesNotExist as error:
        raise Http404("No such webhook.") from error
    except AddressRefused as error:
        raise ValidationError({"url": [str(error)]}) from error
    except TooManyWebhooks as error:
        raise Conflict(str(error)) from error


class OfTenantAdmins(generics.GenericAPIView[WebhookEndpoint]):
    """A view of the tenant's webhooks."""

    permission_classes = FOR_ADMINS
    serializer_class = WebhookSerializer

    def get_queryset(self) -> QuerySet[WebhookEndpoint]:
        return WebhookEndpoint.objects.for_tenant(member_of(self.request).own_tenant_id)


class WebhooksView(OfTenantAdmins, generics.ListAPIView[WebhookEndpoint]):
    """GET the tenant's webhooks, newest first; POST a new one: the answer has its secret, this once."""

    @extend_schema(request=NewWebhook, responses={201: WebhookWithSecretSerializer, 409: Problem})
    @refuses_key
    def post(self, request: Request) -> Response:
        new = NewWebhook(data=request.data)
        new.is_valid(raise_exception=True)
        with refusals():
            endpoint = create_webhook(by=member_of(request), **new.validated_data)
        return _with_secret(endpoint, status.HTTP_201_CREATED)


class WebhookView(OfTenantAdmins, generics.RetrieveAPIView[WebhookEndpoint]):
    """GET a webhook; PATCH what it is told of, or whether at all; DELETE it."""

    @extend_schema(request=ChangedWebhook, responses=WebhookSerializer)
    def patch(self, request: Request, pk: UUID) -> Response:
        changed = ChangedWebhook(data=request.data)
        changed.is_valid(raise_exception=True)
        by = member_of(request)
        with refusals(), transaction.atomic():
            locked = self.get_queryset().select_for_update(no_key=True)
            need_match(self, lambda: WebhookSerializer(get_object_or_404(locked, pk=pk)).data)
            endpoint = change_webhook(by=by, endpoint_id=pk, **changed.validated_data)
        return Response(WebhookSerializer(endpoint).data)

    @extend_schema(responses={204: None})
    def delete(self, request: Request, pk: UUID) -> Response:
        with refusals():
            delete_webhook(by=member_of(request), endpoint_id=pk)
        return Response(status=status.HTTP_204_NO_CONTENT)


class WebhookTestView(OfTenantAdmins):
    """POST to have a test sent to a webhook; its deliveries show what became of it."""

    @extend_schema(request=None, responses={202: WebhookDeliverySerializer})
    @once
    def post(self, request: Request, pk: UUID) -> Response:
        with refusals():
            delivery = try_webhook(by=member_of(request), endpoint_id=pk)
        return Response(WebhookDeliverySerializer(delivery).data, status=status.HTTP_202_ACCEPTED)


class WebhookSecretView(OfTenantAdmins):
    """POST to have a new secret: the answer has it, this once. The old one's signature is sent along for a day."""

    @extend_schema(request=None, responses=WebhookWithSecretSerializer)
    @refuses_key
    def post(self, request: Request, pk: UUID) -> Response:
        with refusals():
            endpoint = rotate_webhook_secret(by=member_of(request), endpoint_id=pk)
        return _with_secret(endpoint, status.HTTP_200_OK)


def _with_secret(endpoint: WebhookEndpoint, code: int) -> Response:
    """The answer holds the secret: nobody on the way is to keep it."""
    return Response(WebhookWithSecretSerializer(endpoint).data, status=code, headers={"Cache-Control": "no-store"})


class WebhookDeliveriesView(generics.ListAPIView[Delivery]):
    """GET what was, or is to be, sent to a webhook, newest first."""

    permission_classes = FOR_ADMINS
    serializer_class = WebhookDeliverySerializer

    def get_queryset(self) -> QuerySet[Delivery]:
        endpoints = WebhookEndpoint.objects.for_tenant(member_of(self.request).own_tenant_id)
        return get_object_or_404(endpoints, pk=self.kwargs["pk"]).deliveries.all()
