"""Undo a cut that made a metric worse: keep a copy of the model until the next evaluation has judged the cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import TrainerState
from transformers.utils import logging

from ..surgery import Snapshot, append_history, find_mixers, history, set_history, state_sizes
from ..surgery.processes import decided_by_rank_0
from .config import CompressionConfig

logger = logging.get_logger(__name__)


class Rollback:
    """The cut that waits for an evaluation, if any.

    Args:
        config: `rollback_metric`, `rollback_tolerance` and `greater_is_better` are read.

    Attributes:
        pending: JSON-ready; None if no cut waits. `step` of the cut, `reference`, the metric before it, `undo`, whether
            it was found to hurt, and then `value`, the metric after it.
        snapshot: the model and optimizer from before it.
    """

    def __init__(self, config: CompressionConfig):
        self.config = config
        self.pending: dict[str, Any] | None = None
        self.snapshot: Snapshot | None = None

    @property
    def due(self) -> bool:
        """Whether the cut was found to hurt and is to be undone."""
        return self.pending is not None and self.pending["undo"]

    def keep(self, state: TrainerState, model: nn.Module, optimizer: Any) -> None:
        """Copy the model before a cut, if there is a metric to judge it by.

        Raises:
            ValueError: if evaluations were made and did not report the metric.
        """
        metric = self.config.rollback_metric
        seen = [entry[metric] for entry in state.log_history if metric in entry]
        reported = sorted({key for entry in state.log_history for key in entry if key.startswith("eval_")})
        if not seen and reported:
            raise ValueError(
                f"rollback_metric is {metric!r}, which the evaluation does not report; it reports {', '.join(reported)}"
            )
        if not seen:
            logger.warning(
                f"Step {state.global_step}: no {metric} was reported before this cut, so it cannot be judged and will "
                "not be undone. Set eval_on_start=True, or evaluate before the first attempt."
            )
            return
        self.snapshot = Snapshot.take(model, optimizer)
        self.pending = {"step": state.global_step, "reference": seen[-1], "undo": False}

    def judge(self, step: int, metrics: Mapping[str, float]) -> None:
        """Compare an evaluation after the cut with the one before; the same on all ranks."""
        # An evaluation in the cut's own step would judge a model that had no chance to recover.
        if self.pending is None or self.due or step == self.pending["step"]:
            return
        value = decided_by_rank_0(lambda: metrics.get(self.config.rollback_metric))
        if value is None:  # an evaluation of other data, or with another prefix
            return
        loss = self.pending["reference"] - value
        worsening = loss if self.config.greater_is_better else -loss
        if worsening <= self.config.rollback_tolerance:
            self.pending = self.snapshot = None
        else:
            self.pending |= {"undo": True, "value": value}

    def undo(self, step: int, model: nn.Module, optimizer: Any) -> dict[str, Any]:
        """Restore model and optimizer; the compression history goes on with what was undone.

        Returns:
            The record that was added to the history.
        """
        assert self.snapshot is not None and self.pending is not None
        judged, before, records = self.pending, state_sizes(model), history(model)
        self.snapshot.restore(model, optimizer)
        names = [site.name for site in find_mixers(model)]
        record = {
            "event": "undo",
            "step": step,
            "cut_step": judged["step"],
            "metric": self.config.rollback_metric,
            "before_cut": judged["reference"],
            "after_cut": judged["value"],
            "layers": [
                {"name": name, "old_size": old, "new_size": new}
                for name, old, new in zip(names, before, state_sizes(model), strict=True)
            ],
        }
        set_history(model, records)
        append_history(model, record)
        self.pending = self.snapshot = None
        return record

    def resume(self, pending: dict[str, Any] | None, snapshot: Snapshot | None) -> None:
        """Continue from what a checkpoint holds; without the copy of the model the cut stays."""
        if pending is not None and snapshot is None:
            logger.warning(
                f"The cut at step {pending['step']} was still to be judged, but the checkpoint lacks the "
                "copy of the model from before it. The cut stays."
            )
            pending = None
        self.pending, self.snapshot = pending, None if pending is None else snapshot
