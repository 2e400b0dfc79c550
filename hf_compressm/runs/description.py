"""Describe what a run worked on, for its record and card: enough to tell it apart, and no path of this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file, logging

from ..data import Task, task_names
from ..surgery import record_keys as keys

logger = logging.get_logger(__name__)

SPLITS = ("train", "validation", "test")
PIXEL_TASKS = ("digits", "pathfinder", "scifar", "smnist")
"""Tasks whose continuous inputs are the pixels of an image."""
FILE_OPTIONS = ("files",)
"""Options of tasks that name files of one's own."""


def public(value: Any) -> Any:
    """Return a value in which every path has become the last part of it; names on the hub stay.

    Args:
        value: text, number, or lists and mappings of these.
    """
    if isinstance(value, Mapping):
        return {key: public(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(part) for part in value]
    if isinstance(value, Path) or (isinstance(value, str) and _is_path(value)):
        return Path(value).expanduser().resolve().name if str(value) in (".", "..") else Path(value).name
    return value


def describe_base(name: str) -> dict[str, Any]:
    """Return the model that another is made from: `name`, and whether that is one on the hub.

    Args:
        name: folder or name on the hub.
    """
    return {"name": public(name), "on_hub": not Path(name).expanduser().exists()}


def task_facts(task: Task, options: Mapping[str, Any], data_dir: str | None = None) -> dict[str, Any]:
    """Return what was read, ready for JSON: the task, its data and its tokenizer.

    Args:
        task: as it was loaded.
        options: that it was given.
        data_dir: local folder that it was read from; None if it was not.
    """
    files = {key: options[key] for key in FILE_OPTIONS if options.get(key)}
    files |= {} if data_dir is None else {"data_dir": data_dir}
    if task.name not in task_names():
        files["files"] = task.name  # a text by its path
    sizes = {split: len(part) for split in SPLITS if hasattr(part := getattr(task, split), "__len__")}
    return {
        "name": task.name if task.name in task_names() else "text",
        "problem": task.problem,
        "input": _input(task),
        "options": public({key: value for key, value in options.items() if key not in files}),
        "hub_dataset": None if files else task.hub_dataset,
        "local": bool(files),
        "data": {**public(files), "sequences": sizes},
        "tokenizer": _describe_tokenizer(task.tokenizer),
    }


def saved_records(model: str) -> list[dict[str, Any]]:
    """Return the full compression history that lies beside a saved model; empty if there is none.

    One that cannot be read is warned about.

    Args:
        model: folder or name on the hub.
    """
    for name in (keys.RECORD_FILE, "finetuning.json"):
        try:
            file = Path(str(cached_file(model, name)))
        except OSError:
            continue
        try:
            return list(json.loads(file.read_text())["history"])
        except (ValueError, KeyError, TypeError) as error:
            logger.warning(f"{file} cannot be read ({error!r}); the history goes on without its singular values")
    return []


def _input(task: Task) -> str:
    if "num_channels" not in task.model_kwargs:
        return "tokens"
    return "pixels" if task.name in PIXEL_TASKS else "values"


def _describe_tokenizer(tokenizer: Any) -> dict[str, Any] | None:
    if tokenizer is None:
        return None
    name = getattr(tokenizer, "name_or_path", None)
    return {"name": public(name) or None, "class": type(tokenizer).__name__, "vocabulary": len(tokenizer)}


def _is_path(text: str) -> bool:
    parts = text.split("/")
    return len(parts) > 2 or parts[0] in ("", ".", "..", "~") or (len(parts) > 1 and Path(text).exists())
