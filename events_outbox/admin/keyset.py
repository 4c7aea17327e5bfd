"""Lists of tables of many millions of rows: newest first, paged by key, at a cost that does not grow with the table.

A page is what comes before or after a key. A condition that an index serves is turned into the keys it leaves. Under
any other a page looks through so many rows at most, says how far it came, and goes on from there by link.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from django.contrib import admin, messages
from django.contrib.admin.options import IncorrectLookupParameters
from django.contrib.admin.views.main import SEARCH_VAR
from django.core.exceptions import FieldDoesNotExist, ValidationError
from django.core.paginator import Paginator
from django.db import models
from django.db.models import Q, QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils.html import format_html
from django.utils.safestring import SafeString

from . import periods
from .export import ExportedList
from .periods import Period
from .texts import exact_time

if TYPE_CHECKING:
    from django.contrib.admin.views.main import ChangeList

    ModelAdmin = admin.ModelAdmin[Any]
else:  # the theme's; they have no types
    from unfold.admin import ModelAdmin
    from unfold.views import ChangeList

PAGED_ROWS = 10_000
"""Counting ends here: "10,000 or more"."""
KNOWN_KEYS = 10_000
"""So many keys of an index are taken. When there are more, looking through the newest rows finds some soon."""
SCANNED_ROWS = 50_000
"""So many rows a page looks through under a condition that no index serves: some 50 ms."""
BEFORE, AFTER, OLDEST, DATE = "before", "after", "oldest", "date"


class BoundedPaginator(Paginator):  # type: ignore[type-arg]
    """Pages through the first PAGED_ROWS rows: for the few lists whose order is not that of the key."""

    @cached_property
    def count(self) -> int:
        rows: QuerySet[Any] = self.object_list  # type: ignore[assignment]
        return rows.order_by()[:PAGED_ROWS].count()


@dataclass(frozen=True)
class Walk:
    """One page's worth of rows in the direction of the walk."""

    rows: list[Any]
    more: bool
    """Whether further rows match."""
    stop: Any = None
    """The last key looked at, when the walk ended there without having come to the end of the table."""


@dataclass(frozen=True)
class Chosen:
    """A condition of the list, in words, and the address of the list without it."""

    name: str
    value: str
    link: str


class BoundedChangeList(ChangeList):
    """A page of a list: its rows, the links to others, how many there are as far as that is known."""

    model_admin: Any

    def __init__(self, request: HttpRequest, *args: Any, **options: Any) -> None:
        self._asked = {name: request.GET[name] for name in (BEFORE, AFTER, OLDEST, DATE) if request.GET.get(name)}
        self.links: dict[str, str] = {}
        self.looked_through = ""
        self.known: set[Any] | None = None
        self.scans = False
        self.by_key = False
        if any("\0" in value for values in request.GET.lists() for value in values[1]):
            raise IncorrectLookupParameters("NUL is in no row")  # the database does not even look
        super().__init__(request, *args, **options)
        self.may_export = self.model_admin.has_export_permission(request)
        self.export_link = "export/" + self.get_query_string()

    # What is asked for

    def get_filters_params(self, params: dict[str, Any] | None = None) -> dict[str, Any]:
        left = super().get_filters_params(params)
        return {name: value for name, value in left.items() if name not in (BEFORE, AFTER, OLDEST, DATE)}

    def get_ordering(self, request: HttpRequest, queryset: QuerySet[Any]) -> Any:
        return ["-pk"] if self.by_key else super().get_ordering(request, queryset)

    def get_ordering_field_columns(self) -> Any:
        # Asked for with each row; no column of such a list can be sorted.
        return {} if self.by_key else super().get_ordering_field_columns()

    def get_queryset(self, request: HttpRequest, exclude_parameters: Any = None) -> QuerySet[Any]:
        self.by_key = self.model_admin.is_ordered_by_key(request)
        self.query: str = self.query.strip()
        # Links keep the conditions, but not the place; a form sends what was left empty too.
        self.filter_params = {
            name: values
            for name, values in self.filter_params.items()
            if any(values) and name not in (BEFORE, AFTER, OLDEST)
        }
        rows = super().get_queryset(request, exclude_parameters)
        if not self.by_key:
            return rows
        has_conditions = bool(rows.query.where)
        self.known = self._known_keys(request)
        self.scans = self.known is None and has_conditions
        if self.known is not None:
            rows = rows.filter(pk__in=self.known)
        if self.period is not None:
            field = self.model_admin.time_field
            rows = rows.filter(**{f"{field}__gte": self.period.start, f"{field}__lt": self.period.end})
        return self._within_period(rows)

    @cached_property
    def period(self) -> Period | None:
        if self.model_admin.time_field is None or DATE not in self._asked:
            return None
        try:
            return Period.parse(self._asked[DATE])
        except ValueError as error:
            raise IncorrectLookupParameters(error) from error

    def _key(self, name: str) -> Any:
        """The key that the address gives, or None."""
        if name not in self._asked:
            return None
        try:
            return self.lookup_opts.pk.to_python(self._asked[name])
        except ValidationError as error:
            raise IncorrectLookupParameters(error) from error

    @cached_property
    def _period_keys(self) -> tuple[Any, Any] | None:
        if self.period is None:
            return None
        return periods.keys_of(self.model, self.model_admin.time_field, self.period)

    def _within_period(self, rows: QuerySet[Any]) -> QuerySet[Any]:
        if self._period_keys is None:
            return rows
        first, end = self._period_keys
        return rows.filter(pk__gte=first, pk__lt=end)

    def _known_keys(self, request: HttpRequest) -> set[Any] | None:
        """The keys that the conditions with an index leave, when they are few."""
        known: set[Any] | None = None
        for alternatives in self._served_conditions(request):
            keys: set[Any] = set()
            for rows in alternatives:
                keys.update(rows[: KNOWN_KEYS + 1])
            if len(keys) <= KNOWN_KEYS:
                known = keys if known is None else known & keys
        return known

    def _served_conditions(self, request: HttpRequest) -> Iterator[list[QuerySet[Any]]]:
        """For each condition that indexes serve: the keys that meet it, from each of the indexes."""
        keys = self.model._base_manager.order_by().values_list("pk", flat=True)
        filtered = set()
        for spec in self.filter_specs:
            filtered.update(spec.expected_parameters())
            served = getattr(spec, "keys", lambda: None)()
            if served is not None:
                yield [served]
        for name, values in self.get_filters_params().items():
            if name not in filtered and _is_indexed(self.model, name):
                yield [keys.filter(**{name: value}) for value in values]  # any of them, as Django reads it
        if self.query and self.model_admin.searches_exactly(request, self.query):
            yield [keys.filter(condition) for condition in self.model_admin.exact_conditions(self.query)]

    # The page

    def get_results(self, request: HttpRequest) -> None:
        if not self.by_key:
            super().get_results(request)
            self.full_result_count = self.result_count  # else the theme tells it above the list, and covers the title
            return
        self.result_list = self._page()
        self.paginator = Paginator(self.result_list, self.list_per_page)
        self.show_full_result_count = self.can_show_all = self.multi_page = False
        self.show_admin_actions = True
        self.count: int | None = self._count()
        # What "select all" offers: only what was counted.
        is_total = self.count is not None and self.count < PAGED_ROWS
        self.result_count = self.count if is_total and self.count is not None else len(self.result_list)
        self.full_result_count = self.result_count

    def _page(self) -> list[Any]:
        if AFTER in self._asked or OLDEST in self._asked:
            after = self._key(AFTER)
            walk = self.walk(after, newest_first=False)
            if after is None or walk.more or walk.stop is not None:
                rows = walk.rows[::-1]
                self._link(walk, AFTER, BEFORE, after, rows[-1:])
                return rows
            # There is nothing newer than these: the newest page, full.
            self._asked.pop(BEFORE, None)
        before = self._key(BEFORE)
        walk = self.walk(before, newest_first=True)
        self._link(walk, BEFORE, AFTER, before, walk.rows[:1])
        return walk.rows

    def walk(self, start: Any, *, newest_first: bool, limit: int | None = None) -> Walk:
        """Return the rows beyond the key `start`, which itself is left out; None: from the list's end on."""
        limit = limit or self.list_per_page
        order, beyond, up_to = ("-pk", "pk__lt", "pk__gte") if newest_first else ("pk", "pk__gt", "pk__lte")
        rows = self.queryset.order_by(order)
        keys = self._within_period(self.model._base_manager.order_by(order)).values_list("pk", flat=True)
        if start is not None:
            rows, keys = rows.filter(**{beyond: start}), keys.filter(**{beyond: start})
        stop = None
        if self.scans:
            # A look into the primary key alone. By rows, since ids may have gaps of any size.
            stretch = list(keys[SCANNED_ROWS - 1 : SCANNED_ROWS + 1])
            if len(stretch) == 2:
                stop = stretch[0]
                rows = rows.filter(**{up_to: stop})
        rows = rows.defer(*self.model_admin.list_defer).prefetch_related(*self.model_admin.list_prefetch)
        found = list(rows[: limit + 1])
        return Walk(found[:limit], len(found) > limit, stop)

    def _link(self, walk: Walk, onward: str, back: str, start: Any, first: Sequence[Any]) -> None:
        """Note the links of a page that was walked to from `start`; `first`: the first of its rows, if it has some."""
        forth, other = ("older", "newer") if onward == BEFORE else ("newer", "older")
        if walk.more:
            self.links[forth] = self.get_query_string({onward: walk.rows[-1].pk})
        elif walk.stop is not None:
            self.links["further"] = self.get_query_string({onward: walk.stop})
            self.looked_through = self._how_far(walk, back=onward == BEFORE)
        if start is not None:
            self.links[other] = self.get_query_string({back: first[0].pk if first else self._next_key(start, onward)})
        further = "further" in self.links
        if "newer" in self.links or (further and onward == AFTER):
            self.links["newest"] = self.get_query_string()
        if "older" in self.links or (further and onward == BEFORE):
            self.links["oldest"] = self.get_query_string({OLDEST: 1})

    def _next_key(self, start: Any, onward: str) -> Any:
        """The first key beyond `start`, so that a page walked from there the other way begins with `start`."""
        below = onward == BEFORE
        keys = self.model._base_manager.filter(**{"pk__lt" if below else "pk__gt": start})
        return keys.order_by("-pk" if below else "pk").values_list("pk", flat=True).first() or start

    def _how_far(self, walk: Walk, *, back: bool) -> str:
        place = str(walk.stop)
        if self.model_admin.time_field is not None:
            times = self.model._base_manager.filter(pk=walk.stop).values_list(self.model_admin.time_field, flat=True)
            place = exact_time(times[0])[:16] if times else place
        found = len(walk.rows) or "none"
        return f"Looked through {self.opts.verbose_name_plural} {'back' if back else 'up'} to {place}: {found} found."

    def _count(self) -> int | None:
        """How many rows there are, PAGED_ROWS at most; None where that could take reading the table."""
        if self.scans:
            return None if self.links else len(self.result_list)
        # In order, which keeps the planner from a scan that has to pass everything older first.
        counted: int = self.queryset.order_by("-pk")[:PAGED_ROWS].count()
        return counted

    # In words

    def how_many(self) -> str:
        count = self.result_count if not self.by_key else self.count
        if count is None:
            return f"{len(self.result_list):,} {self.opts.verbose_name_plural} on this page"
        more = " or more" if count >= PAGED_ROWS else ""
        name = self.opts.verbose_name if count == 1 else self.opts.verbose_name_plural
        return f"{count:,}{more} {name}"

    def chosen(self) -> list[Chosen]:
        """The conditions that are on."""
        chosen = []
        left = self.get_filters_params()
        for spec in self.filter_specs:
            names = [name for name in spec.expected_parameters() if name in left]
            values = [left.pop(name)[-1] for name in names]
            if names:
                chosen.append((str(spec.title), _choice(spec, values[0], self), names))
        chosen += [(name, ", ".join(map(str, values)), [name]) for name, values in left.items()]
        if self.query:
            chosen.append(("search", self.query, [SEARCH_VAR]))
        if self.period is not None:
            chosen.append(("date", self.period.label(), [DATE]))
        return [
            Chosen(name, value, self.get_query_string(dict.fromkeys(names))) for name, value, names in sorted(chosen)
        ]

    def kept_in_filter_form(self) -> list[tuple[str, str]]:
        """What the filters' form sends along: all conditions but its own."""
        own = {name for spec in self.filter_specs for name in spec.expected_parameters()}
        return [(name, value) for name, values in self.filter_params.items() if name not in own for value in values]

    def drill_down(self) -> dict[str, list[tuple[str, str]]] | None:
        """The periods around the chosen one, and those in it, each with its address; None: the list has no dates."""
        if not self.by_key or self.model_admin.time_field is None:
            return None
        outer = periods.outer_times(self.model, self.model_admin.time_field)
        if outer is None:
            return None
        around = [] if self.period is None else self.period.outer()
        inner = periods.years(*outer) if self.period is None else self.period.inner(*outer)
        while self.period is None and len(inner) == 1 and inner[0].level < 2:
            inner = inner[0].inner(*outer)  # a single year is no choice
        return {
            "around": [(period.short_label(), self.get_query_string({DATE: period.text})) for period in around],
            "inner": [
                (period.label() if not around else period.short_label(), self.get_query_string({DATE: period.text}))
                for period in inner
            ],
            "all": [("All dates", self.get_query_string({DATE: None}))],
        }


def _choice(spec: Any, value: Any, changelist: BoundedChangeList) -> str:
    if hasattr(spec, "lookup_choices"):
        return str(dict(spec.lookup_choices).get(value, value))
    return next((str(choice["display"]) for choice in spec.choices(changelist) if choice["selected"]), str(value))


def _is_indexed(model: type[models.Model], lookup: str) -> bool:
    """Whether an index finds the rows whose field has a value."""
    name = lookup.removesuffix("__exact")
    try:
        field: Any = model._meta.get_field(name)
    except FieldDoesNotExist:
        return False
    indexes = [*model._meta.indexes, *model._meta.total_unique_constraints]
    begins = {tuple(index.fields)[:1] for index in indexes if index.condition is None}
    return bool(field.unique or field.db_index or (name,) in begins)


@cache
def _checkbox() -> str:
    """The theme's checkbox of a row, with a place for the row's key."""
    place = "key-of-the-row"
    html = str(ModelAdmin.action_checkbox(ModelAdmin, SimpleNamespace(pk=place)))  # type: ignore[arg-type]
    return html.replace("{", "{{").replace("}", "}}").replace(place, "{}")


class BoundedList(ExportedList):
    """How a list of such rows is shown: part of every admin here."""

    paginator = BoundedPaginator
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER  # they count the table once for each choice
    list_per_page = 50
    change_list_template = "admin/events_outbox/change_list.html"
    time_field: str | None = None
    """When a row was made, if keys follow that: the list has dates to choose from."""
    exact_search: Sequence[str] = ()
    """Fields with an index each, in which the whole search term is looked up. `search_fields`, which read the rows, are
    searched when none of these has it."""
    list_defer: Sequence[str] = ()
    """Large fields that no column shows."""
    list_prefetch: Sequence[str] = ()
    """Rows of other large tables, by key; a join may read such a table from its beginning."""

    @admin.display(description=ModelAdmin.action_checkbox.short_description)  # type: ignore[attr-defined]
    def action_checkbox(self, obj: models.Model) -> SafeString:
        # The theme renders a template for each row: an eighth of a page's time.
        return format_html(_checkbox(), str(obj.pk))

    def get_changelist(self, request: HttpRequest, **options: Any) -> Any:
        return BoundedChangeList

    def is_ordered_by_key(self, request: HttpRequest) -> bool:
        key = self.opts.pk.name
        ordering = list(self.get_ordering(request) or self.opts.ordering or ())
        return ordering in ([], ["-pk"], [f"-{key}"])

    def get_sortable_by(self, request: HttpRequest) -> Any:
        return () if self.is_ordered_by_key(request) else super().get_sortable_by(request)

    def get_search_fields(self, request: HttpRequest) -> Any:
        return super().get_search_fields(request) or self.exact_search

    def exact_conditions(self, term: str) -> list[Q]:
        """What finds a whole term, each condition by an index of its own; none when the term cannot be in any."""
        conditions = []
        for name in self.exact_search:
            field: Any = self.opts.get_field(name.partition("__")[0])
            if "__" in name:
                field = field.related_model._meta.get_field(name.partition("__")[2])
            try:
                conditions.append(Q(**{name: field.to_python(term)}))
            except ValidationError:
                continue
        return conditions

    def searches_exactly(self, request: HttpRequest, term: str) -> bool:
        """Whether a term is looked up whole: unless it is nowhere, and may be found as a part."""
        if not self.exact_search:
            return False
        return not self.search_fields or any(self._is_in_rows(request, found) for found in self.exact_conditions(term))

    def _is_in_rows(self, request: HttpRequest, condition: Q) -> bool:
        """Whether some of the rows that the user may see meet a condition that an index serves."""
        rows = self.get_queryset(request).order_by()
        found = self.model._base_manager.filter(condition).order_by()
        if not rows.query.where:
            return bool(found.exists())
        # By index first: which of them are the user's is looked up by key, for as many as are taken anyway.
        return bool(rows.filter(pk__in=found.values("pk")[:KNOWN_KEYS]).exists())

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        term = search_term.strip()
        if not term or not self.searches_exactly(request, term):
            return super().get_search_results(request, queryset, search_term)
        conditions = self.exact_conditions(term)
        found = Q(pk__in=[])
        for condition in conditions:
            found |= condition
        return queryset.filter(found), False

    def response_action(self, request: HttpRequest, queryset: QuerySet[Any], *args: Any) -> HttpResponse | None:
        """Refuse "all of them" where nobody knows how many that is."""
        if request.POST.get("select_across", "0") != "0" and self._is_uncounted(request):
            self.message_user(request, "Select rows, or find them by search: this list is not counted.", messages.ERROR)
            return None
        return super().response_action(request, queryset, *args)

    def _is_uncounted(self, request: HttpRequest) -> bool:
        changelist: Any = self.get_changelist_instance(request)
        return bool(changelist.scans)
