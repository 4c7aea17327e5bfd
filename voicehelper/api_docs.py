"""The API's description, and a page on which to read and try it, for whoever asks: nothing in it is secret."""

from functools import cache
from typing import Any

from drf_spectacular.generators import SchemaGenerator
from drf_spectacular.utils import extend_schema
from drf_spectacular.views import SpectacularJSONAPIView, SpectacularSwaggerSplitView
from rest_framework.request import Request
from rest_framework.response import Response


@cache
def description() -> dict[str, Any]:
    """The whole description. Made once in each process: it takes as long as a hundred other requests."""
    generator = SchemaGenerator()  # type: ignore[no-untyped-call]
    schema: dict[str, Any] = generator.get_schema(request=None, public=True)  # type: ignore[no-untyped-call]
    return schema


class DescriptionView(SpectacularJSONAPIView):
    """GET the description."""

    @extend_schema(exclude=True)
    def get(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        return Response(description())


class DocsView(SpectacularSwaggerSplitView):
    """GET the page. Its script comes by itself, as the content policy demands."""

    url_name = "api-description"
    template_name = "voicehelper/api_docs.html"
