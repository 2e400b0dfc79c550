"""Cut by published scores: a trained model, or by a callback while the plain Trainer trains it.

Source: `selection` names the paper of each score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..surgery import (
    CompressionPlan,
    LayerPlan,
    MixerReduction,
    MixerSite,
    apply_plan,
    check_parameters,
    find_mixers,
    find_owners,
    needs_calibration,
    state_sizes,
)
from ..surgery import record_keys as keys
from ..surgery.parameters import outside_inference_mode
from ..surgery.processes import processes
from ..surgery.team import Team
from ..training import CompressionConfig
from ..training.calibration import Batches, TrainingData
from ..training.distributed import refuse_unsupported
from ..training.records import CutLoss
from ..training.reporting import mean_size
from ..training.run_state import PerRun
from ..training.trainer_log import log_to_trackers, running_trainer
from .key_scores import KEY_METHODS
from .selection import METHODS, check_method, gather_rival_statistics, rival_selection


@outside_inference_mode
def rival_cut(
    model: nn.Module,
    method: str,
    order: int | Mapping[str, int],
    batches: Batches | None = None,
    optimizer: Any = None,
    generator: torch.Generator | None = None,
    step: int | None = None,
    statistics: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Keep in each mixer the states with the largest score, and change nothing else.

    Args:
        model: a model with supported mixers.
        method: a score; see `rival_selection`.
        order: number of states to keep, for all mixers or by mixer name; a mixer that has no more is left alone.
        batches: calibration batches, for selective layers.
        optimizer: its moments follow, as in `compress`; None if the model is not being trained.
        generator: CPU generator for method "random".
        step: optimizer steps taken so far, for the history.
        statistics: what `gather_rival_statistics` returned for this model, in place of another pass over the batches.

    Returns:
        The record of the cut, as `compress` returns it; without singular values, bounds and residuals.

    Raises:
        ValueError: an unknown method or mixer, an order below 1, orders that differ where the model's config holds one
            state size for all layers, a frozen or shared parameter, missing batches.
        TypeError: an optimizer whose state cannot be carried; a mixer whose adapter cannot keep single states.
        ReductionError: NaN or infinite weights or statistics. The model is unchanged.
    """
    check_parameters(model, optimizer)
    check_method(model, method)
    sites = find_mixers(model)
    sizes = _new_sizes(model, sites, order)
    found = gather_rival_statistics(model, batches) if statistics is None else statistics
    layers = []
    for site in sites:
        old, new, reduction = site.state_size, sizes[site.name], None
        if new < old:
            reduction = _kept(site, rival_selection(method, found[site.name], new, generator))
        layers.append(LayerPlan(site.name, old, new, torch.zeros(0), reduction))
    plan = CompressionPlan(layers, {"policy": "score", "score": method})
    return apply_plan(model, optimizer, plan, step)


def _new_sizes(model: nn.Module, sites: Sequence[MixerSite], order: int | Mapping[str, int]) -> dict[str, int]:
    present = {site.name: site.state_size for site in sites}
    wanted = order if isinstance(order, Mapping) else dict.fromkeys(present, order)
    if unknown := wanted.keys() - present.keys():
        raise ValueError(f"the model has no mixer {min(unknown)!r}; it has {', '.join(present)}")
    sizes = {name: min(wanted.get(name, size), size) for name, size in present.items()}
    for group in (group for owner in find_owners(model, sites) for groups in owner.ties() for group in groups):
        if len(common := {sizes[name] for name in group}) > 1:
            raise ValueError(
                f"this model's config holds one state size for all layers; the orders would leave {sorted(common)}. "
                "Give one order, or convert the model with hf_compressm.from_stock to one with a state size per layer."
            )
    return sizes


def _kept(site: MixerSite, kept: list[list[int]]) -> MixerReduction:
    plain = site.without_lora()
    try:
        return site.with_lora(MixerReduction(plain.adapter.keep(plain.mixer, kept)))
    except NotImplementedError as error:
        raise TypeError(f"{site.name}: {error}") from error


class RivalCutCallback(TrainerCallback):
    """Cuts by a score while an unmodified Trainer trains, on the schedule of `CompreSSMCallback`.

    For comparisons in a single process: a run that is interrupted starts afresh, and a best model from before a cut
    cannot be loaded. The loss around each cut is logged as `CompreSSMCallback` does.

    Args:
        method: a score; see `rival_selection`.
        target_state_size: states of every layer after the last cut, >= 1; each cut shrinks a layer by the same factor.
            Layers that have no more are not changed.
        cut_steps: optimizer steps at which to cut. None: four equidistant ones in the window.
        window: its start and end, as `window_start` and `window_end` of `CompressionConfig`.
        calibration_batches: training batches on which the states of selective layers are ranked, >= 1.

    Raises:
        ValueError: an unknown method, settings out of range; when training starts: a method that the model's layers do
            not have, a resumed run, a frozen or shared parameter.
        TypeError: when training starts: an optimizer whose state cannot be carried.
        NotImplementedError: when training starts on several processes or devices.
        ReductionError: at a cut, if weights or statistics are NaN or infinite.
    """

    def __init__(
        self,
        method: str,
        target_state_size: int,
        cut_steps: Sequence[int] | None = None,
        calibration_batches: int = 2,
        window: tuple[float, float] = (0.0, 0.1),
    ):
        known = dict.fromkeys(METHODS + KEY_METHODS)  # which of them a layer has is known with the model
        if method not in known:
            raise ValueError(f"unknown method {method!r}; allowed are {', '.join(known)}")
        self.method, self.target = method, target_state_size
        self._config = CompressionConfig(
            policy="target",
            target_state_size=target_state_size,
            cut_steps=None if cut_steps is None else list(cut_steps),
            calibration_batches=calibration_batches,
            window_start=window[0],
            window_end=window[1],
        )
        self._data: PerRun[TrainingData] = PerRun()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Check model and settings, and find the training data.

        Raises:
            ValueError, TypeError, NotImplementedError: as the class says.
        """
        model: Any = kwargs["model"]
        if processes() > 1:
            raise NotImplementedError(
                f"RivalCutCallback is for comparisons in a single process; {processes()} train. Start one process, or "
                "use CompreSSMCallback."
            )
        refuse_unsupported(args, model, sharded=False)
        if state.global_step > 0:
            raise ValueError("RivalCutCallback cannot go on with a run that was interrupted; start it afresh")
        check_method(model, self.method)
        check_parameters(model, kwargs.get("optimizer"))
        attempts = self._config.attempt_steps(state.max_steps)  # raises if no step is in the window
        data = TrainingData(kwargs.get("train_dataloader"), self._config.calibration_batches)
        self._data.begin(state, data).follow(running_trainer(), model, attempts[0])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        model: Any = kwargs["model"]
        step, data = state.global_step, self._data.of(state)
        attempts = self._config.attempt_steps(state.max_steps)
        if step not in attempts or data is None:
            return
        orders = self._orders(model, sum(attempt >= step for attempt in attempts))
        if not orders:
            return
        batches = data.batches(step) if needs_calibration(model) else None
        trainer = running_trainer()
        loss = CutLoss(trainer, lambda: data.batches(step) if batches is None else batches, Team())
        loss.measure(keys.LOSS_BEFORE, model)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        rival_cut(model, self.method, orders, batches, kwargs.get("optimizer"), generator, step)
        loss.measure(keys.LOSS_AFTER, model)
        log_to_trackers(trainer, loss.values | {keys.MEAN_STATE_SIZE: mean_size(state_sizes(model))})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (data := self._data.end(state)) is not None:
            data.leave()

    def _orders(self, model: nn.Module, left: int) -> dict[str, int]:
        """States after this attempt, the first of `left`, by mixer name, of the mixers that lose any."""
        sizes = {site.name: site.state_size for site in find_mixers(model)}
        orders = {name: max(round(size * (self.target / size) ** (1 / left)), 1) for name, size in sizes.items()}
        return {name: order for name, order in orders.items() if order < sizes[name]}
