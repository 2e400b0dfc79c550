"""A cut of a whole model: `make_plan` measures and decides, `apply_plan` changes model and optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..progress import with_progress
from ..reduction import Selection, SizeConstraints
from .adapters.base import MixerSite, find_mixers, state_sizes
from .changes import ParameterChange
from .gradients import carried_gradients, warn_of_added
from .history import append_history, original_sizes
from .layer_plans import CompressionPlan, CutSettings, LayerPlan, reduced
from .optimizer import State, carried_state, check_carried, unwrap_optimizer
from .owners import with_ties, write_sizes
from .parameters import check_parameters, check_replaceable, outside_inference_mode
from .policies import Energy, Policy, choose_policy, describe_policy
from .processes import team_for
from .refit import STEPS, Recording
from .resize import replace_parameters
from .runtime_sizes import check_sizes_for
from .shards import reshard
from .statistics import Batches, measure_mixers
from .team import Look, Team
from .values import check_value_size, plan_values, value_sites


@outside_inference_mode
def make_plan(
    model: nn.Module,
    *,
    settings: CutSettings | None = None,
    calibration: Batches | None = None,
    attempts_left: int = 1,
    team: Team | None = None,
) -> CompressionPlan:
    """Measure a model and compute the reduced parameters of every layer that should shrink, changing nothing.

    Args:
        model: a model with supported mixers.
        settings: how much is cut, and how; None for the defaults.
        calibration: batches of the model's inputs for mixers that are measured on data; see `gather_statistics`.
        attempts_left: number of cuts, this one included, in which the policy's goal is to be reached, >= 1. Each
            shrinks the layers by the same factor.
        team: processes that plan together; None for this one alone, or all if they share the model (FSDP2).

    Raises:
        ValueError: if the model has no compressible layer, or the policy cannot be met; calibration batches that are
            missing, empty, too short or of the wrong fields.
        TypeError: a calibration batch that is not a mapping.
        ReductionError: if a layer cannot be measured or reduced; the message names it.
    """
    team, settings = team or team_for(model), settings or CutSettings()
    constraints = with_ties(model, settings.constraints)
    for site in find_mixers(model):
        check_replaceable(model, site, trained=False)
    recordings: dict[str, Recording] = {}
    statistics = team.gather(model, calibration, recordings if settings.refit_steps else None, settings.fast_ops)

    def decide(look: Look) -> CompressionPlan:
        measurements = measure_mixers(model, statistics, look=look)
        team.check(measurements)
        spectra = [measurement.spectrum() for measurement in measurements.values()]
        wanted = settings.policy.orders(spectra, original_sizes(model), constraints, attempts_left)
        orders = constraints.apply(wanted, state_sizes(model))
        layers = []
        parts = zip(find_mixers(model), measurements.values(), spectra, orders, strict=True)
        for site, measurement, spectrum, order in with_progress(parts, "reducing", "layer", len(orders)):
            reduction = None
            if order < site.state_size:
                reduction = reduced(look(site), measurement, order, settings, recordings)
            layers.append(LayerPlan(site.name, site.state_size, order, spectrum, reduction))
        return CompressionPlan(layers, describe_policy(settings.policy) | {"selection": settings.selection})

    return team.decide(model, decide)


@outside_inference_mode
def apply_plan(
    model: nn.Module, optimizer: Any, plan: CompressionPlan, step: int | None = None, team: Team | None = None
) -> dict[str, Any]:
    """Swap the planned parameters into the model and the optimizer, carry moments and gradients, update the config.

    Args:
        model: the model that the plan was made for, unchanged since.
        optimizer: its optimizer, wrapped or not, or None when there is none.
        plan: result of `make_plan` or `plan_values`.
        step: optimizer steps taken so far, for the history.
        team: the processes that made the plan together; None for this one alone, or all if they share the model.

    Returns:
        The record that was appended to the compression history.

    Raises:
        TypeError: if the optimizer's state cannot be carried.
        ValueError: if the model's sizes are not those of the plan, or the optimizer lacks a parameter.
    """
    reshard(model)  # what is gathered is not what the optimizer holds
    team = team or team_for(model)
    inner = None if optimizer is None else unwrap_optimizer(optimizer)
    sites = find_mixers(model) if plan.event == "cut" else value_sites(model)
    planned = [(layer.name, layer.old_size) for layer in plan.layers]
    if planned != (present := [(site.name, site.state_size) for site in sites]):
        raise ValueError(f"the plan was made for mixers and sizes {planned}, the model has {present}")
    pairs = zip(sites, plan.layers, strict=True)
    reductions = [(site, layer.reduction.changes) for site, layer in pairs if layer.reduction is not None]
    if inner is not None:  # all of them before anything is changed
        for site, changes in reductions:
            check_carried(changes, site.parameters(), inner)
    for site, changes in reductions:
        with team.opened(model, site, inner):
            _replace(site, changes, inner)
    write_sizes(model, sites)
    record = plan.record(step)
    if plan.cuts:
        append_history(model, record)
    return record


def _replace(site: MixerSite, changes: Mapping[str, ParameterChange], optimizer: torch.optim.Optimizer | None) -> None:
    """Swap a mixer's new parameters in, with the moments and gradients of the old ones."""
    values = {name: change.value for name, change in changes.items()}
    gradients = carried_gradients(changes, site.parameters())
    warn_of_added(site.name, changes, site.mixer.parameters())
    states: dict[str, State] = {}
    if optimizer is not None:
        old = {name: dict(optimizer.state.get(p, {})) for name, p in site.parameters().items()}
        for name, change in changes.items():
            states[name] = carried_state(change, old, old.get(name, {}), type(optimizer))
    replace_parameters([site], {site.name: values}, optimizer, {site.name: states}, {site.name: gradients})


@outside_inference_mode
def compress(  # public, and kept flat: a user gives two or three of these by name
    model: nn.Module,
    calibration: Batches | None = None,
    *,
    tau: float | None = None,
    target: float | None = None,
    policy: Policy | None = None,
    optimizer: Any = None,
    constraints: SizeConstraints | None = None,
    refit_steps: int = STEPS,
    selection: Selection = "largest",
    generator: torch.Generator | None = None,
    step: int | None = None,
    fast_ops: bool = True,
    value_size: int | None = None,
) -> dict[str, Any]:
    """Make a model smaller, now: between two optimizer steps of any training loop, or after training.

    ```python
    compress(model, batches, target=16)  # a trained model
    compress(model, batches, tau=0.1, optimizer=optimizer)  # between two steps
    compress(model, batches, target=32, value_size=64)  # delta rules: 32 key channels and 64 value channels
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
        tau: share of the sum of singular values that may go, in (0, 1); short for `policy=Energy(tau)`.
        target: mean state size over the layers to reach, >= 1; short for `policy=Target(target)`.
        policy: `Energy` (default, tau 0.1), `Target` or `Fraction`; in place of tau and target.
        value_size: number of value channels of each value head to keep in layers with a gated delta rule, from 1 to
            the present number, a multiple of 16 unless `constraints` give another. They are cut after the states; with
            neither tau, target nor policy, in their place. Dearer than states of the same bytes: keep this for the
            last.
        optimizer: torch.optim Adam, AdamW, SGD or Adafactor, or transformers' Adafactor; possibly wrapped by
            Accelerate. None if the model is not being trained.
        constraints: minimum size, multiples, uniformity, smallest worthwhile change, and the runtime that is to run the
            result, `SizeConstraints(sizes_for="llama.cpp")`.
        refit_steps: optimizer steps for which each reduced selective layer is refitted to the outputs that the full one
            had on the calibration batches, >= 0; see `refit`. Needs no labels. 0 leaves the closed form as it is.
        selection: which balanced states stay; "smallest" and "random" are controls for experiments.
        generator: CPU generator for selection "random".
        step: optimizer steps taken so far, for the history.
        fast_ops: let stock mixers run by this package's ops while they are calibrated, where that is exact; afterwards
            they are what they were. See `use_fast_ops`.

    Returns:
        A record of the cut: per layer its name, old and new size, bound or residual, and singular values. That of value
        channels stands under "values" if states were cut too.

    Raises:
        ValueError: no compressible layer, a policy that cannot be met, a value_size for layers without value channels
            or out of range, a frozen or shared parameter, one that is offloaded or quantised; calibration batches that
            are missing, empty, too short or of the wrong fields.
        TypeError: an optimizer whose state cannot be carried; a calibration batch that is not a mapping.
        ReductionError: NaN or infinite weights, or a layer that cannot be reduced. The model is unchanged; if it comes
            from the cut of value channels, that of the states before it stays.
    """
    if refit_steps < 0:
        raise ValueError(f"refit_steps must be at least 0; got {refit_steps}")
    if sum(amount is not None for amount in (tau, target, policy)) > 1:
        raise ValueError(f"give one of tau, target and policy; got tau={tau}, target={target} and policy={policy}")
    policy = choose_policy(tau, target) or policy
    check_parameters(model, optimizer)
    constraints = constraints or SizeConstraints()
    check_sizes_for(model, constraints, policy)
    settings = CutSettings(policy or Energy(), constraints, selection, generator, refit_steps, fast_ops)
    if value_size is None:
        return apply_plan(model, optimizer, make_plan(model, settings=settings, calibration=calibration), step)
    check_value_size(model, value_size, constraints, optimizer)
    record: dict[str, Any] = {}
    if policy is not None:
        calibration = calibration if calibration is None or isinstance(calibration, Mapping) else list(calibration)
        record = apply_plan(model, optimizer, make_plan(model, settings=settings, calibration=calibration), step)
    values = apply_plan(model, optimizer, plan_values(model, value_size, calibration, settings), step)
    return {**record, "values": values} if record else values
