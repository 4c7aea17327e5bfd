"""Pages of lists that may have many millions of rows."""

from typing import Any

from django.contrib import admin
from django.core.paginator import Paginator
from django.db.models import QuerySet
from django.utils.functional import cached_property

PAGED_ROWS = 10_000


class BoundedPaginator(Paginator):  # type: ignore[type-arg]
    """Pages through the first PAGED_ROWS rows; further rows are found by filter and search."""

    @cached_property
    def count(self) -> int:
        rows: QuerySet[Any] = self.object_list  # type: ignore[assignment]
        return rows.order_by()[:PAGED_ROWS].count()


class BoundedList:
    """How a list of such rows is paged: part of every admin here."""

    paginator: Any = BoundedPaginator
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER  # they count the table once for each choice
    list_per_page = 50
