"""Errors of the API as problem details (RFC 9457, application/problem+json).

`problem_response()` serves what a view raises. The functions after it, named in `voicehelper/urls.py`, serve
what Django itself refuses under /api/, and leave every other path to Django's own pages.
"""

from http import HTTPStatus
from typing import Any

from django.core.exceptions import RequestDataTooBig
from django.http import HttpRequest, HttpResponseBase, JsonResponse
from django.views import defaults
from rest_framework.exceptions import APIException, ValidationError
from rest_framework.renderers import JSONRenderer
from rest_framework.response import Response
from rest_framework.views import exception_handler

from monitoring.context import correlation_id

CONTENT_TYPE = "application/problem+json"


class BodyTooLarge(APIException):
    status_code = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    default_detail = "The body is larger than the server accepts."


def problem(*, status: int, detail: str, path: str, errors: Any = None) -> dict[str, Any]:
    """Build the members of a problem. `errors`: field name -> messages, left out when there are none."""
    body: dict[str, Any] = {
        # "about:blank" says that the status code tells all there is to the type (RFC 9457, 4.2.1).
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": _encodable(detail),
        "instance": path,
        "correlation_id": correlation_id.get(),
    }
    if errors:
        body["errors"] = _encodable(errors)
    return body


def problem_response(exception: Exception, context: dict[str, Any]) -> Response | None:
    """REST framework's exception handler. None for an unexpected exception, which becomes a 500."""
    if isinstance(exception, RequestDataTooBig):  # Django would say 400
        exception = BodyTooLarge()
    response = exception_handler(exception, context)
    if response is None:
        return None
    detail, errors = "", None
    if isinstance(exception, ValidationError):
        detail, errors = "The request is not valid: see errors.", exception.detail
    else:
        detail = str(response.data["detail"])
    response.data = problem(status=response.status_code, detail=detail, path=context["request"].path, errors=errors)
    response.content_type = CONTENT_TYPE
    # Whatever the view renders when all is well.
    context["request"].accepted_renderer, context["request"].accepted_media_type = JSONRenderer(), CONTENT_TYPE
    return response


def bad_request(request: HttpRequest, exception: Exception) -> HttpResponseBase:
    """Django's handler400."""
    return _api_problem(request, 400, "The request is malformed.") or defaults.bad_request(request, exception)


def permission_denied(request: HttpRequest, exception: Exception) -> HttpResponseBase:
    """Django's handler403."""
    return _api_problem(request, 403, "This is not allowed.") or defaults.permission_denied(request, exception)


def page_not_found(request: HttpRequest, exception: Exception) -> HttpResponseBase:
    """Django's handler404."""
    return _api_problem(request, 404, "There is nothing here.") or defaults.page_not_found(request, exception)


def server_error(request: HttpRequest) -> HttpResponseBase:
    """Django's handler500."""
    detail = "The server failed to answer; its log tells more under the correlation id."
    return _api_problem(request, 500, detail) or defaults.server_error(request)


def _api_problem(request: HttpRequest, status: int, detail: str) -> JsonResponse | None:
    if not request.path.startswith("/api/"):
        return None
    body = problem(status=status, detail=detail, path=request.path)
    return JsonResponse(body, status=status, content_type=CONTENT_TYPE)


def _encodable(value: Any) -> Any:
    # Messages quote what the client sent, and JSON may carry unpaired surrogates, which UTF-8 cannot.
    if isinstance(value, dict):
        return {_encodable(name): _encodable(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    return str(value).encode("utf-8", "backslashreplace").decode()
