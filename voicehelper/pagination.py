"""Cursor pagination of the API's lists."""

from uuid import UUID

from rest_framework.exceptions import NotFound
from rest_framework.pagination import Cursor, CursorPagination
from rest_framework.request import Request


class NewestFirst(CursorPagination):
    """By primary key, a UUIDv7 and so in order of creation. A made-up cursor is answered with 404."""

    ordering = "-id"

    def parse_position(self, text: str) -> object:
        """Raises ValueError for what is no value of the ordering's field."""
        return UUID(text)

    def decode_cursor(self, request: Request) -> Cursor | None:
        cursor: Cursor | None = super().decode_cursor(request)
        if cursor is not None and cursor.position is not None:
            try:
                self.parse_position(str(cursor.position))
            except ValueError as error:
                raise NotFound(self.invalid_cursor_message) from error
        return cursor


class ByPosition(NewestFirst):
    """By the number of a message within its conversation, oldest first."""

    ordering = "position"

    def parse_position(self, text: str) -> object:
        return int(text)
