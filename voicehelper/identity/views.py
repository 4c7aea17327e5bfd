"""API of the identity domain: log in, and who am I."""

from rest_framework.authtoken.models import Token
from rest_framework.authtoken.serializers import AuthTokenSerializer
from rest_framework.permissions import AllowAny
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from .permissions import member_of
from .serializers import MeSerializer
from .throttling import LoginThrottle


class TokenView(APIView):
    """POST username and password, get the user's token for `Authorization: Token <token>`."""

    authentication_classes = ()
    permission_classes = (AllowAny,)
    throttle_classes = (LoginThrottle,)

    def post(self, request: Request) -> Response:
        credentials = AuthTokenSerializer(data=request.data, context={"request": request})
        credentials.is_valid(raise_exception=True)
        token, _ = Token.objects.get_or_create(user=credentials.validated_data["user"])
        return Response({"token": token.key})


class MeView(APIView):
    """GET the user that the request is authenticated as."""

    def get(self, request: Request) -> Response:
        return Response(MeSerializer(member_of(request)).data)
