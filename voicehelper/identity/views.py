"""API of the identity domain: log in, the tenant, its users, and their tokens. What is another tenant's is a 404."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

from django.core.exceptions import ValidationError as DjangoValidationError
from django.db import IntegrityError, transaction
from django.db.models import QuerySet
from django.shortcuts import get_object_or_404
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import generics, status
from rest_framework.authtoken.serializers import AuthTokenSerializer
from rest_framework.exceptions import APIException, PermissionDenied, ValidationError
from rest_framework.permissions import AllowAny
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.serializers import UUIDField
from rest_framework.views import APIView

from voicehelper.caching import need_match
from voicehelper.idempotency.once import once, refuses_key
from voicehelper.openapi import Problem

from .models import ApiToken, IssuedToken, Scope, Tenant, User
from .permissions import AdminsChange, HasScope, IsTenantMember, member_of
from .serializers import (
    IssuedTokenSerializer,
    LoginAnswer,
    MeSerializer,
    NewToken,
    NewUser,
    OwnTenantSerializer,
    Rotation,
    TokenSerializer,
    UserChange,
    UserSerializer,
)
from .services import (
    Refused,
    change_role,
    create_token,
    deactivate_user,
    lock_user,
    log_in,
    register_user,
    revoke_token,
    rotate_token,
)
from .throttling import LoginThrottle


class NotNow(APIException):
    status_code = status.HTTP_409_CONFLICT
    default_detail = "This is not possible in the present state."


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what the services refuse into answers."""
    try:
        yield
    except Refused as error:
        raise NotNow(str(error)) from error


class TokenView(APIView):
    """POST username and password, get a token for `Authorization: Token <token>`, valid for 30 days."""

    authentication_classes = ()
    permission_classes = (AllowAny,)
    throttle_classes = (LoginThrottle,)

    @extend_schema(request=AuthTokenSerializer, responses={200: LoginAnswer, 409: Problem})
    @refuses_key
    def post(self, request: Request) -> Response:
        credentials = AuthTokenSerializer(data=request.data, context={"request": request})
        credentials.is_valid(raise_exception=True)
        with refusals():
            issued = log_in(user=credentials.validated_data["user"])
        answer = LoginAnswer({"token": issued.text, "expires_at": issued.token.expires_at})
        return _once(Response(answer.data))


class MeView(APIView):
    """GET the user that the request is authenticated as."""

    @extend_schema(responses=MeSerializer)
    def get(self, request: Request) -> Response:
        return Response(MeSerializer(member_of(request)).data)


class TenantView(APIView):
    """GET the tenant that the user belongs to."""

    @extend_schema(responses=OwnTenantSerializer)
    def get(self, request: Request) -> Response:
        return Response(OwnTenantSerializer(_tenant_of(member_of(request))).data)


class UsersView(generics.ListAPIView[User]):
    """GET the tenant's users, newest first; POST a new one (admins; scope `admin`)."""

    serializer_class = UserSerializer
    permission_classes = (IsTenantMember, HasScope, AdminsChange)
    scopes = {"POST": Scope.ADMIN}

    def get_queryset(self) -> QuerySet[User]:
        return User.objects.filter(tenant_id=member_of(self.request).own_tenant_id)

    @extend_schema(request=NewUser, responses={201: UserSerializer})
    @once
    def post(self, request: Request) -> Response:
        by = member_of(request)
        new = NewUser(data=request.data)
        new.is_valid(raise_exception=True)
        try:
            user = register_user(tenant=_tenant_of(by), by=by, **new.validated_data)
        except DjangoValidationError as error:
            raise ValidationError({"password": error.messages}) from error
        except IntegrityError as error:
            raise ValidationError({"username": ["A user with that username already exists."]}) from error
        return Response(UserSerializer(user).data, status=status.HTTP_201_CREATED)


class UserView(generics.RetrieveAPIView[User]):
    """GET a user of the tenant; PATCH the role, or deactivate the user (admins; scope `admin`).

    409 where the tenant would be left without an admin, and to activate one that is deactivated; 412: see If-Match.
    """

    serializer_class = UserSerializer
    permission_classes = (IsTenantMember, HasScope, AdminsChange)
    scopes = {"PATCH": Scope.ADMIN}

    def get_queryset(self) -> QuerySet[User]:
        return User.objects.filter(tenant_id=member_of(self.request).own_tenant_id)

    @extend_schema(request=UserChange, responses={200: UserSerializer, 409: Problem})
    def patch(self, request: Request, pk: UUID) -> Response:
        by, user = member_of(request), get_object_or_404(self.get_queryset(), pk=pk)
        change = UserChange(data=request.data)
        change.is_valid(raise_exception=True)
        if user.is_superuser and not by.is_superuser:
            raise PermissionDenied("An operator's account is changed in the admin site.")
        role, is_active = (change.validated_data.get(name) for name in ("role", "is_active"))
        if is_active and not user.is_active:
            raise NotNow("A deactivated user stays so.")
        with refusals(), transaction.atomic():
            need_match(self, lambda: UserSerializer(lock_user(user=user)).data)
            if role is not None:
                user = change_role(user=user, role=role, by=by)
            if is_active is False:
                user = deactivate_user(user=user, by=by)
        return Response(UserSerializer(user).data)


OF_A_USER = OpenApiParameter("user_id", UUID, description="Only the tokens of this user.")


class TokensView(generics.ListAPIView[ApiToken]):
    """GET one's tokens, newest first, an admin those of the tenant's users; POST a new one of one's own.

    To make a token takes the scope `admin`, or a lesser token could make itself a greater one.
    """

    serializer_class = TokenSerializer
    scopes = {"POST": Scope.ADMIN}

    def get_queryset(self) -> QuerySet[ApiToken]:
        shown = ApiToken.objects.shown_to(member_of(self.request))
        if "user_id" not in self.request.query_params:
            return shown
        try:
            return shown.filter(user_id=UUIDField().run_validation(self.request.query_params["user_id"]))
        except ValidationError as error:
            raise ValidationError({"user_id": error.detail}) from error

    @extend_schema(parameters=[OF_A_USER])
    def get(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        return super().get(request, *args, **kwargs)

    @extend_schema(request=NewToken, responses={201: IssuedTokenSerializer, 409: Problem})
    @refuses_key
    def post(self, request: Request) -> Response:
        user = member_of(request)
        new = NewToken(data=request.data)
        new.is_valid(raise_exception=True)
        with refusals():
            issued = create_token(user=user, by=user, **new.validated_data)
        return _shown(issued)


class RotateTokenView(APIView):
    """POST to get a new token in place of one of one's own; the old one is valid for `grace_seconds` longer.

    409 when it is not valid, or was rotated before. Scope `admin`.
    """

    scopes = {"POST": Scope.ADMIN}

    @extend_schema(request=Rotation, responses={201: IssuedTokenSerializer, 409: Problem})
    @refuses_key
    def post(self, request: Request, pk: UUID) -> Response:
        user = member_of(request)
        # Nobody else's: who is shown a new token can act as its user.
        token = get_object_or_404(user.api_tokens.all(), pk=pk)
        asked = Rotation(data=request.data)
        asked.is_valid(raise_exception=True)
        with refusals():
            issued = rotate_token(token=token, grace=timedelta(seconds=asked.validated_data["grace_seconds"]), by=user)
        return _shown(issued)


class TokenDetailView(APIView):
    """DELETE to revoke a token: it opens nothing any more. One's own; an admin also others' of the tenant.

    A second time changes nothing. Scope `admin`.
    """

    scopes = {"DELETE": Scope.ADMIN}

    @extend_schema(responses={204: None})
    def delete(self, request: Request, pk: UUID) -> Response:
        by = member_of(request)
        token = get_object_or_404(ApiToken.objects.shown_to(by), pk=pk)
        reason = "Its user revoked it." if token.user_id == by.id else "An admin of the tenant revoked it."
        revoke_token(token=token, reason=reason, by=by)
        return Response(status=status.HTTP_204_NO_CONTENT)


def _tenant_of(user: User) -> Tenant:
    return Tenant.objects.get(id=user.own_tenant_id)


def _shown(issued: IssuedToken) -> Response:
    body = {**TokenSerializer(issued.token).data, "token": issued.text}
    return _once(Response(body, status=status.HTTP_201_CREATED))


def _once(response: Response) -> Response:
    """The answer holds a token: nobody on the way is to keep it."""
    response["Cache-Control"] = "no-store"
    return response
