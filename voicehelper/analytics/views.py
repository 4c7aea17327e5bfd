"""API of the analytics domain."""

from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from voicehelper.identity.permissions import member_of

from .models import DailyTotal
from .serializers import DailyTotalSerializer, SummaryQuery


class SummaryView(APIView):
    """GET the tenant's totals of a range of days, as a whole and per day and mode."""

    def get(self, request: Request) -> Response:
        query = SummaryQuery(data=request.query_params)
        query.is_valid(raise_exception=True)
        first, last, mode = (query.validated_data.get(name) for name in ("from", "to", "mode"))
        totals = DailyTotal.objects.for_tenant(member_of(request).own_tenant_id).filter(day__range=(first, last))
        if mode:
            totals = totals.filter(mode=mode)
        rows = list(totals.order_by("day", "mode"))
        return Response(
            {
                "from": first,
                "to": last,
                "mode": mode,
                "totals": {
                    "conversations": sum(row.conversations for row in rows),
                    "messages": sum(row.messages for row in rows),
                },
                "rows": DailyTotalSerializer(rows, many=True).data,
            }
        )
