"""What a run's own log keeps for those who look at it later: every measurement, and the loss around every cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..surgery import undisturbed
from .calibration import Batches, calibration_batches
from .distributed import processes
from .trainer_log import keep_in_history, running_trainer

logger = logging.get_logger(__name__)

SPECTRA = "compression/spectra"
"""Key of a measurement in `TrainerState.log_history`, a list with an entry for each layer."""
MOST_VALUES = 48


def keep_spectra(spectra: Mapping[str, Tensor]) -> None:
    """Add a measurement, layer name -> descending singular values, to the log that checkpoints carry.

    Long spectra are thinned to `MOST_VALUES` ranks in geometric progression, given as `ranks`, counted from 1.
    """
    keep_in_history({SPECTRA: [{"name": name, **_compact(values)} for name, values in spectra.items()]})


def _compact(values: Tensor) -> dict[str, Any]:
    count = len(values)
    record: dict[str, Any] = {"states": count, "sum": float(f"{float(values.sum()):.6g}")}
    kept = values
    if count > MOST_VALUES:
        ranks = torch.logspace(0, 1, MOST_VALUES, base=count, dtype=torch.float64).round().long().unique()
        record["ranks"], kept = ranks.tolist(), values[ranks.to(values.device) - 1]
    return record | {"singular_values": [float(f"{value:.4g}") for value in kept.tolist()]}


class CutLoss:
    """The loss of the running Trainer on a few batches of training data, before and after a change of the model.

    It is a by-product: where a loss cannot be had it is left out, and training goes on.

    Args:
        batches: what to measure on; None draws as many as `count` from the training data.
        count, seed, rank: as for `calibration_batches`.
    """

    def __init__(self, batches: Batches | None, dataloader: Any, count: int, seed: int, rank: int):
        self.values: dict[str, float] = {}
        self._batches = batches or []
        if batches is None and hasattr(getattr(dataloader, "dataset", None), "__getitem__"):
            self._batches = calibration_batches(dataloader, count, seed, rank, processes())

    def measure(self, name: str, model: nn.Module) -> None:
        """Add the present loss to `values`, in nats where the loss is a cross-entropy."""
        trainer = running_trainer()
        if trainer is None or not self._batches:
            return
        device = next(model.parameters()).device
        losses = []
        try:
            with undisturbed(model), trainer.compute_loss_context_manager():
                for batch in self._batches:
                    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                    loss: Any = trainer.compute_loss(model, inputs)
                    losses.append(float(loss))
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            logger.warning(f"the loss around this cut was not measured: {error}")
            self._batches = []
            return
        self.values[name] = sum(losses) / len(losses)
