"""The admin's first page, and the part of it that is fetched anew every few seconds."""

from typing import Any

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET

from events_outbox.admin.read_only import tenant_of

from .overview import gather, gather_tenant
from .state import state_of, state_of_tenant

MAY_SEE = "events_outbox.view_outboxevent"


def overview_context(request: HttpRequest) -> dict[str, Any]:
    """What the overview shows to this user: everything, a tenant's part, or nothing without a role."""
    if not request.user.has_perm(MAY_SEE):
        return {"has_no_role": True}
    tenant = tenant_of(request)
    if tenant is not None:
        of_tenant = gather_tenant(tenant)
        return {"tenant_overview": of_tenant, "state": state_of_tenant(of_tenant), "at": of_tenant.at}
    overview = gather()
    return {"overview": overview, "state": state_of(overview), "at": overview.at}


def overview_page(request: HttpRequest, context: dict[str, Any]) -> dict[str, Any]:
    """The context of the admin's index: called by the theme (DASHBOARD_CALLBACK)."""
    return {**context, **overview_context(request)}


@never_cache
@require_GET
def overview_fragment(request: HttpRequest) -> HttpResponse:
    """The overview without the page around it."""
    return render(request, "console/overview.html", overview_context(request))
