"""Make the tables of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..surgery import record_keys as keys
from .record import RunRecord
from .svg import Chart, number


@dataclass(frozen=True)
class Table:
    """A caption, columns, and rows of text, one cell for each column."""

    caption: str
    columns: list[str]
    rows: list[list[str]]

    @classmethod
    def filled(cls, caption: str, columns: list[str], rows: Sequence[Sequence[str]]) -> Table:
        """Make a table without the columns that are empty in all rows, with a dash in every other empty cell."""
        kept = [index for index in range(len(columns)) if index == 0 or any(row[index] for row in rows)]
        return cls(caption, [columns[index] for index in kept], [[row[index] or "–" for index in kept] for row in rows])


@dataclass(frozen=True)
class Figure:
    """A chart and a table of its numbers."""

    chart: Chart
    table: Table

    @property
    def svg(self) -> str:
        """The chart as an SVG element, for a page that has the theme's colours."""
        return self.chart.render()


def thin(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most `most` items (>= 2), evenly spaced, the first and the last included."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def cuts_table(run: RunRecord) -> Table:
    """Return one row per cut, with its error bound and the losses measured around it. Empty columns are left out."""
    columns = ["Step", "Loss before", "Loss after", "Change", "Mean states", "Sum removed", "Error bound", "Residual"]
    columns += ["Evaluation before", "Evaluation after", "Undone at step"]
    rows = []
    for cut in run.cuts:
        step, layers = cut["step"] or 0, cut["layers"]
        before, after = run.at(step, keys.LOSS_BEFORE), run.at(step, keys.LOSS_AFTER)
        change = None if before is None or after is None else after - before
        undone = run.undone.get(step)
        row = [run.moment(cut).removeprefix("at step "), *map(_text, (before, after))]
        row += ["" if change is None else signed(change)]
        row += [f"{_mean(layers, 'old_size')} → {_mean(layers, 'new_size')}", _removed(layers)]
        row += [_largest(layers, "bound"), _largest(layers, "residual"), *map(_text, run.around(step, "eval_loss"))]
        rows.append([*row, number(undone["step"]) if undone else ""])
    return Table.filled("Every cut: largest bound or residual of a layer, and losses", columns, rows)


def scores_table(scores: Mapping[str, Mapping[str, float]]) -> Table:
    """Return one row for each score on held-out data of a cut after training, with a column for each moment.

    Args:
        scores: moment -> name -> value, as of `RunRecord`; at least one moment.
    """
    named = {"before": "before the cut", "cut": "after the cut", "after": "after the cut", "healed": "this model"}
    moments = {moment: named.get(moment, moment) for moment in scores}
    if "cut" not in scores and "healed" in scores:
        moments["before"] = "base"
    rows = [
        [name.replace("_", " "), *(f"{values[name]:.4f}" for values in scores.values())]
        for name in next(iter(scores.values()))
    ]
    return Table("Scores on held-out data", ["Score", *moments.values()], rows)


def signed(change: float) -> str:
    """Return a change of a loss with its sign and four decimals, without a sign where these would be zeros."""
    if change == 0:
        return "0"
    return f"{change:+.4f}" if round(abs(change), 4) else "< 0.0001"


def layers_table(run: RunRecord, cut: dict[str, Any]) -> Table:
    """Return one row per layer of a cut."""
    rows = [
        [
            layer["name"],
            str(layer["old_size"]),
            str(layer["new_size"]),
            _removed([layer]),
            _text(layer.get("bound")),
            _text(layer.get("residual")),
        ]
        for layer in cut["layers"]
    ]
    columns = ["Layer", "States before", "After", "Sum removed", "Error bound", "Residual"]
    return Table.filled(f"The cut {run.moment(cut)}, layer by layer", columns, rows)


def _mean(layers: Sequence[dict[str, Any]], key: str) -> str:
    return number(sum(layer[key] for layer in layers) / len(layers))


def _removed(layers: Sequence[dict[str, Any]]) -> str:
    spectra = [(layer.get("singular_values") or [], layer["new_size"]) for layer in layers]
    total = sum(sum(values) for values, _ in spectra)
    gone = sum(sum(values[kept:]) for values, kept in spectra)
    return f"{gone / total:.1%}" if total else ""


def _largest(layers: Sequence[dict[str, Any]], key: str) -> str:
    values = [layer[key] for layer in layers if layer.get(key) is not None]
    return number(max(values)) if values else ""


def _text(value: float | None) -> str:
    return "" if value is None else number(value, 4)
