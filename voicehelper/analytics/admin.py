"""Daily totals in the admin, to look at."""

from typing import Any

from django.contrib import admin
from django.db.models import Count, Sum
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse

from events_outbox.admin import ReadOnlyAdmin
from events_outbox.admin.filters import TextFilter

from .figures import figures, plain
from .models import MEASURES, DailyTotal

ADDED_ROWS = 10_000
"""So many rows are added up above the list: some 20 ms."""


class ModeFilter(TextFilter):
    title = parameter_name = field = "mode"


class ModelFilter(TextFilter):
    title = parameter_name = field = "model"


@admin.register(DailyTotal)
class DailyTotalAdmin(ReadOnlyAdmin):
    list_display = [
        "day",
        "mode",
        "model_name",
        "tenant_id",
        "conversations",
        "success",
        "messages",
        "tokens",
        "cost",
        "p95",
    ]
    list_filter = [ModeFilter, ModelFilter]
    list_before_template = "analytics/totals.html"
    exact_search = ["tenant_id"]
    search_help_text = "a tenant id, whole"
    date_hierarchy = "day"

    def changelist_view(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponse:
        """The list, and above it what its filters leave, added up."""
        answer = super().changelist_view(request, extra_context)
        if isinstance(answer, TemplateResponse) and answer.context_data and "cl" in answer.context_data:
            rows = answer.context_data["cl"].queryset.order_by("-pk")[: ADDED_ROWS + 1]
            sums = rows.aggregate(all_rows=Count("pk"), **{f"sum_{name}": Sum(name) for name in MEASURES})
            if sums["all_rows"] > ADDED_ROWS:
                answer.context_data["all_rows"] = ADDED_ROWS
            else:
                answer.context_data["all_rows"] = sums["all_rows"]
                answer.context_data["all_figures"] = figures({name: sums[f"sum_{name}"] or 0 for name in MEASURES})
        return answer

    @admin.display(description="model", ordering="model")
    def model_name(self, total: DailyTotal) -> str:
        return total.model or "-"

    @admin.display(description="completed / failed")
    def success(self, total: DailyTotal) -> str:
        return f"{total.completed} / {total.failed}"

    @admin.display(description="tokens in / out")
    def tokens(self, total: DailyTotal) -> str:
        return f"{total.input_tokens} / {total.output_tokens}"

    @admin.display(description="cost, $")
    def cost(self, total: DailyTotal) -> str:
        return plain(total.cost_dollars)

    @admin.display(description="P95, s")
    def p95(self, total: DailyTotal) -> str:
        found = figures({name: getattr(total, name) for name in MEASURES})["latency_p95_seconds"]
        return "-" if found is None else str(found)
