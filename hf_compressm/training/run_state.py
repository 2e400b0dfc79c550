"""One value per training for a callback, so that a callback used twice behaves as two."""

from __future__ import annotations

import weakref
from types import FrameType
from typing import Any, Generic, TypeVar

from transformers import TrainerState

from .trainer_log import trainer_frames

Value = TypeVar("Value")


class PerRun(Generic[Value]):
    """One value for each training, found by the `TrainerState` that all events of that training are given.

    A value lives no longer than that state, so that a training that an error ended leaves nothing to another one.
    Trainings may be nested or run side by side. A copy or a pickle holds no values.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[weakref.ref[TrainerState], Value]] = []

    def begin(self, state: TrainerState, value: Value) -> Value:
        """Keep a value for the training that begins, in place of an earlier one; returns it."""
        self.end(state)
        self._entries.append((weakref.ref(state, self._forget), value))
        return value

    def of(self, state: TrainerState | None) -> Value | None:
        """The value of a training; None if it has none."""
        return next((value for found, value in self._entries if state is not None and found() is state), None)

    def end(self, state: TrainerState) -> Value | None:
        """Drop the value of a training; returns it."""
        value = self.of(state)
        self._entries = [entry for entry in self._entries if entry[0]() is not state]
        return value

    def _forget(self, dead: weakref.ref[TrainerState]) -> None:
        self._entries = [entry for entry in self._entries if entry[0] is not dead]

    def __reduce__(self) -> tuple[Any, ...]:
        return PerRun, ()


def is_running(state: TrainerState | None, frame: FrameType | None = None) -> bool:
    """Whether the training with this state is on the call stack, from `frame` or the caller's on, in this thread."""
    trainers = (names["self"] for names in trainer_frames(frame))
    return state is not None and any(getattr(trainer, "state", None) is state for trainer in trainers)
