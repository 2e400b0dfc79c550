"""Reach the running Trainer's log from inside a callback, which is handed no Trainer."""

from __future__ import annotations

import sys
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer


def running_trainer() -> Trainer | None:
    """The Trainer whose event is being handled, found on the call stack; None outside of a Trainer."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back
    return None


def log_to_trackers(logs: dict[str, Any]) -> bool:
    """Send values through `Trainer.log`, and so to its history and every tracker, without printing them.

    Returns:
        False if no Trainer is running, in which case nothing was logged.
    """
    trainer = running_trainer()
    if trainer is None:
        return False
    handler = trainer.callback_handler
    callbacks = handler.callbacks
    handler.callbacks = [cb for cb in callbacks if not isinstance(cb, (PrinterCallback, ProgressCallback))]
    try:
        trainer.log(logs)
    finally:
        handler.callbacks = callbacks
    return True


def keep_in_history(entry: dict[str, Any]) -> None:
    """Add an entry to the running Trainer's `log_history` only: trackers take numbers, and this may hold anything."""
    trainer = running_trainer()
    if trainer is not None:
        trainer.state.log_history.append(entry | {"step": trainer.state.global_step})
