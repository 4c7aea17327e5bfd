"""API of the analytics domain."""

from datetime import date
from typing import Any

from django.db.models import Sum
from drf_spectacular.utils import extend_schema
from rest_framework import generics
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from voicehelper.identity.permissions import member_of
from voicehelper.pagination import NewestFirst

from .figures import figures
from .models import MEASURES, DailyTotal, DailyTotalQuerySet
from .serializers import DailyTotalSerializer, SummarySerializer, TotalsQuery


class NewestDayFirst(NewestFirst):
    """By day, the last one first, and within a day by mode and model."""

    ordering = ("-day", "mode", "model")  # type: ignore[assignment]  # it may be several

    def parse_position(self, text: str) -> object:
        return date.fromisoformat(text)


def asked_for(request: Request) -> tuple[DailyTotalQuerySet, dict[str, Any]]:
    """The totals of the user's tenant that a request asks for, and what it asks. Raises ValidationError."""
    query = TotalsQuery(data=request.query_params)
    query.is_valid(raise_exception=True)
    asked = {name: query.validated_data.get(name) for name in ("from", "to", "mode", "model")}
    totals = DailyTotal.objects.for_tenant(member_of(request).own_tenant_id)
    totals = totals.filter(day__range=(asked["from"], asked["to"]))
    for name in ("mode", "model"):
        if asked[name]:
            totals = totals.filter(**{name: asked[name]})
    return totals, asked


class SummaryView(APIView):
    """GET the tenant's totals of a range of days, as a whole and per day and mode."""

    @extend_schema(parameters=[TotalsQuery], responses=SummarySerializer)
    def get(self, request: Request) -> Response:
        totals, asked = asked_for(request)
        # Named apart: a sum may not be called as the column that it is of.
        sums = {f"sum_{name}": Sum(name) for name in MEASURES}
        rows: list[Any] = list(totals.order_by("day", "mode").values("day", "mode").annotate(**sums))
        return Response(
            {
                **asked,
                "totals": figures({name: sum(row[f"sum_{name}"] for row in rows) for name in MEASURES}),
                "rows": [
                    {
                        "day": row["day"],
                        "mode": row["mode"],
                        **figures({name: row[f"sum_{name}"] for name in MEASURES}),
                    }
                    for row in rows
                ],
            }
        )


class DailyView(generics.ListAPIView[DailyTotal]):
    """GET the tenant's totals of a range of days, per day, mode and model, the last day first."""

    serializer_class = DailyTotalSerializer
    pagination_class = NewestDayFirst
    queryset = DailyTotal.objects.none()  # for the schema

    @extend_schema(parameters=[TotalsQuery])
    def get(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        return super().get(request, *args, **kwargs)

    def get_queryset(self) -> DailyTotalQuerySet:
        totals, _ = asked_for(self.request)
        return totals
