"""System checks of the analytics domain."""

from collections.abc import Sequence
from typing import Any

from django.apps import AppConfig
from django.core.checks import CheckMessage, Error, register
from django.core.exceptions import ImproperlyConfigured

from .conf import analytics_settings


@register("analytics")
def check_settings(app_configs: Sequence[AppConfig] | None, **_: Any) -> list[CheckMessage]:
    try:
        analytics_settings()
    except ImproperlyConfigured as error:
        hint = "see BUDGET_ALERT_MIN_COST_DOLLARS and BUDGET_ALERT_MIN_TOKENS in the environment"
        return [Error(str(error), hint=hint, id="analytics.E001")]
    return []
