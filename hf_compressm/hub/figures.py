"""The charts and tables of a run: what a report shows, and a card in part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .record import Layer, RunRecord, Spectrum
from .svg import COLOURS, Axis, Chart, number, stack

MOST_LINES = 6
"""Lines of a chart that are told apart by colour; more are drawn thin, with their mean."""
MOST_SPECTRA = 6
MOST_POINTS = 400
"""Points of a drawn line, and rows of its table where it is long."""


@dataclass(frozen=True)
class Table:
    """A table: its caption, its columns and its rows of text."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Figure:
    """A chart and the numbers behind it."""

    chart: Chart
    table: Table

    @property
    def svg(self) -> str:
        """The chart for a page that has the theme's colours."""
        return self.chart.render()


def sizes_figure(run: RunRecord) -> Figure | None:
    """State sizes over optimizer steps, layer by layer; None where they are unknown."""
    layers, end = run.layers(), max(run.step, 1)
    if not layers:
        return None
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
        chart.line(points, index % COLOURS + 1 if few else 1, label, steps=True, style="" if few else "thin")
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


def spectrum_figure(layer: Layer, index: int) -> Figure | None:
    """Hankel singular values of one layer, one line per measurement, dashed when early; None if never measured."""
    if not layer.spectra:
        return None
    shown = thin(layer.spectra, MOST_SPECTRA)
    first, last = layer.spectra[0], layer.spectra[-1]
    chart = Chart(
        ident=f"spectrum-{index}",
        title=f"Hankel singular values of layer {index}, {layer.name}",
        description=(
            f"{len(layer.spectra)} measurements, from step {first.step} with {first.states} states to step "
            f"{last.step} with {last.states}. At the last the largest is {number(last.values[0])}, the smallest "
            f"{number(last.values[-1])}."
        ),
        x=Axis.upto(max(spectrum.states for spectrum in layer.spectra)),
        y=_spectral_axis(layer.spectra),
        x_label="rank of the state",
        y_label="singular value",
    )
    for place, spectrum in enumerate(shown):
        age = 3 - min(3, (len(shown) - 1 - place))
        label = f"step {number(spectrum.step)}"
        points = list(zip(spectrum.ranks, spectrum.values, strict=True))
        chart.line(points, 1 if place < len(shown) - 1 else 2, label, style=f"t{age}" if age < 3 else "")
    rows = [_spectrum_row(spectrum) for spectrum in layer.spectra]
    columns = ["Step", "States", "Kept", "Sum", "Largest", "Smallest kept", "Largest removed", "Sum removed"]
    return Figure(chart, Table(f"Measurements of layer {index}", columns, rows))


def spectra_overview(run: RunRecord) -> Chart | None:
    """The latest spectrum of every layer in one chart, with a dot where it was cut; None if none was measured."""
    latest = {index: layer.spectra[-1] for index, layer in enumerate(run.layers()) if layer.spectra}
    if not latest:
        return None
    chart = spectra_chart(latest, "Hankel singular values of each layer at the last measurement")
    for place, spectrum in enumerate(latest.values()):
        if spectrum.kept in spectrum.ranks and spectrum.kept < spectrum.states:
            colour = place % COLOURS + 1 if len(latest) <= MOST_LINES else 1
            chart.dots([(spectrum.kept, spectrum.values[spectrum.ranks.index(spectrum.kept)])], colour)
    return chart


def spectra_chart(spectra: Mapping[int, Spectrum], title: str, coloured: bool = True) -> Chart:
    """A chart of one spectrum per layer, by the layer's index; each in its own colour if they are few and may be."""
    chart = Chart(
        ident="spectra",
        title=title,
        description=" ".join(
            f"Layer {index}: {s.states} states, from {number(s.values[0])} down to {number(s.values[-1])}."
            for index, s in spectra.items()
        ),
        x=Axis.upto(max(spectrum.states for spectrum in spectra.values())),
        y=_spectral_axis(list(spectra.values())),
        x_label="rank of the state",
        y_label="singular value",
    )
    few = coloured and len(spectra) <= MOST_LINES
    for place, (index, spectrum) in enumerate(spectra.items()):
        points = list(zip(spectrum.ranks, spectrum.values, strict=True))
        label = f"layer {index}" if few else ("each layer" if place == 0 else None)
        chart.line(points, place % COLOURS + 1 if few else 1, label, style="" if few else "thin")
    return chart


def tolerances_plot(spectra: Sequence[Sequence[float]], kept: Mapping[str, Sequence[int]]) -> str:
    """A file with the spectra of a model's layers, and what each would keep.

    Args:
        spectra: descending singular values of each layer.
        kept: label of a tolerance -> states that each layer would keep.
    """
    whole = {i: Spectrum(0, len(v), sum(v), list(range(1, len(v) + 1)), list(v)) for i, v in enumerate(spectra)}
    chart = spectra_chart(whole, "Hankel singular values, with a dot at the last state kept", coloured=False)
    sizes = Chart(
        ident="kept",
        title="States that each layer would keep",
        description=" ".join(f"{label}: {', '.join(map(str, orders))}." for label, orders in kept.items()),
        x=Axis.upto(len(spectra) - 1),
        y=Axis.around([float(len(values)) for values in spectra], zero=True),
        x_label="layer",
        y_label="states kept",
    )
    for place, (label, orders) in enumerate(kept.items()):
        colour = (place + 1) % COLOURS + 1
        chart.dots([(n, values[n - 1]) for n, values in zip(orders, spectra, strict=True) if n], colour, label)
        sizes.line(list(enumerate(map(float, orders))), colour, label, dots=True)
    sizes.line(list(enumerate(float(len(values)) for values in spectra)), 1, "now", style="thin")
    return stack([chart, sizes])


def metric_figure(run: RunRecord, evaluation: str) -> Figure | None:
    """A metric of the evaluations over steps with the cuts marked, and for the loss also that of training."""
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
        x=Axis.upto(run.step),
        y=Axis.around(values, log=log),
        x_label="optimizer step",
        y_label=name + (" (logarithmic)" if log else ""),
    )
    chart.line(thin(trained, MOST_POINTS), 1, "training", style="dashed")
    chart.line(thin(evaluated, MOST_POINTS), 3, "evaluation", dots=len(evaluated) <= 60)
    _mark_cuts(chart, run)
    by_step = {step: ["–", number(value, 4)] for step, value in evaluated}
    for step, value in trained:
        by_step[step] = [number(value, 4), by_step.get(step, ["–", "–"])[1]]
    rows = [[number(step), *by_step[step]] for step in thin(sorted(by_step), MOST_POINTS // 2)]
    return Figure(chart, Table(f"{name.capitalize()} by step", ["Step", "Training", "Evaluation"], rows))


def speed_figure(run: RunRecord) -> Figure | None:
    """Optimizer steps per second between the cuts; None if it was not measured."""
    segments = run.speed
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
    """How far successive rankings of the states agreed; None if it was not recorded."""
    scores = run.series("compression/rank_stability")
    if not scores:
        return None
    threshold = run.settings.get("stability_threshold")
    chart = Chart(
        ident="stability",
        title="Rank stability over training steps",
        description=f"Smallest over the layers: {number(scores[0][1])} at step {scores[0][0]}, {number(scores[-1][1])} "
        f"at step {scores[-1][0]}" + (f"; settled from {number(threshold)} on." if threshold else "."),
        x=Axis.upto(max(run.step, scores[-1][0])),
        y=Axis(0, 1),
        x_label="optimizer step",
        y_label="agreement with the measurement before",
    )
    chart.line(scores, 1, "rank stability", dots=True)
    if threshold:
        chart.line([(0, threshold), (max(run.step, scores[-1][0]), threshold)], 2, "threshold", style="dashed")
    _mark_cuts(chart, run)
    rows = [[number(step), number(score)] for step, score in scores]
    return Figure(chart, Table("Rank stability by step", ["Step", "Agreement"], rows))


def cuts_table(run: RunRecord) -> Table:
    """What was promised and what was measured at every cut; columns that nothing filled are left out."""
    columns = ["Step", "Mean states", "Sum removed", "Error bound", "Residual", "Loss before", "Loss after"]
    columns += ["Change", "Evaluation before", "Evaluation after", "Undone at step"]
    rows = []
    for cut in run.cuts:
        step, layers = cut["step"] or 0, cut["layers"]
        before, after = run.at(step, "compression/loss_before"), run.at(step, "compression/loss_after")
        change = None if before is None or after is None else after - before
        undone = run.undone.get(step)
        row = [number(step), f"{_mean(layers, 'old_size')} → {_mean(layers, 'new_size')}", _removed(layers)]
        row += [_largest(layers, "bound"), _largest(layers, "residual"), *map(_text, (before, after))]
        row += ["" if change is None else f"{change:+.4f}", *map(_text, run.around(step, "eval_loss"))]
        rows.append([*row, number(undone["step"]) if undone else ""])
    kept = [index for index in range(len(columns)) if index == 0 or any(row[index] for row in rows)]
    rows = [[row[index] or "–" for index in kept] for row in rows]
    return Table("Every cut: largest bound or residual of a layer, and losses", [columns[i] for i in kept], rows)


def layers_table(cut: dict[str, Any]) -> Table:
    """One cut, layer by layer."""
    rows = [
        [
            layer["name"],
            str(layer["old_size"]),
            str(layer["new_size"]),
            _removed([layer]),
            _text(layer.get("bound")) or "–",
            _text(layer.get("residual")) or "–",
        ]
        for layer in cut["layers"]
    ]
    columns = ["Layer", "States before", "After", "Sum removed", "Error bound", "Residual"]
    return Table(f"The cut at step {cut['step'] or 0}, layer by layer", columns, rows)


def thin(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def _spectral_axis(spectra: Sequence[Spectrum]) -> Axis:
    """Logarithmic, down to 1e-8 of the largest value: what is below is rounding."""
    top = max(spectrum.values[0] for spectrum in spectra)
    return Axis.around([max(v, top * 1e-8) for spectrum in spectra for v in spectrum.values if v > 0], log=True)


def _mark_cuts(chart: Chart, run: RunRecord) -> None:
    for cut in run.cuts:
        step = cut["step"] or 0
        undone = step in run.undone
        chart.mark(step, "cut, later undone" if undone else "cut", undone=undone)


def _mean_sizes(layers: Sequence[Layer]) -> list[tuple[int, float]]:
    columns = zip(*(layer.sizes for layer in layers), strict=True)
    return [(column[0][0], sum(size for _, size in column) / len(column)) for column in columns]


def _spectrum_row(spectrum: Spectrum) -> list[str]:
    row = [number(spectrum.step), str(spectrum.states)]
    if spectrum.kept is None:
        return [*row, "all", number(spectrum.total), number(spectrum.values[0]), number(spectrum.values[-1]), "–", "–"]
    kept, removed = spectrum.values[: spectrum.kept], spectrum.values[spectrum.kept :]
    row += [str(spectrum.kept), number(spectrum.total), number(spectrum.values[0]), number(kept[-1])]
    return [*row, *([number(removed[0]), f"{sum(removed) / spectrum.total:.1%}"] if removed else ["–", "–"])]


def _mean(layers: Sequence[dict[str, Any]], key: str) -> str:
    return number(sum(layer[key] for layer in layers) / len(layers))


def _removed(layers: Sequence[dict[str, Any]]) -> str:
    total = sum(sum(layer["singular_values"]) for layer in layers)
    gone = sum(sum(layer["singular_values"][layer["new_size"] :]) for layer in layers)
    return f"{gone / total:.1%}" if total else ""


def _largest(layers: Sequence[dict[str, Any]], key: str) -> str:
    values = [layer[key] for layer in layers if layer.get(key) is not None]
    return number(max(values)) if values else ""


def _text(value: float | None) -> str:
    return "" if value is None else number(value, 4)
