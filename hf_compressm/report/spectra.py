"""Draw Hankel singular values: of a run's layers over time, and of a model's layers at several tolerances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .record import Layer, RunRecord, Spectrum
from .svg import COLOURS, Axis, Chart, number, stack
from .tables import Figure, Table, thin

MOST_LINES = 6
"""Lines of a chart that are told apart by colour; more are drawn thin."""
MOST_SPECTRA = 6


def spectrum_figure(layer: Layer, index: int) -> Figure | None:
    """Draw the Hankel singular values of one layer, one line per measurement; early ones are dashed.

    Return None if the layer was never measured.
    """
    if not layer.spectra:
        return None
    shown = thin(layer.spectra, MOST_SPECTRA)
    first, last = layer.spectra[0], layer.spectra[-1]
    chart = Chart(
        ident=f"spectrum-{index}",
        title=f"Hankel singular values of layer {index}, {layer.name}",
        description=(
            f"Measurements: {len(layer.spectra)}; the first {first.moment} of {first.states} states, the last "
            f"{last.moment} of {last.states}. At the last the largest is {number(last.values[0])}, the smallest "
            f"{number(last.values[-1])}."
        ),
        x=Axis.upto(max(spectrum.states for spectrum in layer.spectra)),
        y=_spectral_axis(layer.spectra),
        x_label="rank of the state",
        y_label="singular value",
    )
    for place, spectrum in enumerate(shown):
        age = 3 - min(3, (len(shown) - 1 - place))
        points = list(zip(spectrum.ranks, spectrum.values, strict=True))
        moment = spectrum.moment.removeprefix("at ")
        chart.line(points, 1 if place < len(shown) - 1 else 2, moment, style=f"t{age}" if age < 3 else "")
    rows = [_spectrum_row(spectrum) for spectrum in layer.spectra]
    columns = ["Step", "States", "Kept", "Sum", "Largest", "Smallest kept", "Largest removed", "Sum removed"]
    return Figure(chart, Table.filled(f"Measurements of layer {index}", columns, rows))


def spectra_overview(run: RunRecord) -> Chart | None:
    """Draw the latest spectrum of every layer in one chart, with a dot at the last state that was kept.

    Return None if no layer was measured.
    """
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
    """Draw one spectrum per layer.

    Args:
        spectra: index of the layer -> its spectrum.
        title: of the chart.
        coloured: whether up to `MOST_LINES` layers get colours of their own.
    """
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
    """Return an SVG file that shows the spectra of a model's layers, and how many states each would keep.

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


def _spectral_axis(spectra: Sequence[Spectrum]) -> Axis:
    """Logarithmic, down to 1e-8 of the largest value: what is below is rounding."""
    top = max(spectrum.values[0] for spectrum in spectra)
    return Axis.around([max(v, top * 1e-8) for spectrum in spectra for v in spectrum.values if v > 0], log=True)


def _spectrum_row(spectrum: Spectrum) -> list[str]:
    row = [spectrum.moment.removeprefix("at step "), str(spectrum.states)]
    if spectrum.kept is None:
        return [*row, "all", number(spectrum.total), number(spectrum.values[0]), number(spectrum.values[-1]), "", ""]
    kept, removed = spectrum.values[: spectrum.kept], spectrum.values[spectrum.kept :]
    row += [str(spectrum.kept), number(spectrum.total), number(spectrum.values[0]), number(kept[-1])]
    return [*row, *([number(removed[0]), f"{sum(removed) / spectrum.total:.1%}"] if removed else ["", ""])]
