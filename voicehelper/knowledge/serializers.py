"""Shapes of the knowledge API."""

from typing import Any

from rest_framework import serializers

from .models import Document
from .search import MAX_LIMIT

MAX_SEARCH_CHARS = 1_000


class NewDocument(serializers.Serializer[Any]):
    # What is wrong with an empty one, the service says in words.
    file = serializers.FileField(max_length=Document.FILE_NAME_MAX_CHARS, allow_empty_file=True)
    title = serializers.CharField(max_length=Document.TITLE_MAX_CHARS, required=False, allow_blank=True)


class DocumentSerializer(serializers.ModelSerializer[Document]):
    user_id = serializers.UUIDField(read_only=True)

    class Meta:
        model = Document
        fields = [
            "id",
            "title",
            "file_name",
            "content_type",
            "size_bytes",
            "page_count",
            "status",
            "error",
            "chunk_count",
            "user_id",
            "created_at",
            "updated_at",
            "indexed_at",
        ]
        read_only_fields = fields


class SearchQuery(serializers.Serializer[Any]):
    q = serializers.CharField(max_length=MAX_SEARCH_CHARS)
    limit = serializers.IntegerField(min_value=1, max_value=MAX_LIMIT, default=5)


class FoundSerializer(serializers.Serializer[Any]):
    document_id = serializers.UUIDField()
    title = serializers.CharField()
    position = serializers.IntegerField(help_text="Of the chunk within the document, from 0.")
    text = serializers.CharField()
    score = serializers.FloatField(help_text="-1 to 1; the best come first.")


class SearchResults(serializers.Serializer[Any]):
    results = FoundSerializer(many=True)
