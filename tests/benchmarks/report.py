"""Rows of the result: judged, printed, written. Pure functions, no measuring."""

import json
import math
import operator
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_COMPARE = {">=": operator.ge, "<=": operator.le, "=": operator.eq}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured figure.

    `must`: what it has to reach, e.g. ">= 0.70"; None: nothing is promised. `claim`: what the specification says, as
    (lowest, highest) in `unit`, None for an open end; a claim that does not hold is shown and fails nothing.
    `value`: None when it could not be measured.
    """

    measure: str
    value: float | None
    unit: str
    must: str | None = None
    baseline: str | None = None
    claim: tuple[float | None, float | None] | None = None
    detail: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the promise is kept; None when nothing is promised."""
        if self.must is None:
            return None
        if self.value is None:
            return False
        sign, limit = self.must.split()
        return bool(_COMPARE[sign](self.value, float(limit)))

    @property
    def claim_holds(self) -> bool | None:
        """Whether the figure is at least as good as the claim's near end; None when nothing is claimed.

        Which end is the near one follows from the open end: (5, None) wants more, (None, 5) wants less. With two ends
        the value has to lie between them or beyond the second one.
        """
        if self.claim is None or self.value is None:
            return None
        near, far = self.claim
        if near is None or far is None:
            return (near is None or self.value >= near) and (far is None or self.value <= far)
        return self.value >= near if near <= far else self.value <= near

    def verdict(self) -> str:
        if self.must is not None:
            return "holds" if self.holds else "FALLS SHORT"
        if self.claim is not None:
            return "claim holds" if self.claim_holds else "claim does not hold"
        return ""

    def target(self) -> str:
        if self.must is not None:
            return self.must
        if self.claim is None:
            return ""
        near, far = self.claim
        ends = [number(end) for end in (near, far) if end is not None]
        if len(ends) == 2:
            return "claimed " + (ends[0] if near == far else " to ".join(ends))
        return f"claimed {'>=' if far is None else '<='} {ends[0]}"


def number(value: float | None) -> str:
    """As a person writes it: three digits that count, thousands with commas."""
    if value is None:
        return "-"
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 4
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text and value == round(value) else text


def median_and_spread(values: Sequence[float]) -> tuple[float, str]:
    """The median, and in words what it is the median of."""
    if len(values) == 1:
        return values[0], "one run"
    spread = f"median of {len(values)}, {number(min(values))} to {number(max(values))}"
    return statistics.median(values), spread


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that is not below `share` (0 to 1) of the values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]


def exit_code(rows: Sequence[Row]) -> int:
    """1 when a promise is not kept."""
    return int(any(row.holds is False for row in rows))


def table(rows: Sequence[Row]) -> str:
    """For the terminal: a line each, with baseline and detail indented below it."""
    cells = [(row.measure, f"{number(row.value)} {row.unit}".strip(), row.target(), row.verdict()) for row in rows]
    heads = ("measure", "value", "must reach", "")
    widths = [max(len(cell[i]) for cell in [heads, *cells]) for i in range(4)]
    lines = ["  ".join(head.ljust(width) for head, width in zip(heads, widths, strict=True)).rstrip()]
    lines.append("-" * len(lines[0]))
    for row, cell in zip(rows, cells, strict=True):
        lines.append("  ".join(text.ljust(width) for text, width in zip(cell, widths, strict=True)).rstrip())
        for text in (row.baseline and f"baseline: {row.baseline}", row.detail):
            if text:
                lines += textwrap.wrap(text, 116, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def write_json(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = [
        {
            "measure": row.measure,
            "value": row.value,
            "unit": row.unit,
            "baseline": row.baseline,
            "must": row.must,
            "holds": row.holds,
            "detail": "; ".join(
                part for part in (row.claim and f"{row.target()}: {row.verdict()}", row.detail) if part
            ),
        }
        for row in rows
    ]
    path.write_text(json.dumps(listed, indent=1, ensure_ascii=False) + "\n")


def markdown(rows: Sequence[Row]) -> str:
    lines = ["| measure | measured | must reach | | how |", "|---|---|---|---|---|"]
    for row in rows:
        how = "; ".join(text for text in (row.baseline and f"baseline: {row.baseline}", row.detail) if text)
        cells = (row.measure, f"{number(row.value)} {row.unit}".strip(), row.target(), row.verdict(), how)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
