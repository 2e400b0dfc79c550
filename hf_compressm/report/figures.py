"""Draw the charts of a run over its training steps, each with a table of its numbers."""

from __future__ import annotations

from collections.abc import Sequence

from ..surgery import record_keys as keys
from .record import Layer, RunRecord
from .spectra import MOST_LINES
from .speed import timed
from .svg import COLOURS, Axis, Chart, number
from .tables import Figure, Table, thin

MOST_BARS = 8
"""Layers with bars of their own; of more, the mean is drawn."""
MOST_POINTS = 400
"""Points of a line at most; a table has half as many rows."""


def sizes_figure(run: RunRecord) -> Figure | None:
    """Draw the state sizes of every layer over optimizer steps. Return None if they are unknown."""
    layers, end = run.layers(), max(run.end, 1)
    if not layers:
        return None
    if run.cut_after_training and run.cut_sizes and not run.trained:
        return _before_and_after(run)
    mean = _mean_sizes(layers)
    before, after = mean[0][1], mean[-1][1]
    change = (
        f"Mean states per layer go from {number(before)} to {number(after)}."
        if len(mean) > 1
        else f"No layer's size changed: {number(before)} states per layer on average."
    )
    values = [float(size) for layer in layers for _, size in layer.sizes]
    chart = Chart(
        ident="sizes",
        title="State sizes over training steps",
        description=f"{change} {len(layers)} {'layer' if len(layers) == 1 else 'layers'}, {len(run.cuts)} cuts.",
        x=Axis.upto(end),
        y=Axis.around(values, zero=True),
        x_label="optimizer step",
        y_label="states",
    )
    few = len(layers) <= MOST_LINES
    for index, layer in enumerate(layers):
        points = [*layer.sizes, (end, layer.sizes[-1][1])]
        label = f"layer {index}" if few else ("each layer" if index == 0 else None)
        equal = sum(layer.sizes == other.sizes for other in layers[:index])
        style = f"shared{min(equal, 2)}" if equal else ""
        chart.line(points, index % COLOURS + 1 if few else 1, label, steps=True, style=style if few else "thin")
    if not few:
        chart.line([*mean, (end, after)], 2, "mean", steps=True)
    _mark_cuts(chart, run)
    steps = sorted({step for layer in layers for step, _ in layer.sizes})
    sizes = [dict(layer.sizes) for layer in layers]
    rows, row = [], [0] * len(layers)
    for step in steps:
        row = [size.get(step, present) for size, present in zip(sizes, row, strict=True)]
        rows.append([number(step), number(sum(row) / len(row)), *map(str, row)])
    columns = ["Step", "Mean", *(f"Layer {index}" for index in range(len(layers)))]
    return Figure(chart, Table("States of each layer from each step on", columns, rows))


def _before_and_after(run: RunRecord) -> Figure:
    """States of every layer before and after a cut of a trained model, as bars."""
    assert run.cut_sizes is not None
    names, pairs = [layer.name for layer in run.layers()], list(zip(*run.cut_sizes, strict=True))
    before, after = (number(sum(sizes) / len(sizes)) for sizes in run.cut_sizes)
    shown = pairs if len(pairs) <= MOST_BARS else [tuple(sum(sizes) / len(sizes) for sizes in run.cut_sizes)]
    chart = Chart(
        ident="sizes",
        title="State sizes before and after the cut",
        description=f"Mean states per layer: {before} before the cut, {after} after it, in {len(pairs)} layers.",
        x=Axis(0, len(shown)),
        y=Axis.around([float(size) for pair in shown for size in pair], zero=True),
        x_label="layer" if shown is pairs else "mean over the layers",
        y_label="states",
        bars=True,
    )
    for place, (old, new) in enumerate(shown):
        chart.bar(place + 0.12, place + 0.5, old, colour=1)
        chart.bar(place + 0.5, place + 0.88, new, str(place) if shown is pairs else "", colour=2)
    chart.key(1, "before")
    chart.key(2, "after")
    rows = [[str(i), *map(str, pair), f"{pair[1] / pair[0]:.0%}"] for i, pair in enumerate(pairs)]
    rows = [[f"{row[0]}: {name}", *row[1:]] for row, name in zip(rows, names, strict=False)] or rows
    return Figure(chart, Table("States of each layer", ["Layer", "Before", "After", "Kept"], rows))


def metric_figure(run: RunRecord, evaluation: str) -> Figure | None:
    """Draw a metric of the evaluations over steps, with the cuts marked; for `eval_loss` also the training loss.

    Return None if the log has neither.
    """
    evaluated = run.series(evaluation)
    trained = run.series("loss") if evaluation == "eval_loss" else []
    if not evaluated and not trained:
        return None
    name = evaluation.removeprefix("eval_").replace("_", " ")
    values = [value for _, value in [*evaluated, *trained]]
    ends = [f"{label} from {number(s[0][1])} at step {s[0][0]} to {number(s[-1][1])} at step {s[-1][0]}" for label, s in
            (("training", trained), ("evaluation", evaluated)) if s]  # fmt: skip
    log = min(values) > 0 and max(values) / min(values) > 30
    chart = Chart(
        ident=f"metric-{evaluation.replace('_', '-')}",
        title=f"{name.capitalize()} over training steps",
        description=f"{name.capitalize()}: {'; '.join(ends)}. {len(run.cuts)} cuts are marked.",
        x=Axis.upto(run.end),
        y=Axis.around(values, log=log),
        x_label="optimizer step",
        y_label=name + (" (logarithmic)" if log else ""),
    )
    chart.line(thin(trained, MOST_POINTS), 1, "training", style="dashed")
    chart.line(thin(evaluated, MOST_POINTS), 3, "evaluation", dots=len(evaluated) <= 60)
    _mark_cuts(chart, run)
    by_step = {step: ["", number(value, 4)] for step, value in evaluated}
    for step, value in trained:
        by_step[step] = [number(value, 4), by_step.get(step, ["", ""])[1]]
    rows = [[number(step), *by_step[step]] for step in thin(sorted(by_step), MOST_POINTS // 2)]
    return Figure(chart, Table.filled(f"{name.capitalize()} by step", ["Step", "Training", "Evaluation"], rows))


def speed_figure(run: RunRecord) -> Figure | None:
    """Draw the optimizer steps per second between the cuts, where enough steps were timed. Return None if nowhere."""
    segments = timed(run.speed)
    if not segments:
        return None
    speeds = [segment["steps_per_second"] for segment in segments]
    chart = Chart(
        ident="speed",
        title="Optimizer steps per second between cuts",
        description=f"From {number(speeds[0])} steps per second at {number(segments[0]['mean_state_size'])} states "
        f"per layer to {number(speeds[-1])} at {number(segments[-1]['mean_state_size'])}: {speeds[-1] / speeds[0]:.2f} "
        "times.",
        x=Axis(0, len(segments)),
        y=Axis.around(speeds, zero=True),
        x_label="mean states per layer, from cut to cut",
        y_label="steps per second",
        bars=True,
    )
    for place, segment in enumerate(segments):
        chart.bar(place + 0.15, place + 0.85, segment["steps_per_second"], number(segment["mean_state_size"]))
    rows = [
        [
            number(segment["first_step"]),
            number(segment["mean_state_size"]),
            number(segment["steps_per_second"]),
            f"{segment['steps_per_second'] / speeds[0]:.2f}",
        ]
        for segment in segments
    ]
    columns = ["From step", "Mean states", "Steps per second", "Relative to the first"]
    return Figure(chart, Table("Speed between cuts", columns, rows))


def stability_figure(run: RunRecord) -> Figure | None:
    """Draw the agreement of successive rankings of the states, in [0, 1]. Return None if it was not recorded."""
    scores = run.series(keys.RANK_STABILITY)
    if not scores:
        return None
    threshold = run.settings.get("stability_threshold")
    chart = Chart(
        ident="stability",
        title="Rank stability over training steps",
        description=f"Smallest over the layers: {number(scores[0][1])} at step {scores[0][0]}, {number(scores[-1][1])} "
        f"at step {scores[-1][0]}" + (f"; settled from {number(threshold)} on." if threshold else "."),
        x=Axis.upto(run.end),
        y=Axis(0, 1),
        x_label="optimizer step",
        y_label="agreement with the measurement before",
    )
    chart.line(scores, 1, "rank stability", dots=True)
    if threshold:
        chart.line([(0, threshold), (run.end, threshold)], 2, "threshold", style="dashed")
    _mark_cuts(chart, run)
    rows = [[number(step), number(score)] for step, score in scores]
    return Figure(chart, Table("Rank stability by step", ["Step", "Agreement"], rows))


def _mark_cuts(chart: Chart, run: RunRecord) -> None:
    for cut in run.cuts:
        step = run.place(cut)
        undone = step in run.undone
        chart.mark(step, "cut, later undone" if undone else "cut", undone=undone)


def _mean_sizes(layers: Sequence[Layer]) -> list[tuple[int, float]]:
    columns = zip(*(layer.sizes for layer in layers), strict=True)
    return [(column[0][0], sum(size for _, size in column) / len(column)) for column in columns]
