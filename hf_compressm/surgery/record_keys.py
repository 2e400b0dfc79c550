"""Names under which a compression is recorded: in configs, in the Trainer's log, and in what a checkpoint holds of it.

Code that writes or reads one of these takes the name from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HISTORY = "compression_history"
"""Attribute of a config, or of a module without one: the list of cuts and undone cuts."""
RECORD_FILE = "compression.json"
"""File beside a model with the full history under the key `history`."""

CALLBACK = "CompreSSMCallback"
"""Key of the callback's entry in `TrainerState.stateful_callbacks`; a subclass has its own class name there."""
STATE_FILE = "compression_state.safetensors"
"""File of a checkpoint with the tensors that the callback needs to go on."""
MIXERS, SNAPSHOT, TRACKER = "mixers", "snapshot", "tracker"
"""Parts of that file: weights beneath PEFT's adapters, the model before a cut, the measurements of the ranking."""

_LOG = "compression/"
MEAN_STATE_SIZE = f"{_LOG}mean_state_size"
SECONDS = f"{_LOG}seconds"
LOSS_BEFORE, LOSS_AFTER = f"{_LOG}loss_before", f"{_LOG}loss_after"
SPEED_BEFORE = f"{_LOG}steps_per_second_before"
RANK_STABILITY = f"{_LOG}rank_stability"
UNDONE = f"{_LOG}undone"
EVENT = f"{_LOG}event"
LEAST_TIMED_STEPS = 10
"""Optimizer steps between two cuts that must be timed, after one to warm up, before their speed is told to anybody."""
SPECTRA = f"{_LOG}spectra"
"""Key of a measurement in `TrainerState.log_history`: a list with an entry for each layer."""


def is_timed(steps: int) -> bool:
    """Whether so many optimizer steps without a change of size, the first of them to warm up, tell a speed."""
    return steps > LEAST_TIMED_STEPS


def seconds_of(part: str) -> str:
    """Log key of the seconds that a part of an attempt took, such as "statistics" or "surgery"."""
    return f"{SECONDS}_{part}"


def of_layer(index: int, name: str) -> str:
    """Log key of a number about one layer, counted from 0 in model order."""
    return f"{_LOG}layer_{index}/{name}"


def exported_entry(
    settings: Mapping[str, Any], history: list[dict[str, Any]], judging: dict[str, Any] | None
) -> dict[str, Any]:
    """What the callback exports into the Trainer's state.

    Args:
        settings: arguments of the callback.
        history: the compression history.
        judging: the cut that waits for an evaluation, as in `Rollback.pending`; None if none does.
    """
    return {"args": dict(settings), "attributes": {"saved": {"history": history, "judging": judging}}}


def settings_of(entry: Any) -> dict[str, Any]:
    """The callback's arguments in an exported entry.

    Raises:
        KeyError, IndexError, TypeError: if the entry is malformed.
    """
    return _single(entry)["args"]


def saved_in(entry: Any) -> dict[str, Any]:
    """History and judging in an exported entry, by the names of the arguments of `exported_entry`.

    Raises:
        KeyError, IndexError, TypeError: if the entry is malformed.
    """
    return _single(entry)["attributes"]["saved"]


def _single(entry: Any) -> Any:
    """The entry itself: the Trainer keeps a list where it has several callbacks of one class."""
    return entry[0] if isinstance(entry, list) else entry
