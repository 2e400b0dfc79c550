"""Folders with made-up logs, in the shapes that runs may have."""

from __future__ import annotations

import json
from pathlib import Path


def spectrum(states: int) -> list[float]:
    return [2.0 * 0.8**rank for rank in range(states)]


def cut(step: int, old: int, new: int, layers: int = 2) -> dict:
    """A record of the compression history."""
    return {
        "event": "cut",
        "step": step,
        "policy": "energy",
        "layers": [
            {
                "name": f"backbone.layers.{index}.mixer",
                "old_size": old,
                "new_size": new,
                "bound": 2 * sum(spectrum(old)[new:]),
                "residual": None,
                "singular_values": spectrum(old),
            }
            for index in range(layers)
        ],
    }


def undo(step: int, cut_step: int, small: int, large: int, layers: int = 2) -> dict:
    """The record of an undone cut."""
    sizes = [
        {"name": f"backbone.layers.{index}.mixer", "old_size": small, "new_size": large} for index in range(layers)
    ]
    return {"event": "undo", "step": step, "cut_step": cut_step, "metric": "eval_loss", "layers": sizes}


def write_run(folder: Path, *, log=(), history=(), step=100, max_steps=100, **config) -> Path:
    """A folder as a Trainer of one's own leaves it, or a checkpoint of it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "mimo_ssm", "compression_history": list(history), **config}
    (folder / "config.json").write_text(json.dumps(config))
    state = {"global_step": step, "max_steps": max_steps, "log_history": list(log)}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder
