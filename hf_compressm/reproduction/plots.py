"""Plot a suite's results: the score against the number of states, and against training time."""

from __future__ import annotations

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

APART = ("control", "after_training")
"""Kinds that may lie far from the others; a break in the axis keeps these apart then."""

MAIN = 4.0
"""Height of the part of the axis with the comparison, where that of each other part is 1."""

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

    found = _points(task, records)
    bands = _bands(found)
    # The paper is white, not transparent, so that the black letters can be read on a dark page too.
    figure, axes = pyplot.subplots(
        len(bands), 2, figsize=(10, 4), sharex="col", sharey="row", layout="constrained", facecolor="white",
        squeeze=False, height_ratios=[share for *_, share in bands],
    )  # fmt: skip
    for row, (low, high, _) in zip(axes, bands, strict=True):
        for axis, column in zip(row, (0, 1), strict=True):
            _draw(axis, column, found)
            axis.set_ylim(low, high)
    _label(axes, task.name, records[0]["metric"], main=[share for *_, share in bands].index(MAIN))
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


def _bands(found: dict[str, list[Point]]) -> list[tuple[float, float, float]]:
    """Return lower end, upper end and share of the height of each part of the axis of scores, from the top down.

    There is one part unless kinds of `APART` lie further from the rest than half of what that spans.
    """
    rest = [point for kind, points in found.items() if kind not in APART for point in points]
    apart = [point for kind, points in found.items() if kind in APART for point in points]
    low, high = _span(rest or apart)
    reach = max(high - low, 1e-9) / 2
    above = [point for point in apart if point[2] > high + reach]
    below = [point for point in apart if point[2] < low - reach]
    near = [point for point in apart if point not in above and point not in below]
    parts = [(above, 1.0), (rest + near, MAIN), (below, 1.0)]
    return [(*_padded(*_span(points)), share) for points, share in parts if points]


def _span(points: list[Point]) -> tuple[float, float]:
    return min(point[2] - point[3] for point in points), max(point[2] + point[3] for point in points)


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.07 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _points(task: TaskSuite, records: Records) -> dict[str, list[Point]]:
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


def _label(axes: Any, name: str, metric: str, main: int) -> None:
    """Label the panels; `main` is the row of the part of the axis that holds the comparison."""
    percent = metric == "accuracy"
    axes[-1, 0].set_xscale("log", base=2)
    axes[-1, 0].xaxis.set_major_formatter("{x:g}")
    for axis in axes[0]:
        axis.set_title(name)
        if percent:
            axis.set_ylim(top=min(axis.get_ylim()[1], 102))
    score = f"test {metric.replace('_', ' ')}{', %' if percent else ''}"
    axes[-1, 0].set_xlabel("states per layer (methods of one size side by side)")
    axes[-1, 1].set_xlabel("training time, teacher and cut model included / full size")
    for axis in axes[main]:
        axis.set_ylabel(score)
    for axis in axes[:, 1]:
        axis.tick_params(labelleft=True)
    for upper, lower in zip(axes[:-1].ravel(), axes[1:].ravel(), strict=True):
        _break(upper, lower)
    axes[main, 1].legend(fontsize="small")


def _break(upper: Any, lower: Any) -> None:
    """Mark that the axis of scores leaves something out between two panels."""
    upper.spines.bottom.set_visible(False)
    lower.spines.top.set_visible(False)
    upper.tick_params(bottom=False)
    stroke = {"marker": [(-1, -0.5), (1, 0.5)], "markersize": 8, "linestyle": "none", "color": "k", "clip_on": False}
    upper.plot([0, 1], [0, 0], transform=upper.transAxes, **stroke)
    lower.plot([0, 1], [1, 1], transform=lower.transAxes, **stroke)
