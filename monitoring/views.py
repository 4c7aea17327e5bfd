"""/health, /livez, /readyz and /metrics, without authentication; only the last two use the database."""

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe

from monitoring.health import readiness
from monitoring.metrics import exposition


@never_cache
@require_safe
def health(request: HttpRequest) -> JsonResponse:
    """The process answers: the specification's health check."""
    return JsonResponse({"status": "healthy"})


@never_cache
@require_safe
def livez(request: HttpRequest) -> JsonResponse:
    """The process need not be restarted. Never looks at what it depends on: a restart would not mend that."""
    return JsonResponse({"status": "alive"})


@never_cache
@require_safe
def readyz(request: HttpRequest) -> JsonResponse:
    """Requests can be served; else 503 and why not."""
    reasons = readiness.reasons_against()
    if reasons:
        return JsonResponse({"status": "unready", "reasons": reasons}, status=503)
    return JsonResponse({"status": "ready"})


@never_cache
@require_safe
def metrics(request: HttpRequest) -> HttpResponse:
    """All metrics, for Prometheus."""
    body, content_type = exposition(request.headers.get("Accept", ""))
    return HttpResponse(body, content_type=content_type)
