"""The compression history: what was cut when, kept in the model's config so that every checkpoint carries it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from .adapters import state_sizes


def history(model: nn.Module) -> list[dict[str, Any]]:
    """The model's compression history: records of cuts and undone cuts, oldest first. A copy."""
    config: Any = getattr(model, "config", None)
    return copy.deepcopy(getattr(config, "compression_history", None) or [])


def set_history(model: nn.Module, records: Iterable[dict[str, Any]]) -> None:
    """Write the compression history to the model's config, if it has one."""
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.compression_history = list(records)


def append_history(model: nn.Module, record: dict[str, Any]) -> None:
    """Add a record to the history in the model's config."""
    set_history(model, [*history(model), record])


def original_sizes(model: nn.Module) -> list[int]:
    """State sizes before the first cut on record, in model order."""
    for record in history(model):
        if record["event"] == "cut":
            return [layer["old_size"] for layer in record["layers"]]
    return state_sizes(model)
