"""What a checkpoint holds of the compression callback: its entry in the Trainer's state, and a file of tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from ...files import new_file
from ...surgery import record_keys as keys
from ...surgery.wrappers import class_name, uncompiled
from .reading import message_of, read_trainer_state


def checkpoint_folder(trainer: Any, args: TrainingArguments, state: TrainerState) -> Path:
    """The folder in which a Trainer writes the checkpoint of the present step."""
    run = args.output_dir if trainer is None else trainer._get_output_dir(trial=getattr(trainer, "_trial", None))
    return Path(str(run)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def exported_state(folder: str | os.PathLike[str], name: str) -> Any:
    """What a callback of this name exported into a checkpoint; None if it did not.

    Raises:
        FileNotFoundError, ValueError: the Trainer's state is missing or damaged.
    """
    callbacks: Any = read_trainer_state(Path(folder)).stateful_callbacks
    return callbacks.get(name)


def read_exported(exported: Any) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The compression history, and the cut that is still to be judged, from what the callback exported.

    Raises:
        ValueError: if it is not what a callback exports.
    """
    try:
        saved = keys.saved_in(exported)
        records, judging = saved["history"], saved["judging"]
        check_records(records)
        if judging is not None:
            numbers = [judging["step"], judging["reference"], *([judging["value"]] if judging["undo"] else [])]
            if not all(isinstance(number, (int, float)) for number in numbers):
                raise TypeError(f"numbers expected, got {numbers}")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the compression callback's entry in {TRAINER_STATE_NAME} is malformed: {message_of(error)}. Use another "
            "checkpoint."
        ) from error
    return records, judging


def check_records(records: list[dict[str, Any]]) -> None:
    """Check that every change of size on record names layers and their sizes.

    Raises:
        KeyError, TypeError: if one does not.
    """
    for record in records:
        if record["event"] in ("cut", "undo"):
            _ = [(layer["name"], layer["new_size"]) for layer in record["layers"]]


def save_callback_state(folder: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write a tree of dicts, lists, tensors and JSON values into a checkpoint folder, as one safetensors file."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_without_tensors(state, tensors))
    target = Path(folder) / keys.STATE_FILE
    with new_file(target, durable=True) as partial:
        save_file(tensors, partial, metadata={"tree": tree})


def save_record(folder: str | os.PathLike[str], settings: Mapping[str, Any], records: list[dict[str, Any]]) -> None:
    """Write the full compression history beside a model whose config keeps a short one, whole or not at all."""
    with new_file(Path(folder) / keys.RECORD_FILE, durable=True) as partial:
        partial.write_text(json.dumps({"settings": dict(settings), "history": records}, indent=2) + "\n")


def save_missing_config(folder: str | os.PathLike[str], model: Any) -> None:
    """Write the config, with state sizes and history, into a checkpoint of shards, where the Trainer writes none."""
    if not isinstance(uncompiled(model), PreTrainedModel) or (Path(folder) / CONFIG_NAME).exists():
        return
    model.config.dtype = str(model.dtype).rpartition(".")[2]
    model.config.architectures = [class_name(model)]
    model.config.save_pretrained(folder)


def load_callback_state(folders: list[str | os.PathLike[str]]) -> dict[str, Any] | None:
    """Read what `save_callback_state` wrote from the first of the folders that has it; None if none does.

    Raises:
        ValueError: if the file is damaged.
    """
    path = next((path for path in (Path(folder) / keys.STATE_FILE for folder in folders) if path.is_file()), None)
    if path is None:
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
            return dict(_with_tensors(json.loads(file.metadata()["tree"]), tensors))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}. Use another checkpoint, or remove the file to go on without the copy of "
            "the model for rollback_metric and the record of the ranking that it holds."
        ) from error


def _without_tensors(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """A JSON-ready copy of a tree, whose tensors go to `tensors`; dicts become lists of items, for keys may be int."""
    if isinstance(tree, Tensor):
        key = str(len(tensors))
        plain = tree.detach().cpu().resolve_conj()
        tensors[key] = (torch.view_as_real(plain) if plain.is_complex() else plain).contiguous()
        return {"tensor": key, "complex": plain.is_complex()}
    if isinstance(tree, Mapping):
        return {"items": [[key, _without_tensors(value, tensors)] for key, value in tree.items()]}
    if isinstance(tree, (list, tuple)):
        return [_without_tensors(value, tensors) for value in tree]
    return tree


def _with_tensors(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_with_tensors(value, tensors) for value in tree]
    if isinstance(tree, dict):
        if "tensor" in tree:
            found = tensors[tree["tensor"]]
            return torch.view_as_complex(found) if tree["complex"] else found
        return {key: _with_tensors(value, tensors) for key, value in tree["items"]}
    return tree
