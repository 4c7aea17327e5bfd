"""`@once`: a POST with an Idempotency-Key happens once, and is answered the same each time.

The convention is that of the IETF's draft "The Idempotency-Key HTTP Header Field": the same key with another request
is refused with 422, the same one while the first is under way with 409, a key that is none with 400. Keys are those of
one user, and are kept for KEPT_HOURS.
"""

import hashlib
import json
import re
from collections.abc import Callable
from functools import wraps
from http import HTTPStatus
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from django.db import OperationalError, connection, transaction
from rest_framework.exceptions import APIException, ValidationError
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.utils.encoders import JSONEncoder
from rest_framework.views import APIView

from voicehelper.identity.permissions import member_of

from .models import KeptAnswer

LOCK_NOT_AVAILABLE = "55P03"
KEPT_HOURS = 24
WAIT_SECONDS = 5
"""How long a request waits for an earlier one with its key."""
PRUNED_AT_ONCE = 10
"""Answers too old that each new one takes away: more than come, so they do not pile up."""
KEY = re.compile(r"[\x21-\x7e]{1,255}")

View = TypeVar("View", bound=APIView)
More = ParamSpec("More")
Post = Callable[Concatenate[View, Request, More], Response]


class KeyOfAnotherRequest(APIException):
    status_code = HTTPStatus.UNPROCESSABLE_ENTITY
    default_detail = "The Idempotency-Key was used for another request: take a new one for each."


class UnderWay(APIException):
    status_code = HTTPStatus.CONFLICT
    default_detail = "A request with this Idempotency-Key is under way: ask again in a moment."


def once(post: Post[View, More]) -> Post[View, More]:
    """Have a view's `post()` heed the header Idempotency-Key; without one nothing changes.

    What the POST does and its answer are committed together, so a crash in between leaves neither. An error is not
    kept: nothing was done, and the request may be sent again as it is. An answer given again has the header
    Idempotency-Replayed.
    """

    @wraps(post)
    def heeding(view: View, request: Request, *args: More.args, **kwargs: More.kwargs) -> Response:
        key = request.headers.get("Idempotency-Key")
        if key is None:
            return post(view, request, *args, **kwargs)
        if not KEY.fullmatch(key):
            raise ValidationError({"Idempotency-Key": ["1 to 255 visible ASCII characters."]})
        user, fingerprint = member_of(request), _fingerprint(request)
        try:
            with transaction.atomic():
                _prune()
                kept = _claim(user.id, key, fingerprint)
                if kept is not None:
                    return _again(kept, fingerprint)
                answer = post(view, request, *args, **kwargs)
                body = json.loads(json.dumps(answer.data, cls=JSONEncoder))
                KeptAnswer.objects.filter(user=user, key=key).update(status=answer.status_code, body=body)
                return answer
        except OperationalError as error:
            if getattr(error.__cause__, "sqlstate", "") == LOCK_NOT_AVAILABLE:
                raise UnderWay from error
            raise

    heeding.heeds_keys = True  # type: ignore[attr-defined]  # for the API's description
    return cast(Post[View, More], heeding)


# Waits for another transaction that writes the same key: when that one is rolled back the row is ours.
_CLAIM_SQL = """
    INSERT INTO idempotency_keptanswer (user_id, key, fingerprint, status)
    VALUES (%s, %s, %s, 0) ON CONFLICT (user_id, key) DO NOTHING
"""
_PRUNE_SQL = """
    DELETE FROM idempotency_keptanswer WHERE id IN (
        SELECT id FROM idempotency_keptanswer WHERE created_at < now() - make_interval(hours => %s)
         ORDER BY created_at LIMIT %s FOR UPDATE SKIP LOCKED)
"""


def _claim(user_id: Any, key: str, fingerprint: bytes) -> KeptAnswer | None:
    """Take the key; None when it is ours, else the answer that is kept for it."""
    with connection.cursor() as cursor:
        # Of this statement alone: what the POST does waits for its own locks as it does without a key.
        cursor.execute("SELECT current_setting('lock_timeout')")
        (before,) = cursor.fetchone()
        cursor.execute("SELECT set_config('lock_timeout', %s, true)", [f"{WAIT_SECONDS}s"])
        cursor.execute(_CLAIM_SQL, [user_id, key, fingerprint])
        is_ours = cursor.rowcount == 1
        cursor.execute("SELECT set_config('lock_timeout', %s, true)", [before])
    return None if is_ours else KeptAnswer.objects.get(user_id=user_id, key=key)


def _again(kept: KeptAnswer, fingerprint: bytes) -> Response:
    if bytes(kept.fingerprint) != fingerprint:
        raise KeyOfAnotherRequest
    return Response(kept.body, status=kept.status, headers={"Idempotency-Replayed": "true"})


def _prune() -> None:
    with connection.cursor() as cursor:
        cursor.execute(_PRUNE_SQL, [KEPT_HOURS, PRUNED_AT_ONCE])


def _fingerprint(request: Request) -> bytes:
    """Of what the request asks for: the order of a JSON object's members does not matter."""
    body = json.dumps(request.data, sort_keys=True, cls=JSONEncoder)
    text = "\n".join((str(request.method), request.path, body))
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).digest()
