"""Plots of a suite's results: the score against the number of states, and against training time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from .suite import Suite, TaskSuite
from .summary import by_method, relative_time, scaled

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


def write_plots(suite: Suite, records: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Write one SVG for each task, with two panels; returns their paths.

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


def _plot(task: TaskSuite, records: Sequence[dict[str, Any]], path: Path) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    found: dict[str, list[Any]] = {}
    for name, rows in by_method(task, records).items():
        # Other states kept on purpose would look like a failure of the method.
        control = task.methods[name].options.get("selection", "largest") != "largest"
        found.setdefault("control" if control else rows[0]["kind"], []).append(rows)
    kinds = [kind for kind in MARKERS if kind in found]
    for place, kind in enumerate(kinds):
        points = []
        beside = 1.03 ** (place - (len(kinds) - 1) / 2)  # rivals have the very same sizes
        for rows in found[kind]:
            scores = [scaled(row) for row in rows]
            time = relative_time(rows, records, "seconds_needed")
            points.append(
                (
                    beside * fmean(fmean(row["sizes"]) for row in rows),
                    time,
                    fmean(scores),
                    stdev(scores) if len(scores) > 1 else 0.0,
                )
            )
        points.sort()
        for axis, column in zip(axes, (0, 1), strict=True):
            shown = [point for point in points if point[column] is not None]
            axis.errorbar(
                [p[column] for p in shown],
                [p[2] for p in shown],
                [p[3] for p in shown],
                linestyle="none",
                marker=MARKERS[kind],
                color=f"C{list(MARKERS).index(kind)}",
                label=kind.replace("_", " "),
                capsize=2,
                alpha=0.8,
            )
    axes[0].set_xscale("log", base=2)
    axes[0].xaxis.set_major_formatter("{x:g}")
    if records[0]["metric"] == "accuracy":
        axes[0].set_ylim(top=min(axes[0].get_ylim()[1], 102))
    axes[0].set(
        xlabel="states per layer (methods of one size side by side)",
        ylabel=f"test {records[0]['metric'].replace('_', ' ')}{', %' if records[0]['metric'] == 'accuracy' else ''}",
        title=task.name,
    )
    axes[1].set(xlabel="training time, teacher and cut model included / full size", title=task.name)
    axes[1].legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
