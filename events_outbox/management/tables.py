"""Tables on a command's output."""

from collections.abc import Sequence

from django.core.management.base import OutputWrapper


def print_table(out: OutputWrapper, columns: Sequence[str], rows: Sequence[Sequence[str]], total: int, of: str) -> None:
    """Print rows under their columns' names, and how many there are; `total`: with those that are not shown."""
    lines = [columns, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    for line in lines if rows else []:
        out.write("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    out.write(f"{len(rows)} of {total}" if total > len(rows) else f"{total} {of}")


def short(text: str, characters: int = 100) -> str:
    """The beginning of a text, on one line."""
    return " ".join(text.split())[:characters]
