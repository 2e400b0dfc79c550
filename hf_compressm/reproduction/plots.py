"""Plot a suite's results: the score against the number of states, and against training time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from .suite import Suite, TaskSuite
from .summary import Records, by_method, relative_time, scaled

MARKERS = {
    "full": "*",
    "compressed": "o",
    "control": "x",
    "scratch": "s",
    "distillation": "^",
    "hankel_norm": "v",
    "score": "D",
    "after_training": "P",
}
"""The marker of each kind of method; "control" are those that keep other states on purpose."""

APART = ("control", "after_training", "hankel_norm")
"""Kinds whose scores may lie far from the others; a break in the axis keeps these apart then."""

SLOW = ("distillation", "hankel_norm")
"""Kinds that may take far longer than the others; a break in the axis of time keeps these apart then."""

MAIN = 4.0
"""Length of the part of an axis with the comparison, where that of each other part is 1."""

Part = tuple[float, float, float]
"""Lower end, upper end and length of a part of an axis."""

Point = tuple[float, float | None, float, float]
"""States per layer, relative training time, mean score and its standard deviation."""


def write_plots(suite: Suite, records: Records, folder: Path) -> list[Path]:
    """Write one SVG for each task, with two panels, into `folder`, and return their paths.

    Raises:
        ImportError: without matplotlib (`pip install "hf-compressm[plots]"`).
    """
    import matplotlib

    matplotlib.use("Agg")
    paths = []
    for task in suite.tasks:
        rows = [record for record in records if record["task"] == task.name and record["kind"] in MARKERS]
        if rows:
            paths.append(_plot(task, rows, folder / f"{task.name}.svg"))
    return paths


def _plot(task: TaskSuite, records: Records, path: Path) -> Path:
    from matplotlib import pyplot

    found = points_by_kind(task, records)
    scores = axis_parts([(kind in APART, point[2], point[3]) for kind, points in found.items() for point in points])[
        ::-1
    ]
    times = axis_parts([(kind in SLOW, point[1] or 0, 0) for kind, points in found.items() for point in points])
    width = sum(length for *_, length in times)
    # The paper is white, not transparent, so that the black letters can be read on a dark page too.
    figure, axes = pyplot.subplots(
        len(scores), 1 + len(times), figsize=(10, 4), sharex="col", sharey="row", layout="constrained",
        facecolor="white", squeeze=False, height_ratios=[length for *_, length in scores],
        width_ratios=[1, *(length / width for *_, length in times)],
    )  # fmt: skip
    for row, (low, high, _) in zip(axes, scores, strict=True):
        for place, axis in enumerate(row):
            _draw(axis, min(place, 1), found)
        row[0].set_ylim(low, high)
    for axis, (low, high, _) in zip(axes[0, 1:], times, strict=True):
        axis.set_xlim(low, high)
    _label(axes, task.name, records[0]["metric"], main_part(scores), 1 + main_part(times))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize="small", ncols=len(labels), loc="outside lower center")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


def _draw(axis: Any, column: int, found: dict[str, list[Point]]) -> None:
    for kind, points in found.items():
        shown = [point for point in points if point[column] is not None]
        axis.errorbar(
            [point[column] for point in shown],
            [point[2] for point in shown],
            [point[3] for point in shown],
            linestyle="none",
            marker=MARKERS[kind],
            color=f"C{list(MARKERS).index(kind)}",
            label=kind.replace("_", " "),
            capsize=2,
            alpha=0.8,
        )


def axis_parts(values: Sequence[tuple[bool, float, float]]) -> list[Part]:
    """Divide an axis into ascending parts: one, unless a value lies further from the rest than a quarter of its span.

    Args:
        values: of each point, whether it may lie apart, where it is, and the length of its bar to either side.
    """
    rest = [value for value in values if not value[0]] or values
    far = [value for value in values if value[0]] if len(rest) < len(values) else []
    low, high = _span(rest)
    reach = max(high - low, 1e-9) / 4
    below = [value for value in far if value[1] < low - reach]
    above = [value for value in far if value[1] > high + reach]
    near = [value[1] for value in far if value not in below + above]
    low, high = _padded(min([low, *near]), max([high, *near]))
    parts = [(low, high, MAIN)]
    if below:
        start, end = _padded(*_span(below))
        parts.insert(0, (start, min(end, low), 1.0))
    if above:
        start, end = _padded(*_span(above))
        parts.append((max(start, high), end, 1.0))
    return parts


def main_part(parts: Sequence[Part]) -> int:
    """Return the place of the part with the comparison."""
    return [length for *_, length in parts].index(MAIN)


def _span(values: Sequence[tuple[bool, float, float]]) -> tuple[float, float]:
    return min(value - bar for _, value, bar in values), max(value + bar for _, value, bar in values)


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.07 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def points_by_kind(task: TaskSuite, records: Records) -> dict[str, list[Point]]:
    """Return the points of each kind of method, in the order of `MARKERS`."""
    found: dict[str, list[Records]] = {}
    for name, rows in by_method(task, records).items():
        # Other states kept on purpose would look like a failure of the method.
        control = task.methods[name].options.get("selection", "largest") != "largest"
        found.setdefault("control" if control else rows[0]["kind"], []).append(rows)
    kinds = [kind for kind in MARKERS if kind in found]
    points = {}
    for place, kind in enumerate(kinds):
        beside = 1.03 ** (place - (len(kinds) - 1) / 2)  # rivals have the very same sizes
        points[kind] = sorted(_point(rows, records, beside) for rows in found[kind])
    return points


def _point(rows: Records, records: Records, beside: float) -> Point:
    scores = [scaled(row) for row in rows]
    return (
        beside * fmean(fmean(row["sizes"]) for row in rows),
        relative_time(rows, records, "seconds_needed"),
        fmean(scores),
        stdev(scores) if len(scores) > 1 else 0.0,
    )


def _label(axes: Any, name: str, metric: str, row: int, column: int) -> None:
    """Label the panels; `row` and `column` are those of the parts of the axes that hold the comparison."""
    percent = metric == "accuracy"
    axes[-1, 0].set_xscale("log", base=2)
    axes[-1, 0].xaxis.set_major_formatter("{x:g}")
    for axis in (axes[0, 0], axes[0, column]):
        axis.set_title(name)
    if percent:
        axes[0, 0].set_ylim(top=min(axes[0, 0].get_ylim()[1], 102))
    axes[-1, 0].set_xlabel("states per layer (methods of one size side by side)")
    axes[-1, column].set_xlabel("training time, teacher and cut model included / full size")
    for axis in axes[row, :2]:
        axis.set_ylabel(f"test {metric.replace('_', ' ')}{', %' if percent else ''}")
    for axis in axes[:, 1]:
        axis.tick_params(labelleft=True)
    for axis in axes[-1, 1:]:
        if axis is not axes[-1, column]:
            axis.locator_params(axis="x", nbins=2)
    for upper, lower in zip(axes[:-1].ravel(), axes[1:].ravel(), strict=True):
        _break(upper, lower, ("bottom", "top"))
    for left, right in zip(axes[:, 1:-1].ravel(), axes[:, 2:].ravel(), strict=True):
        _break(left, right, ("right", "left"))


def _break(first: Any, second: Any, sides: tuple[str, str]) -> None:
    """Mark that an axis leaves something out between two panels, whose sides these are."""
    stroke = {"marker": [(-1, -0.5), (1, 0.5)], "markersize": 8, "linestyle": "none", "color": "k", "clip_on": False}
    for axis, side in zip((first, second), sides, strict=True):
        axis.spines[side].set_visible(False)
        axis.tick_params(**({side: False} if side in ("bottom", "left") else {}))
        across = [0, 1], [float(side in ("top", "right"))] * 2
        axis.plot(*(across if side in ("top", "bottom") else across[::-1]), transform=axis.transAxes, **stroke)
