"""Tables of a suite's results, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

from ..report.environment import hardware_line
from .ranking_stability import stability_table
from .suite import Suite, TaskSuite

Records = Sequence[dict[str, Any]]

REFERENCE = "full"
"""Kind of the method whose training time the others are divided by."""


def results_table(suite: Suite, records: Records) -> str:
    """One table for each task: mean ± standard deviation over seeds, states per layer, time relative to full size.

    Times are those of the fastest seed, which other programs have disturbed least, and relative to the fastest of the
    first `full` method: `training` is the run itself, `in all` adds the training of a teacher or of the model that was
    cut.
    """
    sections = [f"# {suite.name}", suite.description.strip()]
    for task in suite.tasks:
        rows = [record for record in records if record["task"] == task.name]
        sections += [f"## {task.name}", _task_table(task, rows)]
        sections += [_ablation(task, rows), _stability(rows)]
    sections.append(environment_lines(records))
    return "\n\n".join(section for section in sections if section) + "\n"


def by_method(task: TaskSuite, records: Records) -> dict[str, Records]:
    """Records of each method of a task that has any, in the order of the suite, by seed."""
    found = {
        name: sorted((r for r in records if r["method"] == name), key=lambda record: record["seed"])
        for name in task.methods
    }
    return {name: rows for name, rows in found.items() if rows}


def relative_time(rows: Records, records: Records, key: str) -> float | None:
    """A time of the fastest seed, relative to the fastest of the first full-size method; None where it is not known."""
    full = [record for record in records if record["kind"] == REFERENCE]
    time = fastest(rows, key)
    reference = fastest([record for record in full if record["method"] == full[0]["method"]], "seconds")
    return None if time is None or reference is None else time / reference


def fastest(rows: Records, key: str = "seconds") -> float | None:
    """Least time of a seed; runs that were interrupted and resumed do not count."""
    return min((row[key] for row in rows if not row.get("resumed")), default=None)


def _task_table(task: TaskSuite, records: Records) -> str:
    found = by_method(task, records)
    if not found:
        return "No run is finished yet."
    metric = next(iter(found.values()))[0]["metric"]
    lines = [
        f"| | test {metric.replace('_', ' ')} | test loss | states per layer | training time, s | / full: training "
        "| in all | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        times = [fastest(rows), *(relative_time(rows, records, key) for key in ("seconds", "seconds_needed"))]
        cells = [
            name,
            spread([scaled(row) for row in rows], _digits(metric)),
            spread([row["loss"] for row in rows], 4),
            f"{fmean(fmean(row['sizes']) for row in rows):.1f}",
            *("" if value is None else f"{value:.{digits}f}" for value, digits in zip(times, (1, 2, 2), strict=True)),
            str(len(rows)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def scaled(record: dict[str, Any]) -> float:
    """The score of a run, accuracies in percent."""
    return 100 * record["score"] if record["metric"] == "accuracy" else record["score"]


def _digits(metric: str) -> int:
    return 2 if metric == "accuracy" else 4


def spread(values: Iterable[float], digits: int) -> str:
    """mean ± standard deviation; the mean alone where there is one value."""
    values = list(values)
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {stdev(values):.{digits}f}"


def _ablation(task: TaskSuite, records: Records) -> str:
    """The training loss right before the first cut and right after the last, and the test loss at the end."""
    found = {name: [row for row in rows if row["cuts"]] for name, rows in by_method(task, records).items()}
    found = {name: rows for name, rows in found.items() if rows}
    if not found:
        return ""
    lines = [
        "Loss on training batches around the cuts:",
        "",
        "| | cuts | before the first | sum of rises at cuts | after the last | test loss at the end |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        rises = [sum(cut["loss_after"] - cut["loss_before"] for cut in row["cuts"]) for row in rows]
        lines.append(
            f"| {name} | {fmean(len(row['cuts']) for row in rows):.1f} | "
            f"{spread([row['cuts'][0]['loss_before'] for row in rows], 3)} | {spread(rises, 3)} | "
            f"{spread([row['cuts'][-1]['loss_after'] for row in rows], 3)} | "
            f"{spread([row['loss'] for row in rows], 3)} |"
        )
    return "\n".join(lines)


def _stability(records: Records) -> str:
    measured = [entry for record in records if "stability" in record for entry in record["stability"]]
    return f"Ranking of states, against that at the end:\n\n{stability_table(measured)}" if measured else ""


def environment_lines(records: Records) -> str:
    """Hardware and versions of the runs, each combination once."""
    lines = []
    for record in records:
        environment = record["environment"]
        versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
        lines.append(f"{hardware_line(environment['hardware'])}; {versions}.")
    return "Measured on: " + " ".join(dict.fromkeys(lines)) if lines else ""
