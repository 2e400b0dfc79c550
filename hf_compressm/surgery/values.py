"""Value channels of matrix-valued states: which mixers have them, what they may be cut to, and the plan of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import nn

from ..reduction import SizeConstraints
from .adapters.base import MixerSite, find_mixers
from .layer_plans import CompressionPlan, CutSettings, LayerPlan, reduced
from .parameters import check_parameters, outside_inference_mode
from .peft.tuners import is_tuner
from .processes import team_for
from .refit import Recording
from .statistics import Batches, measure_mixers
from .team import Look, Team


def value_sites(model: nn.Module) -> list[MixerSite]:
    """The mixers of a model with the adapters of their value channels, in model order.

    Raises:
        ValueError: if a mixer has no value channels of a size of their own.
    """
    sites = []
    for site in find_mixers(model):
        if site.adapter.values is None:
            raise ValueError(
                f"value_size is for layers with a gated delta rule, whose values have a size of their own; {site.name} "
                f"is a {type(site.mixer).__name__}, in which there is none to cut. Leave value_size out."
            )
        sites.append(dataclasses.replace(site, adapter=site.adapter.values))
    return sites


def check_value_size(model: nn.Module, size: int, constraints: SizeConstraints, optimizer: Any = None) -> None:
    """Raise if the value channels of a model cannot be cut to a size.

    Args:
        model: the model.
        size: number of value channels of each value head to keep.
        constraints: `multiple_of` is read; None stands for what the mixers prefer.
        optimizer: the model's optimizer, or None.

    Raises:
        ValueError: on mixers without value channels, a size out of range or no multiple of what is asked for; LoRA on
            the layer that reads values out; and as `check_parameters`.
        TypeError: as `check_parameters`.
    """
    sites = value_sites(model)
    present = min(site.state_size for site in sites)
    if not 1 <= size <= present:
        raise ValueError(
            f"value_size must lie between 1 and the present number of value channels {present}; got {size}"
        )
    block = constraints.multiple_of or math.lcm(*(site.adapter.size_multiple(site.mixer) for site in sites))
    if size % block and size != present:
        raise ValueError(
            f"value_size must be a multiple of {block}; got {size}. Kernels for GPUs work on blocks of 16 channels; if "
            "yours take other sizes, set multiple_of=1 (--multiple-of 1), which then holds for state sizes too."
        )
    check_parameters(model, optimizer, sites)
    for site in sites:
        site.adapter.check_multiple(site.mixer, size)
        if optimizer is not None and (frozen := site.frozen_read_out) is not None:
            raise ValueError(
                f"{site.name}.{frozen} is frozen (requires_grad=False), and value channels are its columns. Unfreeze "
                "it, or compress the model before or after training."
            )
        if site.adapter.read_out is not None and is_tuner(site.mixer.get_submodule(site.adapter.read_out)):
            raise ValueError(
                f"{site.name}.{site.adapter.read_out} has an adapter on it, whose inputs are the value channels, so it "
                "cannot follow their cut. Merge the adapter before the cut (merge_and_unload), or leave the layer out "
                "of target_modules."
            )


@outside_inference_mode
def plan_values(
    model: nn.Module, size: int, calibration: Batches | None, settings: CutSettings, team: Team | None = None
) -> CompressionPlan:
    """Measure the value heads of a model and compute its parameters with fewer value channels, changing nothing.

    Args:
        model: a model that `check_value_size` accepts.
        size: number of value channels of each value head to keep.
        calibration: batches of the model's inputs; see `gather_statistics`.
        settings: selection, refit and ops; the rest is about states.
        team: processes that plan together; None for this one alone, or all if they share the model (FSDP2).

    Raises:
        ValueError, TypeError: calibration batches that are missing, empty, too short or of the wrong fields.
        ReductionError: if a layer cannot be measured or reduced; the message names it.
    """
    team, sites, recordings = team or team_for(model), value_sites(model), dict[str, Recording]()
    recorded = recordings if settings.refit_steps else None
    statistics = team.gather(model, calibration, recorded, settings.fast_ops, sites)

    def decide(look: Look) -> CompressionPlan:
        layers = []
        measured = measure_mixers(model, statistics, sites, look)
        for site in sites:
            found, old = measured[site.name], site.state_size
            reduction = reduced(look(site), found, size, settings, recordings) if size < old else None
            layers.append(LayerPlan(site.name, old, size, found.spectrum(), reduction))
        return CompressionPlan(layers, {"policy": "value_size", "value_size": size}, event="value_cut")

    return team.decide(model, decide)
