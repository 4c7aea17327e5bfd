"""API of the notification domain. Everybody sees their own only."""

from uuid import UUID

from django.db.models import QuerySet
from django.http import Http404
from rest_framework import generics
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from voicehelper.identity.permissions import member_of

from .models import Notification
from .serializers import NotificationSerializer
from .services import mark_read


class NotificationsView(generics.ListAPIView[Notification]):
    """GET one's notifications, newest first."""

    serializer_class = NotificationSerializer

    def get_queryset(self) -> QuerySet[Notification]:
        return Notification.objects.for_recipient(member_of(self.request))


class NotificationReadView(APIView):
    """POST to mark one's notification as read."""

    def post(self, request: Request, pk: UUID) -> Response:
        try:
            notification = mark_read(recipient=member_of(request), notification_id=pk)
        except Notification.DoesNotExist as error:
            raise Http404("No such notification.") from error
        return Response(NotificationSerializer(notification).data)
