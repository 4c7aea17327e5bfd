"""What may keep an answer of the API, and whether it has changed since (RFC 9111; RFC 9110, 13).

An ETag is a hash of the answer's bytes, so it needs no version anywhere: what looks the same is the same.
"""

import hashlib
from collections.abc import Callable
from typing import Any

from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.utils.cache import get_conditional_response, patch_vary_headers
from django.utils.deprecation import MiddlewareMixin
from django.utils.encoding import force_bytes
from django.utils.http import parse_etags, quote_etag
from rest_framework import status
from rest_framework.exceptions import APIException
from rest_framework.views import APIView

# What these answer is the object as it is now.
METHODS_WITH_ETAG = ("GET", "HEAD", "PUT", "PATCH")


class Changed(APIException):
    status_code = status.HTTP_412_PRECONDITION_FAILED
    default_detail = "It is not as If-Match says: somebody has changed it. Get it anew."


class ApiCachingMiddleware(MiddlewareMixin):
    """Keeps the API's answers out of shared caches, gives them ETags, and answers If-None-Match with 304.

    A client may keep an answer, and has to ask whether it is still right. Answers with `no-store`, such as those that
    hold a secret, and streams have no ETag. Belongs before CommonMiddleware, which would give a 304 a length of 0.
    """

    def process_response(self, request: HttpRequest, response: HttpResponseBase) -> HttpResponseBase:
        if not request.path_info.startswith("/api/"):
            return response
        # Should a cache keep it all the same: never for somebody else.
        patch_vary_headers(response, ["Authorization", "Cookie"])
        response.headers.setdefault("Cache-Control", "private, no-cache")
        if (
            request.method not in METHODS_WITH_ETAG
            or response.status_code != status.HTTP_200_OK
            or not isinstance(response, HttpResponse)
            or "no-store" in response["Cache-Control"]
        ):
            return response
        response["ETag"] = _etag_of(response.content)
        if request.method in ("GET", "HEAD"):
            conditional = get_conditional_response(request, etag=response["ETag"], response=response)
            # Not its 412: If-Match is about changing something.
            if conditional is not None and conditional.status_code == status.HTTP_304_NOT_MODIFIED:
                return conditional
        return response


def need_match(view: APIView, current: Callable[[], Any]) -> None:
    """Raise Changed, the answer 412, when the request says with If-Match that the object was another.

    `current`: locks the object, until the end of the transaction, and returns what GET would answer. It is not called
    for a request without If-Match.
    """
    request = view.request
    if "If-Match" not in request.headers:
        return
    content = request.accepted_renderer.render(current(), request.accepted_media_type, view.get_renderer_context())
    etags = parse_etags(request.headers["If-Match"])
    if etags != ["*"] and _etag_of(force_bytes(content)) not in etags:
        raise Changed


def _etag_of(content: bytes) -> str:
    return quote_etag(hashlib.sha256(content).hexdigest()[:32])
