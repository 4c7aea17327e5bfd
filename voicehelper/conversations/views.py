"""API of the conversation domain. What another tenant owns does not exist (404)."""

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from django.db.models import QuerySet
from django.http import Http404
from django.shortcuts import get_object_or_404
from rest_framework import generics, status
from rest_framework.exceptions import APIException
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from voicehelper.idempotency.once import once
from voicehelper.identity.permissions import member_of
from voicehelper.pagination import ByPosition

from .models import Conversation, Message
from .serializers import ConversationSerializer, MessageSerializer, NewConversation, NewMessage
from .services import (
    ConversationEnded,
    complete_conversation,
    create_conversation,
    fail_conversation,
    send_message,
)


class HasEnded(APIException):
    status_code = status.HTTP_409_CONFLICT
    default_detail = "The conversation has ended."


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what the services refuse into answers."""
    try:
        yield
    except Conversation.DoesNotExist as error:
        raise Http404("No such conversation.") from error
    except ConversationEnded as error:
        raise HasEnded from error


class ConversationsView(generics.ListAPIView[Conversation]):
    """GET the tenant's conversations, newest first; POST a new one."""

    serializer_class = ConversationSerializer

    def get_queryset(self) -> QuerySet[Conversation]:
        return Conversation.objects.for_tenant(member_of(self.request).own_tenant_id)

    @once
    def post(self, request: Request) -> Response:
        new = NewConversation(data=request.data)
        new.is_valid(raise_exception=True)
        conversation = create_conversation(user=member_of(request), **new.validated_data)
        return Response(ConversationSerializer(conversation).data, status=status.HTTP_201_CREATED)


class ConversationView(generics.RetrieveAPIView[Conversation]):
    """GET one conversation."""

    serializer_class = ConversationSerializer

    def get_queryset(self) -> QuerySet[Conversation]:
        return Conversation.objects.for_tenant(member_of(self.request).own_tenant_id)


class CompleteConversationView(APIView):
    """POST that a conversation has done what it was opened for; 409 when it has ended."""

    @once
    def post(self, request: Request, pk: UUID) -> Response:
        with refusals():
            conversation = complete_conversation(user=member_of(request), conversation_id=pk)
        return Response(ConversationSerializer(conversation).data)


class FailConversationView(APIView):
    """POST that a conversation has ended without success; 409 when it has ended."""

    @once
    def post(self, request: Request, pk: UUID) -> Response:
        with refusals():
            conversation = fail_conversation(user=member_of(request), conversation_id=pk)
        return Response(ConversationSerializer(conversation).data)


class ConversationMessagesView(generics.ListAPIView[Message]):
    """GET the messages of one conversation, in order."""

    serializer_class = MessageSerializer
    pagination_class = ByPosition

    def get_queryset(self) -> QuerySet[Message]:
        conversations = Conversation.objects.for_tenant(member_of(self.request).own_tenant_id)
        return get_object_or_404(conversations, pk=self.kwargs["pk"]).messages.all()


class MessagesView(APIView):
    """POST a message to a conversation; 409 when it has ended."""

    @once
    def post(self, request: Request) -> Response:
        new = NewMessage(data=request.data)
        new.is_valid(raise_exception=True)
        with refusals():
            message = send_message(user=member_of(request), **new.validated_data)
        return Response(MessageSerializer(message).data, status=status.HTTP_201_CREATED)
