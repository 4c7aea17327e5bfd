"""How figures are written on the overview. What is not known is "no data", never 0."""

import json
from datetime import UTC, datetime
from typing import Any

from django import template
from django.conf import settings
from django.urls import NoReverseMatch, reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString

from events_outbox.status import COUNT_LIMIT, readable_seconds
from voicehelper.console.figures import Chart

register = template.Library()

NO_DATA = SafeString('<span class="ov-none">no data</span>')


@register.filter
def count(value: float | None) -> str:
    """A whole number; "100,000+" where counting stopped."""
    if value is None:
        return NO_DATA
    return f"{value:,.0f}{'+' if value == COUNT_LIMIT else ''}"


@register.filter
def rate(value: float | None) -> str:
    """A rate, to three digits at most."""
    if value is None:
        return NO_DATA
    if value == 0:
        return "0"
    if value < 0.01:
        return "< 0.01"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


@register.filter
def share(value: float | None) -> str:
    """A share as per cent."""
    if value is None:
        return NO_DATA
    percent = 100 * value
    digits = 0 if percent in (0, 100) else 1 if percent >= 1 else 2
    return f"{percent:.{digits}f} %"


@register.filter
def latency(seconds: float | None, limit: float | None = None) -> str:
    """A short time. At `limit`, the end of the last bucket, all that is known is that it is no less."""
    if seconds is None:
        return NO_DATA
    least = "≥ " if limit is not None and seconds >= limit else ""
    if seconds >= 1:
        return f"{least}{seconds:.2f} s"
    return f"{least}{1000 * seconds:.0f} ms" if seconds >= 0.01 else f"{least}{1000 * seconds:.1f} ms"


@register.filter
def dollars(value: float | None) -> str:
    if value is None:
        return NO_DATA
    return f"${value:,.2f}" if value >= 0.01 or value == 0 else "< $0.01"


@register.filter
def age(seconds: float | None) -> str:
    return NO_DATA if seconds is None else readable_seconds(seconds)


@register.filter
def ago(moment: datetime | None, now: datetime) -> str:
    """How long before `now` it was."""
    return NO_DATA if moment is None else f"{readable_seconds(max((now - moment).total_seconds(), 0))} ago"


@register.simple_tag
def page(name: str, query: str = "") -> str:
    """The URL of a page with a filter; empty for a page that there is not."""
    try:
        url = reverse(name)
    except NoReverseMatch:
        return ""
    return f"{url}?{query}" if query else url


@register.simple_tag
def runbook(alert: str, url: str = "") -> SafeString:
    """A link to an alert's section of the runbook; its name alone where nobody has said where the documents are."""
    if not alert:
        return SafeString("")
    if not url.startswith(("http://", "https://")):
        docs_url = str(getattr(settings, "DOCS_URL", ""))
        url = f"{docs_url}/runbook.md#{alert.lower()}" if docs_url.startswith(("http://", "https://")) else ""
    if not url:
        return format_html('<span class="ov-runbook">docs/runbook.md, {}</span>', alert)
    return format_html('<a href="{}">Runbook: {}</a>', url, alert)


@register.filter
def as_data(chart: Chart) -> str:
    """A chart as JSON, for console/overview.js."""
    lines = [{"label": line.label, "values": list(line.values)} for line in chart.lines]
    return json.dumps({"times": [round(at) for at in chart.times], "lines": lines}, separators=(",", ":"))


@register.filter
def in_words(chart: Chart) -> str:
    """A chart's alternative in text: its latest and highest values."""
    if not chart.lines:
        return "No data."
    parts = []
    for line in chart.lines:
        known = [value for value in line.values if value is not None]
        latest = f"latest {known[-1]:.4g}, highest {max(known):.4g}" if known else "no data"
        parts.append(f"{line.label}: {latest}")
    return f"Last hour. {'; '.join(parts)}."


@register.filter
def plain(value: float | None) -> str:
    """A value of a chart, in its table."""
    return NO_DATA if value is None else f"{value:,.4g}"


@register.simple_tag
def rows(chart: Chart) -> list[tuple[Any, ...]]:
    """Every tenth minute of a chart, for its table."""
    return [
        (datetime.fromtimestamp(chart.times[i], UTC), [line.values[i] for line in chart.lines])
        for i in range((len(chart.times) - 1) % 10, len(chart.times), 10)
    ]
