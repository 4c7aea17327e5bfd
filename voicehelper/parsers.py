"""Reading of requests."""

from typing import Any

from django.core.handlers.asgi import ASGIRequest
from django.core.handlers.wsgi import WSGIRequest
from django.http import HttpRequest
from rest_framework import parsers
from rest_framework.exceptions import ParseError


class JSONParser(parsers.JSONParser):
    """JSON; raises ParseError also for JSON that is nested deeper than the interpreter can follow."""

    def parse(self, stream: Any, media_type: str | None = None, parser_context: Any = None) -> Any:
        try:
            return super().parse(stream, media_type, parser_context)
        except RecursionError as error:
            raise ParseError("JSON parse error - nested too deeply") from error


class Utf8(HttpRequest):
    """A request whose query and body are UTF-8, whatever charset it names: JSON is nothing else (RFC 8259).

    Django goes by any codec of Python: it fails at those that are none of text, and one takes minutes for a few MB.
    It also fails, before any view, at a Content-Type that it cannot read, as of `charset*=none''x`: such a one is none.
    """

    def _set_content_type_params(self, meta: dict[str, Any]) -> None:
        try:
            super()._set_content_type_params(meta)  # type: ignore[misc]  # Django's own, which the stubs leave out
        except ValueError:
            self.META["CONTENT_TYPE"] = self.content_type = ""
            self.content_params = {}

    @property
    def encoding(self) -> str:
        return "utf-8"

    @encoding.setter
    def encoding(self, named: str | None) -> None:
        """Django sets it to what the request names."""


class Utf8WSGIRequest(Utf8, WSGIRequest):
    pass


class Utf8ASGIRequest(Utf8, ASGIRequest):
    pass
