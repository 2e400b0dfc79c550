"""Write to a Trainer's log from inside a callback, and find the Trainer if nobody gave it."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.integrations import TensorBoardCallback

from ..surgery import record_keys as keys


def running_trainer() -> Trainer | None:
    """The Trainer whose event is being handled, found on the call stack; None outside of a Trainer.

    The way for callbacks that were not given their Trainer: events do not name it.
    """
    return next((names["self"] for names in trainer_frames()), None)


def resumed_checkpoint() -> str | None:
    """The checkpoint that the running Trainer was told to go on from, or found itself; None if there is none."""
    found = (names.get("resume_from_checkpoint") for names in trainer_frames())
    return next((folder for folder in found if isinstance(folder, str)), None)


def trainer_frames(frame: FrameType | None = None) -> Iterator[dict[str, Any]]:
    """Local names of the methods of a Trainer on the call stack, innermost first; from `frame`, or the caller's on."""
    frame = frame or sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Trainer):
            yield frame.f_locals
        frame = frame.f_back


def log_to_trackers(trainer: Any, logs: dict[str, Any], event: str | None = None) -> None:
    """Send values through `Trainer.log`, and so to its history and every tracker, without printing them.

    Args:
        trainer: the Trainer that runs; None logs nothing.
        logs: numbers by name.
        event: what happened, for trackers that show more than numbers: a text in TensorBoard, an alert in trackio.
    """
    if trainer is None:
        return
    handler = trainer.callback_handler
    callbacks, due = handler.callbacks, trainer.control.should_log
    handler.callbacks = [cb for cb in callbacks if not isinstance(cb, (PrinterCallback, ProgressCallback))]
    try:
        with metrics_apart(trainer):
            trainer.log(logs)
    finally:
        handler.callbacks = callbacks
        trainer.control.should_log = due  # the loss of this step, which logging would take for logged
    if event is not None and trainer.is_world_process_zero():
        _show_event(callbacks, event, trainer.state.global_step)


@contextmanager
def metrics_apart(trainer: Any) -> Iterator[None]:
    """Set aside the metrics that a Trainer keeps between logs, as TRL's do: nothing is added to them meanwhile."""
    kept = vars(trainer).get("_metrics")
    if not isinstance(kept, dict) or not all(isinstance(values, dict) for values in kept.values()):
        yield
        return
    trainer._metrics = {mode: defaultdict(list) for mode in kept}
    try:
        yield
    finally:
        trainer._metrics = kept


def _show_event(callbacks: list[Any], event: str, step: int) -> None:
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text(keys.EVENT, event, step)
        # By name, since a transformers that does not know trackio yet has no such class.
        elif type(callback).__name__ == "TrackioCallback" and hasattr(callback._trackio, "alert"):
            callback._trackio.alert("Change of state size", event, level=callback._trackio.AlertLevel.INFO)


def keep_in_history(trainer: Any, entry: dict[str, Any]) -> None:
    """Add an entry to a Trainer's `log_history` only: trackers take numbers, and this may hold anything."""
    if trainer is not None:
        trainer.state.log_history.append(entry | {"step": trainer.state.global_step})
