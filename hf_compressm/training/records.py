"""Record every measurement and the loss around every cut in the Trainer's log, for reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..surgery import record_keys as keys
from ..surgery import undisturbed
from ..surgery.team import Team
from .calibration import Batches, trainer_loss
from .trainer_log import keep_in_history

logger = logging.get_logger(__name__)

MOST_VALUES = 48


def keep_spectra(trainer: Any, spectra: Mapping[str, Tensor]) -> None:
    """Add a measurement, layer name -> descending singular values (N,), to the log that is saved in checkpoints.

    Long spectra are thinned to `MOST_VALUES` ranks in geometric progression, given as `ranks`, counted from 1.
    """
    keep_in_history(trainer, {keys.SPECTRA: [{"name": name, **_compact(values)} for name, values in spectra.items()]})


def _compact(values: Tensor) -> dict[str, Any]:
    count = len(values)
    record: dict[str, Any] = {"states": count, "sum": float(f"{float(values.sum()):.6g}")}
    kept = values
    if count > MOST_VALUES:
        ranks = torch.logspace(0, 1, MOST_VALUES, base=count, dtype=torch.float64).round().long().unique()
        record["ranks"], kept = ranks.tolist(), values[ranks.to(values.device) - 1]
    return record | {"singular_values": [float(f"{value:.4g}") for value in kept.tolist()]}


_ERRORS = (ValueError, TypeError, LookupError, AttributeError, RuntimeError)


class CutLoss:
    """The Trainer's loss on a few batches of training data, before and after a change of the model.

    If the loss cannot be computed, it is left out, and training goes on.

    Args:
        trainer: the Trainer; None measures nothing.
        batches: gives what to measure on; nothing is measured if it fails.
        team: the processes that train together.
    """

    def __init__(self, trainer: Any, batches: Callable[[], Batches], team: Team):
        self.trainer, self.team = trainer, team
        self.values: dict[str, float] = {}
        self._batches: Batches = []
        try:
            self._batches = batches()
        except _ERRORS as error:
            logger.warning(f"the loss around this cut is not measured: {error}")

    def measure(self, name: str, model: nn.Module) -> None:
        """Add the present loss to `values`, in nats where the loss is a cross-entropy."""
        if self.trainer is None:
            return
        losses: list[float] = []
        try:
            with undisturbed(model):
                self.team.run(model, (partial(self._add, losses, model, batch) for batch in self._batches))
        except _ERRORS as error:
            logger.warning(f"the loss around this cut was not measured: {error}")
            self._batches = []
            return
        if losses:
            self.values[name] = sum(losses) / len(losses)

    def _add(self, losses: list[float], model: nn.Module, batch: Any) -> None:
        losses.append(float(trainer_loss(self.trainer, model, batch)))
