"""Cuts by published scores: of a trained model, and by a callback while the plain Trainer trains it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..surgery import (
    CompressionPlan,
    LayerPlan,
    MixerReduction,
    apply_plan,
    check_parameters,
    find_mixers,
    needs_calibration,
    state_sizes,
)
from ..training import CompressionConfig
from ..training.calibration import Batches, calibration_batches
from ..training.distributed import processes
from ..training.records import CutLoss
from ..training.trainer_log import log_to_trackers
from .selection import METHODS, gather_rival_statistics, rival_selection


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
    """Leave in each mixer the states with the largest score, with all else as it is.

    Args:
        model: a model with supported mixers.
        method: a score; see `rival_selection`.
        order: number of states to keep, for all mixers or by mixer name; a mixer that has no more is left alone.
        batches: calibration batches of one common length, for selective layers.
        optimizer: its moments follow, as in `compress`; None if the model is not being trained.
        generator: CPU generator for method "random".
        step: optimizer steps taken so far, for the history.
        statistics: what `gather_rival_statistics` returned for this model, in place of another pass over the batches.

    Returns:
        The record of the cut, as `compress` returns it; without singular values, bounds and residuals.

    Raises:
        ValueError: an unknown method or mixer, an order below 1, a frozen or shared parameter, missing batches.
        TypeError: an optimizer whose state cannot be carried.
    """
    check_parameters(model, optimizer)
    began, sites = time.perf_counter(), find_mixers(model)
    names = [site.name for site in sites]
    if isinstance(order, Mapping) and (unknown := order.keys() - set(names)):
        raise ValueError(f"the model has no mixer {sorted(unknown)[0]!r}; it has {', '.join(names)}")
    wanted = {name: order.get(name) if isinstance(order, Mapping) else order for name in names}
    found = gather_rival_statistics(model, batches) if statistics is None else statistics
    layers = []
    for site in sites:
        old, new = site.state_size, wanted[site.name]
        if new is None or new >= old:
            layers.append(LayerPlan(site.name, old, old, torch.zeros(0)))
            continue
        kept = rival_selection(method, found[site.name], new, generator)
        reduction = MixerReduction(site.adapter.keep(site.mixer, kept))  # type: ignore[attr-defined]
        layers.append(LayerPlan(site.name, old, new, torch.zeros(0), reduction))
    plan = CompressionPlan(layers, {"policy": "score", "score": method}, time.perf_counter() - began)
    return apply_plan(model, optimizer, plan, step)


class RivalCutCallback(TrainerCallback):
    """Cuts by a score while an unmodified Trainer trains, on the schedule of `CompreSSMCallback`.

    For comparisons in a single process: a run that is interrupted starts afresh, and a best model from before a cut
    cannot be loaded.

    Args:
        method: a score; see `rival_selection`.
        target_state_size: states of every layer after the last cut, >= 1; the way is walked in equal ratios.
        cut_steps: optimizer steps at which to cut. None: four equidistant ones in the first 10% of training.
        calibration_batches: training batches on which the states of selective layers are ranked, >= 1.

    Raises:
        ValueError: an unknown method, settings out of range; when training starts: a resumed run, a frozen or shared
            parameter.
        NotImplementedError: when training starts on several processes.
    """

    def __init__(
        self,
        method: str,
        target_state_size: int,
        cut_steps: Sequence[int] | None = None,
        calibration_batches: int = 2,
    ):
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; allowed are {', '.join(METHODS)}")
        self.method, self.target = method, target_state_size
        self._config = CompressionConfig(
            policy="target",
            target_state_size=target_state_size,
            cut_steps=None if cut_steps is None else list(cut_steps),
            calibration_batches=calibration_batches,
        )
        self._attempts: list[int] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if processes() > 1:
            raise NotImplementedError("RivalCutCallback is for comparisons in a single process")
        if state.global_step > 0:
            raise ValueError("RivalCutCallback cannot go on with a run that was interrupted; start it afresh")
        check_parameters(model, optimizer)
        self._attempts = self._config.attempt_steps(state.max_steps)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        step = state.global_step
        if step not in self._attempts:
            return
        left, count = sum(attempt >= step for attempt in self._attempts), self._config.calibration_batches
        batches = calibration_batches(train_dataloader, count, step) if needs_calibration(model) else None
        loss = CutLoss(batches, train_dataloader, count, step, 0)
        loss.measure("compression/loss_before", model)
        generator = torch.Generator().manual_seed(step)
        rival_cut(model, self.method, self._orders(model, left), batches, optimizer, generator, step)
        loss.measure("compression/loss_after", model)
        log_to_trackers(loss.values | {"compression/mean_state_size": sum(sizes := state_sizes(model)) / len(sizes)})

    def _orders(self, model: nn.Module, attempts_left: int) -> dict[str, int]:
        sizes = {site.name: site.state_size for site in find_mixers(model)}
        return {n: max(round(size * (self.target / size) ** (1 / attempts_left)), 1) for n, size in sizes.items()}
