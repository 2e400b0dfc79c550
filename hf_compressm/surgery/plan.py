"""A cut of a whole model: `make_plan` measures and decides, `apply_plan` changes model and optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..progress import with_progress
from ..reduction import Selection, SizeConstraints
from .adapters.base import MixerReduction, MixerSite, ReductionError, find_mixers, state_sizes
from .gradients import carried_gradients, warn_of_added
from .history import append_history, original_sizes
from .optimizer import State, carried_state, unwrap_optimizer
from .owners import with_ties, write_sizes
from .parameters import check_parameters, check_replaceable, outside_inference_mode
from .policies import Energy, Policy, Target, describe_policy
from .refit import STEPS, Recording, refit
from .resize import replace_parameters
from .statistics import Batches, measure_mixers
from .team import Team


@dataclass(frozen=True)
class LayerPlan:
    """The planned change of one mixer.

    Attributes:
        name: the mixer's name in the model.
        old_size, new_size: number of states before and after; equal where nothing is cut.
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
    """

    layers: list[LayerPlan]
    policy: dict[str, Any]

    @property
    def cuts(self) -> bool:
        """Whether any layer loses states."""
        return any(layer.reduction is not None for layer in self.layers)

    def record(self, step: int | None) -> dict[str, Any]:
        """JSON-ready record of the cut, as it stands in `config.compression_history`; no times, so equal runs agree."""
        return {
            "event": "cut",
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


@outside_inference_mode
def make_plan(
    model: nn.Module,
    *,
    settings: CutSettings = CutSettings(),
    calibration: Batches | None = None,
    attempts_left: int = 1,
    team: Team | None = None,
) -> CompressionPlan:
    """Measure a model and compute the reduced parameters of every layer that should shrink, changing nothing.

    Args:
        model: a model with supported mixers.
        settings: how much is cut, and how.
        calibration: batches of the model's inputs for mixers that are measured on data; see `gather_statistics`.
        attempts_left: number of cuts, this one included, in which the policy's goal is to be reached, >= 1. Each
            shrinks the layers by the same factor.
        team: processes that plan together; None for one process alone.

    Raises:
        ValueError: if the model has no compressible layer, or the policy cannot be met; calibration batches that are
            missing, empty, too short or of the wrong fields.
        TypeError: a calibration batch that is not a mapping.
        ReductionError: if a layer cannot be measured or reduced; the message names it.
    """
    team = team or Team()
    constraints = with_ties(model, settings.constraints)
    for site in find_mixers(model):
        check_replaceable(model, site, trained=False)
    recordings: dict[str, Recording] = {}
    statistics = team.gather(model, calibration, recordings if settings.refit_steps else None, settings.fast_ops)

    def decide() -> CompressionPlan:
        measurements = measure_mixers(model, statistics)
        team.check(measurements)
        spectra = [measurement.spectrum() for measurement in measurements.values()]
        wanted = settings.policy.orders(spectra, original_sizes(model), constraints, attempts_left)
        orders = constraints.apply(wanted, state_sizes(model))
        layers = []
        parts = zip(find_mixers(model), measurements.values(), spectra, orders, strict=True)
        for site, measurement, spectrum, order in with_progress(parts, "reducing", "layer", len(orders)):
            reduction = _reduce(site, measurement, order, settings, recordings) if order < site.state_size else None
            layers.append(LayerPlan(site.name, site.state_size, order, spectrum, reduction))
        return CompressionPlan(layers, describe_policy(settings.policy) | {"selection": settings.selection})

    return team.decide(decide)


def _reduce(
    site: MixerSite, measurement: Any, order: int, settings: CutSettings, recordings: Mapping[str, Recording]
) -> MixerReduction:
    """The mixer's parameters at a smaller order, refitted if there is a recording of its outputs."""
    plain = site.without_lora()
    try:
        reduction = plain.adapter.reduce(plain.mixer, measurement, order, settings.selection, settings.generator)
        if site.name in recordings:
            reduction = refit(plain, reduction, recordings[site.name], settings.refit_steps, settings.fast_ops)
        return site.with_lora(reduction)
    except ReductionError as error:
        raise ReductionError(f"{site.name}: {error}") from error


@outside_inference_mode
def apply_plan(model: nn.Module, optimizer: Any, plan: CompressionPlan, step: int | None = None) -> dict[str, Any]:
    """Swap the planned parameters into the model and the optimizer, carry moments and gradients, update the config.

    Args:
        model: the model that the plan was made for, unchanged since.
        optimizer: its optimizer, wrapped or not, or None when there is none.
        plan: result of `make_plan`.
        step: optimizer steps taken so far, for the history.

    Returns:
        The record that was appended to the compression history.

    Raises:
        TypeError: if the optimizer's state cannot be carried.
        ValueError: if the model's sizes are not those of the plan, or the optimizer lacks a parameter.
    """
    inner = None if optimizer is None else unwrap_optimizer(optimizer)
    sites = find_mixers(model)
    planned = [(layer.name, layer.old_size) for layer in plan.layers]
    if planned != (present := [(site.name, site.state_size) for site in sites]):
        raise ValueError(f"the plan was made for mixers and sizes {planned}, the model has {present}")

    values: dict[str, dict[str, Tensor]] = {}
    states: dict[str, dict[str, State]] = {}
    gradients: dict[str, dict[str, Tensor | None]] = {}
    for site, layer in zip(sites, plan.layers, strict=True):
        if layer.reduction is None:
            continue
        changes = layer.reduction.changes
        values[site.name] = {name: change.value for name, change in changes.items()}
        gradients[site.name] = carried_gradients(changes, site.parameters())
        warn_of_added(site.name, changes, site.mixer.parameters())
        if inner is not None:
            old = {name: dict(inner.state.get(p, {})) for name, p in site.parameters().items()}
            states[site.name] = {
                name: carried_state(change, old, old.get(name, {}), type(inner)) for name, change in changes.items()
            }
    replace_parameters(sites, values, inner, states, gradients)
    write_sizes(model, sites)
    record = plan.record(step)
    if plan.cuts:
        append_history(model, record)
    return record


@outside_inference_mode
def compress(  # public, and kept flat: a user gives two or three of these by name
    model: nn.Module,
    calibration: Batches | None = None,
    *,
    target: float | None = None,
    policy: Policy | None = None,
    optimizer: Any = None,
    constraints: SizeConstraints | None = None,
    refit_steps: int = STEPS,
    selection: Selection = "largest",
    generator: torch.Generator | None = None,
    step: int | None = None,
    fast_ops: bool = True,
) -> dict[str, Any]:
    """Make a model smaller, now: between two optimizer steps of any training loop, or after training.

    ```python
    compress(model, batches, target=16)  # a trained model
    compress(model, batches, policy=Energy(tau=0.1), optimizer=optimizer)  # between two steps
    ```

    Parameters that change are replaced by new, smaller `nn.Parameter`s, in the model and in the optimizer, whose
    moments are carried over; the model's config learns the new sizes and the history. Gradients, of an accumulation
    that is under way, are carried as well; only a Mamba-2 of this package, whose first cut adds matrices, starts those
    without, and says so. Attributes and hooks of a parameter go to the new one. References to the old parameters (a DDP
    wrapper, an average of weights) are not updated.

    Args:
        model: a model with supported mixers; see `supported_mixers`.
        calibration: batches of the model's inputs, mappings such as a DataLoader yields. Selective layers (Mamba and
            kin) are ranked on them; time-invariant layers need none.
        target: mean state size over the layers to reach, >= 1; short for `policy=Target(target)`.
        policy: `Energy` (default, tau 0.1), `Target` or `Fraction`.
        optimizer: torch.optim Adam, AdamW, SGD or Adafactor, or transformers' Adafactor; possibly wrapped by
            Accelerate. None if the model is not being trained.
        constraints: minimum size, multiples, uniformity, smallest worthwhile change.
        refit_steps: optimizer steps for which each reduced selective layer is refitted to the outputs that the full one
            had on the calibration batches, >= 0; see `refit`. Needs no labels. 0 leaves the closed form as it is.
        selection: which balanced states stay; "smallest" and "random" are controls for experiments.
        generator: CPU generator for selection "random".
        step: optimizer steps taken so far, for the history.
        fast_ops: let stock mixers run by this package's ops while they are calibrated, where that is exact; afterwards
            they are what they were. See `use_fast_ops`.

    Returns:
        A record of the cut: per layer its name, old and new size, bound or residual, and singular values.

    Raises:
        ValueError: no compressible layer, a policy that cannot be met, a frozen or shared parameter, one that is
            offloaded or quantised; calibration batches that are missing, empty, too short or of the wrong fields.
        TypeError: an optimizer whose state cannot be carried; a calibration batch that is not a mapping.
        ReductionError: NaN or infinite weights, or a layer that cannot be reduced. The model is unchanged.
    """
    if refit_steps < 0:
        raise ValueError(f"refit_steps must be at least 0; got {refit_steps}")
    if target is not None and policy is not None:
        raise ValueError(f"give target or policy, not both; got target={target} and policy={policy}")
    policy = Target(target) if target is not None else policy
    check_parameters(model, optimizer)
    settings = CutSettings(
        policy or Energy(), constraints or SizeConstraints(), selection, generator, refit_steps, fast_ops
    )
    return apply_plan(model, optimizer, make_plan(model, settings=settings, calibration=calibration), step)
