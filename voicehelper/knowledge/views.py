"""API of the knowledge domain. What another tenant owns does not exist (404)."""

from typing import Any
from uuid import UUID

from django.db.models import QuerySet
from django.http import Http404, HttpResponse
from django.shortcuts import get_object_or_404
from django.utils.http import content_disposition_header
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import extend_schema
from rest_framework import generics, status
from rest_framework.exceptions import APIException, ValidationError
from rest_framework.parsers import MultiPartParser
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from voicehelper.idempotency.once import once
from voicehelper.identity.permissions import member_of
from voicehelper.openapi import Problem
from voicehelper.problems import BodyTooLarge

from .conf import knowledge_settings
from .extraction import UnreadableDocument
from .models import Document, DocumentContent
from .search import SearchUnavailable, search
from .serializers import DocumentSerializer, NewDocument, SearchQuery, SearchResults
from .services import DocumentTooLarge, delete_document, upload_document

ENVELOPE_BYTES = 64 * 1024  # what the multipart form may add to the file


class SearchIsAway(APIException):
    status_code = status.HTTP_503_SERVICE_UNAVAILABLE
    default_detail = "The search is not available at the moment. Try again later."


class DocumentsView(generics.ListAPIView[Document]):
    """GET the tenant's documents, newest first; POST a new one, as multipart form data."""

    serializer_class = DocumentSerializer
    parser_classes = (MultiPartParser,)

    def get_queryset(self) -> QuerySet[Document]:
        return Document.objects.for_tenant(member_of(self.request).own_tenant_id)

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        # Before a byte of the body is read, as the check of a browser's CSRF token does. A body without a length has
        # none that would be read.
        try:
            length = int(request.META.get("CONTENT_LENGTH") or 0)
        except ValueError:  # Django, too, takes it for none
            length = 0
        if length > knowledge_settings().max_bytes + ENVELOPE_BYTES:
            raise BodyTooLarge(f"A file may have {knowledge_settings().max_bytes} bytes.")
        super().initial(request, *args, **kwargs)

    @extend_schema(request=NewDocument, responses={201: DocumentSerializer})
    @once
    def post(self, request: Request) -> Response:
        new = NewDocument(data=request.data)
        new.is_valid(raise_exception=True)
        file = new.validated_data["file"]
        try:
            document = upload_document(
                user=member_of(request),
                data=file.read(),
                file_name=file.name,
                title=new.validated_data.get("title", ""),
                declared_type=file.content_type or "",
            )
        except DocumentTooLarge as error:
            raise BodyTooLarge(str(error)) from error
        except UnreadableDocument as error:
            raise ValidationError({"file": [str(error)]}) from error
        return Response(DocumentSerializer(document).data, status=status.HTTP_201_CREATED)


class DocumentView(generics.RetrieveAPIView[Document]):
    """GET one document, without its content; DELETE it."""

    serializer_class = DocumentSerializer

    def get_queryset(self) -> QuerySet[Document]:
        return Document.objects.for_tenant(member_of(self.request).own_tenant_id)

    @extend_schema(responses={204: None})
    def delete(self, request: Request, pk: UUID) -> Response:
        try:
            delete_document(user=member_of(request), document_id=pk)
        except Document.DoesNotExist as error:
            raise Http404("No such document.") from error
        return Response(status=status.HTTP_204_NO_CONTENT)


class DocumentContentView(APIView):
    """GET the file as it was uploaded, to be saved and not shown: what is in it is not ours."""

    def perform_content_negotiation(self, request: Request, force: bool = False) -> Any:
        return super().perform_content_negotiation(request, force=True)  # the file is what it is, whatever is accepted

    @extend_schema(responses={(200, *Document.ContentType.values): OpenApiTypes.BINARY})
    def get(self, request: Request, pk: UUID) -> HttpResponse:
        own = Document.objects.for_tenant(member_of(request).own_tenant_id)
        document = get_object_or_404(own, pk=pk)
        content = get_object_or_404(DocumentContent, pk=document.pk)  # it may have been deleted this very moment
        is_text = document.content_type != Document.ContentType.PDF
        answer = HttpResponse(
            bytes(content.data), content_type=document.content_type + ("; charset=utf-8" if is_text else "")
        )
        answer["Content-Disposition"] = content_disposition_header(True, document.file_name) or "attachment"
        return answer


class SearchView(APIView):
    """GET the pieces of the tenant's documents that are nearest to `q`, the best first."""

    @extend_schema(parameters=[SearchQuery], responses={200: SearchResults, 503: Problem})
    def get(self, request: Request) -> Response:
        query = SearchQuery(data=request.query_params)
        query.is_valid(raise_exception=True)
        try:
            found = search(
                tenant_id=member_of(request).own_tenant_id,
                query=query.validated_data["q"],
                limit=query.validated_data["limit"],
            )
        except SearchUnavailable as error:
            raise SearchIsAway from error
        return Response(SearchResults({"results": found}).data)
