"""Write the tables of a suite's results as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ..report.environment import environment_line
from ..report.text_tables import markdown_table, mean_and_deviation
from .ranking_stability import stability_table
from .suite import Suite, TaskSuite

Records = Sequence[dict[str, Any]]

REFERENCE = "full"
"""Kind of the method whose training time the others are divided by."""


def results_table(suite: Suite, records: Records) -> str:
    """Return one table for each task: mean ± standard deviation over seeds, states per layer, relative time.

    A time is that of the fastest seed, which other programs have disturbed least, divided by the fastest of the first
    `full` method: `training` is the run itself, `in all` adds the training of a teacher or of the model that was cut.
    """
    sections = [f"# {suite.name}", suite.description.strip()]
    for task in suite.tasks:
        rows = [record for record in records if record["task"] == task.name]
        sections += [f"## {task.name}", _task_table(task, rows)]
        sections += [_ablation(task, rows), _stability(rows)]
    sections.append(environment_lines(records))
    return "\n\n".join(section for section in sections if section) + "\n"


def by_method(task: TaskSuite, records: Records) -> dict[str, Records]:
    """Return the records of each method that has any, in the order of the suite, sorted by seed."""
    found = {
        name: sorted((r for r in records if r["method"] == name), key=lambda record: record["seed"])
        for name in task.methods
    }
    return {name: rows for name, rows in found.items() if rows}


def relative_time(rows: Records, records: Records, key: str) -> float | None:
    """Divide a time of the fastest seed by that of the first full-size method. Return None if either is unknown."""
    full = [record for record in records if record["kind"] == REFERENCE]
    time = fastest(rows, key)
    reference = fastest([record for record in full if record["method"] == full[0]["method"]], "seconds")
    return None if time is None or reference is None else time / reference


def fastest(rows: Records, key: str = "seconds") -> float | None:
    """Return the least time of a seed, without runs that were interrupted and resumed; None if none is left."""
    return min((row[key] for row in rows if not row.get("resumed")), default=None)


def _task_table(task: TaskSuite, records: Records) -> str:
    found = by_method(task, records)
    if not found:
        return "No run is finished yet."
    metric = next(iter(found.values()))[0]["metric"]
    columns = ["", f"test {metric.replace('_', ' ')}", "test loss", "states per layer", "training time, s"]
    cells = []
    for name, rows in found.items():
        times = [fastest(rows), *(relative_time(rows, records, key) for key in ("seconds", "seconds_needed"))]
        shown = ["" if t is None else f"{t:.{digits}f}" for t, digits in zip(times, (1, 2, 2), strict=True)]
        scores = [
            mean_and_deviation([scaled(row) for row in rows], _digits(metric)),
            mean_and_deviation([row["loss"] for row in rows], 4),
            f"{fmean(fmean(row['sizes']) for row in rows):.1f}",
        ]
        cells.append([name, *scores, *shown, len(rows)])
    return markdown_table([*columns, "/ full: training", "in all", "seeds"], cells)


def scaled(record: dict[str, Any]) -> float:
    """Return the score of a run; accuracies in percent."""
    return 100 * record["score"] if record["metric"] == "accuracy" else record["score"]


def _digits(metric: str) -> int:
    return 2 if metric == "accuracy" else 4


def _ablation(task: TaskSuite, records: Records) -> str:
    """The training loss right before the first cut and right after the last, and the test loss at the end."""
    found = {name: [row for row in rows if row["cuts"]] for name, rows in by_method(task, records).items()}
    found = {name: rows for name, rows in found.items() if rows}
    if not found:
        return ""
    cells = []
    for name, rows in found.items():
        before, after = ([row["cuts"][at][key] for row in rows] for at, key in ((0, "loss_before"), (-1, "loss_after")))
        rises = [sum(cut["loss_after"] - cut["loss_before"] for cut in row["cuts"]) for row in rows]
        losses = [mean_and_deviation(values, 3) for values in (before, rises, after, [row["loss"] for row in rows])]
        cells.append([name, f"{fmean(len(row['cuts']) for row in rows):.1f}", *losses])
    columns = ["", "cuts", "before the first", "sum of rises at cuts", "after the last", "test loss at the end"]
    return f"Loss on training batches around the cuts:\n\n{markdown_table(columns, cells)}"


def _stability(records: Records) -> str:
    measured = [entry for record in records if "stability" in record for entry in record["stability"]]
    return f"Ranking of states, against that at the end:\n\n{stability_table(measured)}" if measured else ""


def environment_lines(records: Records) -> str:
    """List the hardware and versions of the runs, each combination once."""
    lines = dict.fromkeys(f"{environment_line(record['environment'])}." for record in records)
    return f"Measured on: {' '.join(lines)}" if lines else ""
