"""Who a request to the API comes from, by its token."""

from datetime import timedelta

from django.db.models import Q
from django.utils import timezone
from rest_framework.authentication import BaseAuthentication, get_authorization_header
from rest_framework.exceptions import AuthenticationFailed
from rest_framework.request import Request

from .models import ApiToken, User

KEYWORDS = (b"token", b"bearer")
USE_NOTED_EVERY = timedelta(minutes=1)


class ApiTokenAuthentication(BaseAuthentication):
    """`Authorization: Token <token>`, or `Bearer <token>`.

    Each request looks the token up in the database, by its key: a revoked one is refused from the next request on, and
    a cache, which might go on knowing it, would save a tenth of a millisecond.
    """

    def authenticate(self, request: Request) -> tuple[User, ApiToken] | None:
        """Return the user and the token; None when the header is about something else or is not there.

        Raises AuthenticationFailed, the answer 401. Only who holds the token learns what is wrong with it.
        """
        keyword, _, text = get_authorization_header(request).partition(b" ")
        if keyword.lower() not in KEYWORDS:
            return None
        try:
            token = ApiToken.objects.with_text(text.strip().decode("ascii"))
        except UnicodeDecodeError:
            token = None
        if token is None:
            raise AuthenticationFailed("There is no such token.")
        if token.state != ApiToken.State.VALID:
            raise AuthenticationFailed(f"The token is {token.state}.")
        if not token.user.is_active:
            raise AuthenticationFailed("The user is deactivated.")
        note_use(token)
        return token.user, token

    def authenticate_header(self, request: Request) -> str:
        return "Token"


def note_use(token: ApiToken) -> None:
    """Write down that the token was used now, unless that was done within the last minute."""
    now = timezone.now()
    stale = now - USE_NOTED_EVERY
    if token.last_used_at is not None and token.last_used_at > stale:
        return
    # Of many requests at once one writes: the others find the time new once they get the row.
    unnoted = Q(last_used_at__isnull=True) | Q(last_used_at__lte=stale)
    ApiToken.objects.filter(unnoted, id=token.id).update(last_used_at=now)
