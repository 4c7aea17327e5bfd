"""The page before an action: what will happen, what will not and why, and the question whether it shall."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.db.models import Model
from django.http import HttpRequest
from django.template.response import TemplateResponse
from django.urls import reverse

SHOWN_ROWS = 50
"""Rows of the preview: more are counted, not shown."""
INPUT = (
    "bg-white border border-base-200 max-w-4xl px-3 py-2 rounded-default shadow-xs text-sm w-full focus:outline-2 "
    "focus:outline-primary-600 dark:bg-base-900 dark:border-base-700"
)
"""Classes of the theme for a field of a form."""


def confirm(
    model_admin: Any,
    request: HttpRequest,
    *,
    title: str,
    introduction: str,
    warnings: Iterable[str] = (),
    facts: Iterable[tuple[str, object]] = (),
    columns: Sequence[str] = (),
    rows: Iterable[Sequence[object]] = (),
    total: int | None = None,
    action: str = "",
    fields: Mapping[str, object] | None = None,
    button: str = "",
    needs_reason: bool = False,
    danger: bool = False,
    back: str = "",
) -> TemplateResponse:
    """Say what an action will do and ask whether it shall; the answer is a POST to the same address.

    `warnings`: what will not be done, or what else will happen. `facts`: figures, with their names. `rows`: cells in
    the order of `columns`; the first cell names its row. `total`: how many rows there are in all. `action`: name of
    an action of the list. `fields`: hidden fields of the answer, by name, each a value or several. `button`: what it
    says on it; empty when there is nothing that could be confirmed. `back`: where "No" leads, by default to the list.
    """
    shown = list(rows)
    total = len(shown) if total is None else total
    opts = model_admin.opts
    context = {
        **model_admin.admin_site.each_context(request),
        "title": title,
        "opts": opts,
        "introduction": introduction,
        "warnings": list(warnings),
        "facts": list(facts),
        "columns": columns,
        "rows": [(row[0], row[1:]) for row in shown[:SHOWN_ROWS]],
        "total": total,
        "is_cut": total > min(len(shown), SHOWN_ROWS),
        "hidden": [*_pairs({"action": action} if action else {}), *_pairs(fields or {})],
        "button": button,
        "needs_reason": needs_reason,
        "reason_is_missing": needs_reason and "confirmed" in request.POST and not reason_of(request),
        "danger": danger,
        "back": back or reverse(f"admin:{opts.app_label}_{opts.model_name}_changelist"),
    }
    return TemplateResponse(request, "admin/events_outbox/confirmation.html", context)


def is_confirmed(request: HttpRequest, *, needs_reason: bool = False) -> bool:
    """Whether the page was answered with yes, and with a reason if it takes one.

    Never for "select all": the page was about rows that were shown, not about whatever matches by now.
    """
    has_answer = request.method == "POST" and "confirmed" in request.POST
    has_answer = has_answer and request.POST.get("select_across", "0") in ("", "0")
    return has_answer and (bool(reason_of(request)) or not needs_reason)


def reason_of(request: HttpRequest) -> str:
    """The reason that was given; empty when there is none. The database holds no NUL."""
    return request.POST.get("reason", "").replace("\0", "").strip()


def chosen_again(rows: Iterable[Model]) -> dict[str, object]:
    """The fields by which the list finds these rows once more, and no others, when the page is answered.

    "Select all" would be asked again then, and find rows that came since, which nobody has looked at.
    """
    return {ACTION_CHECKBOX_NAME: [row.pk for row in rows]}


def shown_before(request: HttpRequest) -> int:
    """How many the page that is answered had shown, as its field "shown" says; 0 when it does not."""
    shown = request.POST.get("shown", "")
    return int(shown) if shown.isdecimal() and len(shown) < 19 else 0


def _pairs(fields: Mapping[str, object]) -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = []
    for name, value in fields.items():
        pairs += [(name, one) for one in (value if isinstance(value, list | tuple) else [value])]
    return pairs
