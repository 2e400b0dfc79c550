"""Measure a saved model and tell what cuts at several tolerances would keep, without changing anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..models.saved import load_model, load_tokenizer
from ..reduction import energy_orders, numerical_rank
from ..report.text_tables import aligned_table
from ..surgery import measure_model
from .arguments import DataSource
from .data_source import draw_calibration, load_data
from .early_checks import check_saved_model, check_source


@dataclass(frozen=True)
class InspectedLayer:
    """One layer of an inspected model.

    Attributes:
        name: in the model.
        states: present number.
        rank: number of states that exact arithmetic needs.
        singular_values: descending.
        kept: tolerance, as text -> states that a cut at it would keep.
    """

    name: str
    states: int
    rank: int
    singular_values: list[float]
    kept: dict[str, int]


@dataclass(frozen=True)
class Inspection:
    """A model's layers, and the tolerances that were tried."""

    model: str
    architecture: str
    tau: list[float]
    layers: list[InspectedLayer]

    def as_record(self) -> dict[str, Any]:
        """Return the content, ready for JSON."""
        return asdict(self)

    def kept(self) -> dict[str, list[int]]:
        """Return label of a tolerance -> states that each layer would keep."""
        return {f"tau {value:g}": [layer.kept[f"{value:g}"] for layer in self.layers] for value in self.tau}

    def table(self) -> str:
        """Return a table for a terminal with one line per layer."""
        kept = self.kept()
        rows = [
            [layer.name, layer.states, layer.rank, f"{layer.singular_values[0]:.4g}", *orders]
            for layer, *orders in zip(self.layers, *kept.values(), strict=True)
        ]
        return aligned_table(["layer", "states", "rank", "largest", *kept], rows)


def inspect_model(
    name: str, tau: Sequence[float], source: DataSource | None, device: str = "auto", fast_ops: bool = True
) -> Inspection:
    """Measure a saved model.

    Args:
        name: folder or name on the hub.
        tau: tolerances to try, each in (0, 1).
        source: data for layers that are ranked on data; None if there is none.
        device: as torch names it, or "auto".
        fast_ops: let stock mixers run by this package's ops meanwhile.

    Raises:
        ValueError: a tolerance out of range, data that are missing or for another model, no such device or layer.
        OSError: if there is no such model, or the data cannot be read.
    """
    if outside := [value for value in tau if not 0 < value < 1]:
        raise ValueError(f"tau must lie strictly between 0 and 1; got {outside[0]}")
    check_source(source)
    check_saved_model(name)
    model = load_model(name, device)
    task = None if source is None else load_data(source, model, load_tokenizer(name))
    measured = measure_model(model, draw_calibration(model, source, task), fast_ops=fast_ops)
    spectra = [measurement.spectrum() for measurement in measured.values()]
    orders = {f"{value:g}": energy_orders(spectra, value) for value in tau}
    layers = [
        InspectedLayer(
            name=layer,
            states=len(spectrum),
            rank=numerical_rank(spectrum),
            singular_values=[float(f"{value:.6g}") for value in spectrum.tolist()],
            kept={label: kept[index] for label, kept in orders.items()},
        )
        for index, (layer, spectrum) in enumerate(zip(measured, spectra, strict=True))
    ]
    return Inspection(name, model.config.architectures[0], list(tau), layers)
