"""A compression plan for a whole model: make it, apply it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..progress import with_progress
from ..reduction import Selection, SizeConstraints
from .adapters.base import MixerReduction, ReductionError, find_mixers
from .gradients import carried_gradients, warn_of_added
from .history import append_history, original_sizes
from .optimizer import State, carried_state, unwrap_optimizer
from .owners import with_ties, write_sizes
from .parameters import check_replaceable, outside_inference_mode
from .peft.lora import effective_site, followed
from .peft.tuners import has_tuners
from .policies import Energy, Policy, Target, describe_policy
from .refit import STEPS, Recording, refit
from .resize import replace_parameters
from .statistics import Batches, gather_statistics


@dataclass(frozen=True)
class LayerPlan:
    """What is to happen to one mixer.

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


@outside_inference_mode
def measure_model(
    model: nn.Module,
    calibration: Batches | None = None,
    recordings: dict[str, Recording] | None = None,
    fast_ops: bool = True,
) -> dict[str, Any]:
    """Measure every mixer: name -> measurement, with `.spectrum()` giving its Hankel singular values.

    Args:
        model: a model with supported mixers.
        calibration: batches for mixers that are measured on data; see `gather_statistics`.
        recordings: filled with what a refit needs, by mixer name, if given.
        fast_ops: as in `compress`.

    Raises:
        ReductionError: naming the first layer that cannot be measured and why.
        ValueError, TypeError: calibration batches that are missing, empty, too short or of the wrong fields.
    """
    return measure_mixers(model, gather_statistics(model, calibration, recordings, fast_ops=fast_ops))


def measure_mixers(model: nn.Module, statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Measure every mixer, from statistics by mixer name where it needs them.

    Raises:
        ReductionError: naming the first layer that cannot be measured and why.
    """
    measurements = {}
    for site in with_progress(find_mixers(model), "measuring", "layer"):
        try:
            measurements[site.name] = site.adapter.measure(site.mixer, statistics.get(site.name))
        except ReductionError as error:
            raise ReductionError(f"{site.name}: {error}") from error
    return measurements


@outside_inference_mode
def make_plan(
    model: nn.Module,
    policy: Policy | None = None,
    constraints: SizeConstraints | None = None,
    selection: Selection = "largest",
    generator: torch.Generator | None = None,
    attempts_left: int = 1,
    calibration: Batches | None = None,
    refit_steps: int = 0,
    measured: tuple[Mapping[str, Any], dict[str, Recording]] | None = None,
    fast_ops: bool = True,
) -> CompressionPlan:
    """Measure a model and compute the reduced parameters of every layer that should shrink, changing nothing.

    Arguments as in `compress`; `attempts_left` is the number of cuts, this one included, among which a policy that
    walks to its goal shares the way; `measured`, if given, are measurements and recordings that stand for calibration
    batches.

    Raises:
        ValueError: if the model has no compressible layer, or the policy cannot be met.
        ReductionError: if a layer cannot be measured or reduced; the message names it.
    """
    policy, constraints = policy or Energy(), with_ties(model, constraints or SizeConstraints())
    sites = find_mixers(model)
    for site in sites:
        check_replaceable(model, site, trained=False)
    recordings: dict[str, Recording] = {}
    if measured is None:
        measured = measure_model(model, calibration, recordings if refit_steps else None, fast_ops), recordings
    measurements, recordings = measured
    spectra = [measurements[site.name].spectrum() for site in sites]
    sizes = [site.state_size for site in sites]
    orders = policy.orders(spectra, original_sizes(model), constraints, attempts_left)
    layers = []
    parts = zip(sites, spectra, sizes, constraints.apply(orders, sizes), strict=True)
    for site, spectrum, size, order in with_progress(parts, "reducing", "layer", len(sites)):
        reduction = None
        if order < size:
            try:
                plain = effective_site(site)
                reduction = site.adapter.reduce(plain.mixer, measurements[site.name], order, selection, generator)
                if site.name in recordings:
                    reduction = refit(plain, reduction, recordings[site.name], refit_steps, fast_ops)
                reduction = followed(site, reduction)
            except ReductionError as error:
                raise ReductionError(f"{site.name}: {error}") from error
        layers.append(LayerPlan(site.name, size, order, spectrum, reduction))
    described = describe_policy(policy) | {"selection": selection}
    return CompressionPlan(layers, described)


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
def compress(
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
    plan = make_plan(model, policy, constraints, selection, generator, 1, calibration, refit_steps, fast_ops=fast_ops)
    return apply_plan(model, optimizer, plan, step)


def check_parameters(model: nn.Module, optimizer: Any = None) -> None:
    """Raise if a cut could not reach every reference to a parameter.

    Raises:
        ValueError: if a parameter of a mixer is shared with another module or, when there is an optimizer, is frozen
            (unless PEFT trains the model, which freezes on purpose) or missing from it; if an adapter of PEFT around a
            parameter cannot follow a cut; if a parameter is offloaded, quantised or of a class of its own. The message
            names the parameter.
        TypeError: if the optimizer's state cannot be carried.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    held, adapted = None, has_tuners(model)
    if optimizer is not None:
        groups = unwrap_optimizer(optimizer).param_groups
        held = {id(parameter) for group in groups for parameter in group["params"]}
    for site in find_mixers(model):
        check_replaceable(model, site, trained=optimizer is not None)
        for name, parameter in site.parameters().items():
            path = f"{site.name}.{name}"
            if len(names := owners[id(parameter)]) > 1:
                raise ValueError(
                    f"{path} is shared by {', '.join(names)}; a shared state-space parameter cannot be cut. "
                    "Give each layer its own parameter."
                )
            if held is not None and not parameter.requires_grad and not adapted:
                raise ValueError(
                    f"{path} is frozen (requires_grad=False), and training a cut of it would change what was meant "
                    "to stay. Unfreeze it, or compress the model before or after training."
                )
            if held is not None and parameter.requires_grad and id(parameter) not in held:
                raise ValueError(f"{path} is trainable but in no parameter group of the optimizer")
