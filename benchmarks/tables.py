"""Markdown tables, and numbers as their cells."""

from __future__ import annotations

import statistics
from typing import Mapping, Sequence


def markdown(rows: Sequence[Sequence[str]], aligned: bool = False) -> str:
    """A table of rows, the first of them its head; ``aligned`` pads the cells, for those who read it as plain text."""
    widths = [max(map(len, column)) if aligned else 0 for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) if aligned else " --- " for width in widths) + "|")
    return "\n".join(lines)


def of_rows(rows: Sequence[Mapping[str, object]]) -> str:
    """A table of rows that all have the first one's columns."""
    return markdown([list(rows[0]), *([str(value) for value in row.values()] for row in rows)])


def number(value: float | None) -> str:
    return (
        "-" if value is None else f"{value:.1f}" if value < 1000 else f"{value:.0f}" if value < 1e6 else f"{value:.3g}"
    )


def spread(values: Sequence[float | None]) -> str:
    """Mean ± standard deviation of the values that are known."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return number(statistics.fmean(known)) + (f" ± {number(statistics.stdev(known))}" if len(known) > 1 else "")
