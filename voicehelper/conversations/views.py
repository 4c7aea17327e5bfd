"""API of the conversation domain. What another tenant owns does not exist (404)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from django.db.models import QuerySet
from django.http import Http404, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.shortcuts import get_object_or_404
from drf_spectacular.utils import extend_schema
from rest_framework import generics, status
from rest_framework.exceptions import APIException, ValidationError
from rest_framework.renderers import JSONRenderer
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from voicehelper.assistant.providers import ProviderFailed
from voicehelper.idempotency.once import once, refuses_key
from voicehelper.identity.permissions import member_of
from voicehelper.openapi import Problem
from voicehelper.pagination import ByPosition

from .models import Conversation, Message
from .replies import ENDED, FAILURES, LOST, EventStream, TooManyReplies, whole_reply
from .serializers import ConversationSerializer, MessageSerializer, NewConversation, NewMessage, ReplyEvent
from .services import (
    ConversationEnded,
    NothingToAnswer,
    NotSpoken,
    ReplyInProgress,
    ReplyLost,
    begin_reply,
    complete_conversation,
    create_conversation,
    fail_conversation,
    send_message,
)


class Conflict(APIException):
    status_code = status.HTTP_409_CONFLICT


class Busy(APIException):
    status_code = status.HTTP_503_SERVICE_UNAVAILABLE
    default_detail = "The assistant is replying to many others: ask again in a moment."
    wait = 2  # seconds, for Retry-After


class ModelFailed(APIException):
    """The language model was given up, and the conversation has failed."""

    def __init__(self, failure: ProviderFailed) -> None:
        self.status_code, detail = FAILURES[failure.reason]
        super().__init__(detail)


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what the services refuse into answers."""
    try:
        yield
    except Conversation.DoesNotExist as error:
        raise Http404("No such conversation.") from error
    except ConversationEnded as error:
        raise Conflict(ENDED) from error
    except ReplyInProgress as error:
        raise Conflict("The assistant is replying already.") from error
    except NothingToAnswer as error:
        raise Conflict("There is no message of a user to reply to.") from error
    except TooManyReplies as error:
        raise Busy from error
    except ReplyLost as error:
        raise Conflict(LOST) from error
    except ProviderFailed as failure:
        raise ModelFailed(failure) from failure
    except NotSpoken as error:
        raise ValidationError({"duration_ms": ["Only messages of a voice conversation have a duration."]}) from error


class ConversationsView(generics.ListAPIView[Conversation]):
    """GET the tenant's conversations, newest first; POST a new one."""

    serializer_class = ConversationSerializer

    def get_queryset(self) -> QuerySet[Conversation]:
        return Conversation.objects.for_tenant(member_of(self.request).own_tenant_id)

    @extend_schema(request=NewConversation, responses={201: ConversationSerializer})
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

    @extend_schema(request=None, responses=ConversationSerializer)
    @once
    def post(self, request: Request, pk: UUID) -> Response:
        with refusals():
            conversation = complete_conversation(user=member_of(request), conversation_id=pk)
        return Response(ConversationSerializer(conversation).data)


class FailConversationView(APIView):
    """POST that a conversation has ended without success; 409 when it has ended."""

    @extend_schema(request=None, responses=ConversationSerializer)
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

    @extend_schema(request=NewMessage, responses={201: MessageSerializer, 404: Problem})
    @once
    def post(self, request: Request) -> Response:
        new = NewMessage(data=request.data)
        new.is_valid(raise_exception=True)
        with refusals():
            message = send_message(user=member_of(request), **new.validated_data)
        return Response(MessageSerializer(message).data, status=status.HTTP_201_CREATED)


class EventStreamRenderer(JSONRenderer):
    """For content negotiation alone: a problem is JSON all the same, and an event stream renders itself."""

    media_type = "text/event-stream"
    format = "event-stream"


class RepliesView(APIView):
    """POST: the assistant replies to the last message of a user, as server-sent events, or as JSON if asked for.

    409 when the conversation has ended, when the assistant is replying in it already, and when nothing is unanswered.
    As JSON: 201 with the stored message; 502, 503, 504 when the language model was given up, and the conversation
    has failed. 503 with Retry-After, and nothing is changed, when this process has too many replies to work on. The
    events: see `replies.EventStream`.
    """

    renderer_classes = [EventStreamRenderer, JSONRenderer]

    def options(self, request: Any, *args: Any, **kwargs: Any) -> Response:
        answer = super().options(request, *args, **kwargs)
        answer.content_type = JSONRenderer.media_type  # whatever is accepted: it is no stream
        return answer

    @extend_schema(
        request=None,
        responses={
            (200, EventStreamRenderer.media_type): ReplyEvent,
            (201, JSONRenderer.media_type): MessageSerializer,
            **dict.fromkeys((409, 502, 503, 504), Problem),
        },
    )
    @refuses_key
    def post(self, request: Request, pk: UUID) -> HttpResponseBase:
        user = member_of(request)
        with refusals():
            reply = begin_reply(user=user, conversation_id=pk)
            if request.accepted_renderer.format == JSONRenderer.format:
                message = whole_reply(user=user, reply=reply)
                return Response(MessageSerializer(message).data, status=status.HTTP_201_CREATED)
            stream = EventStream(user=user, reply=reply, path=request.path)
        return StreamingHttpResponse(
            stream,
            content_type=EventStreamRenderer.media_type,
            # The last one asks nginx to pass on each event as it comes.
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
