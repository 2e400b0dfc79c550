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

    # The paper is white, not transparent, so that the black letters can be read on a dark page too.
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained", facecolor="white")
    found = _points(task, records)
    for kind, points in found.items():
        for axis, column in zip(axes, (0, 1), strict=True):
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
    _label(axes, task.name, records[0]["metric"])
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path


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


def _label(axes: Any, name: str, metric: str) -> None:
    percent = metric == "accuracy"
    axes[0].set_xscale("log", base=2)
    axes[0].xaxis.set_major_formatter("{x:g}")
    if percent:
        axes[0].set_ylim(top=min(axes[0].get_ylim()[1], 102))
    score = f"test {metric.replace('_', ' ')}{', %' if percent else ''}"
    axes[0].set(xlabel="states per layer (methods of one size side by side)", ylabel=score, title=name)
    axes[1].set(xlabel="training time, teacher and cut model included / full size", ylabel=score, title=name)
    axes[1].tick_params(labelleft=True)
    axes[1].legend(fontsize="small")
