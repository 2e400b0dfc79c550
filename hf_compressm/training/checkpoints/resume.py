"""Loading checkpoints of another size into a live model, and the callback's own file in a checkpoint folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...files import new_file
from ...surgery import check_fixed_tensors, resize_mixers, sizes_in_state_dict, unwrap_optimizer
from ...surgery.record_keys import STATE_FILE
from ..trainer_log import running_trainer


def attach_resizing(model: nn.Module) -> None:
    """Let `model.load_state_dict` give mixers the sizes of what is loaded, smaller or larger, until `detach_resizing`.

    It makes `resume_from_checkpoint` work with a model built at its original size, and `load_best_model_at_end` with
    a best checkpoint from before a cut, sharded or not. The hook holds nothing, so the model can be copied and pickled.
    """
    if not _attached(model):
        model.register_load_state_dict_pre_hook(_resize)


def detach_resizing(model: nn.Module) -> None:
    """Undo `attach_resizing`, whoever called it, and for a model that is a copy of another."""
    for key in _attached(model):
        del model._load_state_dict_pre_hooks[key]


def resize_every_load(trainer: Trainer) -> None:
    """Attach the hook before each `resume_from_checkpoint` of this Trainer: there is no event between the making of a
    model by `model_init`, or an earlier `train`, and the loading.

    Weights that transformers saves under other names than it trains with are loaded too, here and for the best model;
    the Trainer alone passes over them.
    """
    if not isinstance(trainer._load_from_checkpoint, _LoadResized):
        trainer._load_from_checkpoint = _LoadResized(trainer, trainer._load_from_checkpoint)  # type: ignore[method-assign]
        trainer._load_best_model = _LoadResized(trainer, trainer._load_best_model)  # type: ignore[method-assign]


class _LoadResized:
    def __init__(self, trainer: Trainer, load: Callable[..., Any]):
        self.trainer, self.load = trainer, load

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.trainer.model
        attach_resizing(model)
        best = self.trainer.state.best_model_checkpoint
        folder = args[0] if args else kwargs.get("resume_from_checkpoint", best)
        converted = None if folder is None else converted_weights(model, folder)
        return self.load(*args, **kwargs) if converted is None else model.load_state_dict(converted)


def converted_weights(model: nn.Module, folder: str | os.PathLike[str]) -> dict[str, Tensor] | None:
    """A checkpoint's weights by the model's own names, if they were saved under others; None if they were not.

    Raises:
        ValueError: if weights are missing.
    """
    names = saved_names(folder)
    if not isinstance(model, PreTrainedModel) or not names - model.state_dict().keys():
        return None
    loaded: Any = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    if missing := sorted(loaded[1]["missing_keys"]):
        raise ValueError(f"the checkpoint {folder} lacks {', '.join(missing[:4])} of the {type(model).__name__}")
    return dict(loaded[0].state_dict())


def saved_names(folder: str | os.PathLike[str]) -> set[str]:
    """Names of the tensors in a checkpoint's safetensors files; empty if there are none."""
    index, whole = Path(folder) / SAFE_WEIGHTS_INDEX_NAME, Path(folder) / SAFE_WEIGHTS_NAME
    if whole.is_file():
        with safe_open(whole, framework="pt") as file:
            return set(file.keys())
    return set(json.loads(index.read_text())["weight_map"]) if index.is_file() else set()


def _attached(model: nn.Module) -> list[int]:
    return [key for key, hook in model._load_state_dict_pre_hooks.items() if getattr(hook, "hook", None) is _resize]


def _resize(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    try:
        check_fixed_tensors(module, state_dict, prefix)
    except ValueError as error:
        raise ValueError(f"the weights are of another model: {error}. Build it as it was trained.") from error
    trainer = running_trainer()
    optimizer = trainer.optimizer if trainer is not None and trainer.model is module else None
    sizes = sizes_in_state_dict(module, state_dict, prefix)
    resize_mixers(module, sizes, None if optimizer is None else unwrap_optimizer(optimizer))


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the running Trainer writes the checkpoint of the present step."""
    trainer = running_trainer()
    run = args.output_dir if trainer is None else trainer._get_output_dir(trial=getattr(trainer, "_trial", None))
    return Path(str(run)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def save_callback_state(folder: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write a tree of dicts, lists, tensors and JSON values into a checkpoint folder, as one safetensors file."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_without_tensors(state, tensors))
    target = Path(folder) / STATE_FILE
    with new_file(target, durable=True) as partial:
        save_file(tensors, partial, metadata={"tree": tree})


def load_callback_state(folders: list[str | os.PathLike[str]]) -> dict[str, Any] | None:
    """Read what `save_callback_state` wrote from the first of the folders that has it; None if none does.

    Raises:
        ValueError: if the file is damaged.
    """
    path = next((path for path in (Path(folder) / STATE_FILE for folder in folders) if path.is_file()), None)
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
