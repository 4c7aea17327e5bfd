"""The API's description (OpenAPI 3): what operations have in common. `api_docs` serves it.

A view says what is its own with `@extend_schema`. What follows from its authentication, throttles, parsers and `@once`,
and from `caching`, is added here, and so is the form of all errors; one that does not follow from these, a view names:
`{409: Problem}`.
"""

import re
from http import HTTPStatus
from typing import Any

from drf_spectacular.openapi import AutoSchema
from drf_spectacular.utils import OpenApiParameter
from rest_framework import serializers
from rest_framework.views import APIView

from voicehelper.idempotency.once import KEY
from voicehelper.identity.permissions import HasScope, scope_for
from voicehelper.problems import CONTENT_TYPE

MEANINGS: dict[int, str] = {
    304: "It is as If-None-Match says.",
    400: "The request is not valid.",
    401: "There is no token, or it is not valid.",
    403: "The user's role, or the token's scopes, do not allow this.",
    404: "There is no such thing in the tenant.",
    406: "It is not offered in the form that the header Accept asks for.",
    409: "It is not possible in the present state.",
    412: "It is not as If-Match says: somebody has changed it.",
    413: "The body is too large.",
    415: "The body is of a type that is not read here.",
    422: "The Idempotency-Key was used for another request.",
    429: "The tenant has sent too many requests.",
    502: "The language model has failed.",
    503: "What it needs is away, or has too much to do.",
    504: "The language model has not answered in time.",
}
_TEXT = {"type": "string"}
HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"schema": _TEXT, "required": True}},
    429: {"Retry-After": {"schema": {"type": "integer"}, "required": True, "description": "In so many seconds."}},
}
REPLAYED = {"Idempotency-Replayed": {"schema": _TEXT, "description": "`true`: the answer to an earlier request."}}
IDEMPOTENCY_KEY = OpenApiParameter(
    "Idempotency-Key",
    str,
    OpenApiParameter.HEADER,
    pattern=f"^{KEY.pattern}$",
    description="However often a request is sent with one key, it is done once, and answered the same each time.",
)
ETAG = {"ETag": {"schema": _TEXT, "description": "Another one as soon as anything in the answer is another."}}
CONDITIONS = {
    "GET": OpenApiParameter(
        "If-None-Match", str, OpenApiParameter.HEADER, description="An ETag: the answer is 304 while it is the same."
    ),
    "PUT": OpenApiParameter(
        "If-Match", str, OpenApiParameter.HEADER, description="An ETag: nothing is changed when it is another."
    ),
}
CONDITIONS["PATCH"] = CONDITIONS["PUT"]
_NEXT_METHOD = re.compile(r"; (?=(?:GET|POST|PUT|PATCH|DELETE) )")


class Problem(serializers.Serializer[Any]):
    """What went wrong (RFC 9457)."""

    type = serializers.CharField(help_text="`about:blank`: the status tells all there is to it.")
    title = serializers.CharField(help_text="The name of the status.")
    status = serializers.IntegerField()
    detail = serializers.CharField()
    instance = serializers.CharField(help_text="The path of the request.")
    correlation_id = serializers.CharField(help_text="By which the server's log knows the request.")
    errors = serializers.DictField(  # type: ignore[assignment]  # no attribute: a field
        required=False, help_text="What is wrong with which part of the request."
    )


class Operation(AutoSchema):
    """Describes one method of a view."""

    def get_operation(self, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
        operation: dict[str, Any] | None = super().get_operation(*args, **kwargs)
        if operation is None:
            return None
        answers: dict[str, Any] = operation["responses"]
        for status in self._errors(operation):
            answers.setdefault(str(status), {})
        for text, answer in answers.items():
            status = int(text)
            answer["description"] = answer.get("description") or MEANINGS.get(status, HTTPStatus(status).phrase)
            headers = HEADERS.get(status, {})
            if status >= 400:
                problem = self.resolve_serializer(Problem, "response").ref
                answer["content"] = {CONTENT_TYPE: {"schema": problem}}
            elif self._heeds_keys():
                headers = REPLAYED
            elif self.method in CONDITIONS:
                headers = ETAG
            if headers:
                answer["headers"] = {**answer.get("headers", {}), **headers}
        operation["responses"] = dict(sorted(answers.items()))
        return operation

    def _errors(self, operation: dict[str, Any]) -> set[int]:
        """The errors, and 304, that any view answers with which does what this one does."""
        view, errors = self.view, set()
        parameters = operation.get("parameters", [])
        queries = {parameter["name"] for parameter in parameters if parameter["in"] == "query"}
        reads_body = "requestBody" in operation or self._heeds_keys()
        if reads_body or queries - {"cursor"} or self.method == "POST":  # at least for a key that it does not take
            errors.add(400)
        if view.get_authenticators():
            errors |= {401, 403}
        if "cursor" in queries or any(parameter["in"] == "path" for parameter in parameters):
            errors.add(404)
        if type(view).perform_content_negotiation is APIView.perform_content_negotiation:
            errors.add(406)
        if reads_body:
            errors |= {413, 415}
        if self._heeds_keys():
            errors |= {409, 422}
        if self.method in CONDITIONS:
            errors.add(304 if self.method == "GET" else 412)
        if view.get_throttles():
            errors.add(429)
        return errors

    def get_override_parameters(self) -> list[Any]:
        ours = (
            [IDEMPOTENCY_KEY] if self._heeds_keys() else [CONDITIONS[self.method]] if self.method in CONDITIONS else []
        )
        return [*super().get_override_parameters(), *ours]

    def get_summary(self) -> str:
        """What the first line of the docstring says of this method, to be read after the method's name."""
        parts = _NEXT_METHOD.split(self._docstring().partition("\n\n")[0].replace("`", "").rstrip("."))
        part = next((part for part in parts if part.startswith(self.method)), parts[0])
        return part.removeprefix(self.method).lstrip(": ")

    def get_description(self) -> str:  # type: ignore[override]  # as in drf-spectacular
        is_scoped = any(isinstance(permission, HasScope) for permission in self.view.get_permissions())
        scope = f"\n\nA token needs the scope `{scope_for(self.method, self.view)}`."
        return self._docstring() + (scope if is_scoped else "")

    def _docstring(self) -> str:
        return super().get_description()

    def _heeds_keys(self) -> bool:
        return hasattr(getattr(self.view, self.method.lower()), "heeds_keys")
