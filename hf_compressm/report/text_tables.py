"""Tables as text: Markdown for files and pages, aligned columns for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

GAP = 2
"""Spaces between two columns in a terminal."""


def markdown_table(columns: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table, without a newline at its end.

    Args:
        columns: the headings; the first may be empty.
        rows: cells in the order of the columns.

    Raises:
        ValueError: if a row has more or fewer cells than there are columns.
    """
    lines = ["".join(f" {cell} |" if f"{cell}" else " |" for cell in row) for row in _checked(columns, rows)]
    lines.insert(1, "---|" * len(columns))
    return "\n".join(f"|{line}" for line in lines)


def aligned_table(columns: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in columns, the first aligned to the left and all others to the right; no newline at its end.

    Args:
        columns: the headings.
        rows: cells in the order of the columns.

    Raises:
        ValueError: if a row has more or fewer cells than there are columns.
    """
    cells = _checked(columns, rows)
    widths = [max(len(f"{row[place]}") for row in cells) for place in range(len(columns))]
    lines = []
    for row in cells:
        first, *others = (f"{cell}" for cell in row)
        parts = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append((" " * GAP).join(parts).rstrip())
    return "\n".join(lines)


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """Return "mean ± standard deviation", or the mean alone of a single value.

    Args:
        values: at least one.
        digits: decimals, >= 0.

    Raises:
        StatisticsError: if there are no values.
    """
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {stdev(values):.{digits}f}"


def _checked(columns: Sequence[Any], rows: Iterable[Sequence[Any]]) -> list[Sequence[Any]]:
    cells = [columns, *rows]
    for row in cells:
        if len(row) != len(columns):
            raise ValueError(f"a row must have {len(columns)} cells, one for each of {list(columns)}; got {list(row)}")
    return cells
