"""What a cut will do, layer by layer: plans, the settings of a cut, and the reduction of a single mixer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..reduction import Selection, SizeConstraints
from .adapters.base import MixerReduction, MixerSite, ReductionError
from .policies import Energy, Policy
from .refit import Recording, refit


@dataclass(frozen=True)
class LayerPlan:
    """The planned change of one mixer.

    Attributes:
        name: the mixer's name in the model.
        old_size, new_size: number of states, or value channels, before and after; equal where nothing is cut.
        singular_values: float64 (old_size,), descending.
        reduction: new parameters and gradient maps, or None where nothing is cut.
    """

    name: str
    old_size: int
    new_size: int
    singular_values: Tensor
    reduction: MixerReduction | None = None


@dataclass(frozen=True)
class CompressionPlan:
    """New parameters for every mixer of a model, computed but not yet applied.

    Attributes:
        layers: one entry per mixer, in model order.
        policy: JSON-ready description of how the orders were chosen.
        event: what the sizes are: "cut" of states, or "value_cut" of value channels.
    """

    layers: list[LayerPlan]
    policy: dict[str, Any]
    event: Literal["cut", "value_cut"] = "cut"

    @property
    def cuts(self) -> bool:
        """Whether any layer loses states."""
        return any(layer.reduction is not None for layer in self.layers)

    def record(self, step: int | None) -> dict[str, Any]:
        """JSON-ready record of the cut, without times; configs keep all of it but singular values."""
        return {
            "event": self.event,
            "step": step,
            **self.policy,
            "layers": [
                {
                    "name": layer.name,
                    "old_size": layer.old_size,
                    "new_size": layer.new_size,
                    "bound": None if layer.reduction is None else layer.reduction.bound,
                    "residual": None if layer.reduction is None else layer.reduction.residual,
                    "singular_values": [float(f"{value:.6g}") for value in layer.singular_values.tolist()],
                }
                for layer in self.layers
            ],
        }


@dataclass(frozen=True)
class CutSettings:
    """How much is cut, and how.

    Attributes:
        policy: how many states each layer keeps.
        constraints: minimum size, multiples, uniformity, smallest worthwhile change.
        selection: which balanced states stay; "smallest" and "random" are controls for experiments.
        generator: CPU generator for selection "random".
        refit_steps: optimizer steps for which each reduced selective layer is refitted, >= 0; see `refit`.
        fast_ops: let stock mixers run by this package's ops meanwhile, where that is exact.
    """

    policy: Policy = field(default_factory=Energy)
    constraints: SizeConstraints = field(default_factory=SizeConstraints)
    selection: Selection = "largest"
    generator: torch.Generator | None = None
    refit_steps: int = 0
    fast_ops: bool = True


def reduced(
    site: MixerSite, measurement: Any, order: int, settings: CutSettings, recordings: Mapping[str, Recording]
) -> MixerReduction:
    """The mixer's parameters at a smaller order, refitted if there is a recording of its outputs.

    Args:
        site: the mixer, and the adapter that cuts it.
        measurement: what the adapter measured.
        order: the new size, below the present one.
        settings: selection and refit.
        recordings: by mixer name.

    Raises:
        ReductionError: naming the mixer.
    """
    plain = site.without_lora()
    try:
        reduction = plain.adapter.reduce(plain.mixer, measurement, order, settings.selection, settings.generator)
        if site.name in recordings:
            reduction = refit(plain, reduction, recordings[site.name], settings.refit_steps, settings.fast_ops)
        return site.with_lora(reduction)
    except ReductionError as error:
        raise ReductionError(f"{site.name}: {error}") from error
