"""Load checkpoints of another size into a live model: its mixers are resized before its weights are loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...surgery import check_fixed_tensors, resize_mixers, set_history, sizes_in_state_dict, unwrap_optimizer
from ...surgery.record_keys import HISTORY
from ...surgery.shards import is_sharded
from ...surgery.wrappers import plain_name
from ..trainer_log import running_trainer
from .reading import read_weight_shapes
from .sharded_loading import load_moments, load_weights


def attach_resizing(model: nn.Module) -> None:
    """Make `model.load_state_dict` resize mixers to what is loaded, smaller or larger, until `detach_resizing`.

    It makes `resume_from_checkpoint` work with a model built at its original size, and `load_best_model_at_end` with
    a best checkpoint from before a cut, sharded or not. The hook holds nothing, so the model can be copied and pickled.
    """
    if not _attached(model):
        model.register_load_state_dict_pre_hook(_resize)


def detach_resizing(model: nn.Module) -> None:
    """Undo `attach_resizing`, whoever called it, and for a model that is a copy of another."""
    for key in _attached(model):
        del model._load_state_dict_pre_hooks[key]


def resize_to_checkpoint(model: nn.Module, folder: str | os.PathLike[str], optimizer: Any = None) -> None:
    """Give a model of another size, and its optimizer, the sizes of a checkpoint of a loop without the Trainer.

    Call it before `accelerator.load_state(folder)`, which loads into what is there; best before `accelerator.prepare`.
    The parameters that change have no values until then. If a `config.json` lies in the folder, the model's config
    learns the compression history in it.

    Args:
        model: as it was built for the run, at its original size or any other.
        folder: what `accelerator.save_state` wrote, with safetensors.
        optimizer: of the model, wrapped or not; None if there is none.

    Raises:
        FileNotFoundError: if the folder holds no weights.
        ValueError: if a file is damaged, or the weights are of another model.
        TypeError: if the optimizer's state cannot be carried.
    """
    config = Path(folder) / CONFIG_NAME
    shapes = {plain_name(name): shape for name, shape in read_weight_shapes(Path(folder)).items()}
    prefix = "module." if all(name.startswith("module.") for name in shapes) else ""
    try:
        check_fixed_tensors(model, shapes, prefix)
    except ValueError as error:
        raise ValueError(f"the weights are of another model: {error}. Build it as it was trained.") from error
    sizes = sizes_in_state_dict(model, shapes, prefix)
    records = json.loads(config.read_text()).get(HISTORY) if config.is_file() else None
    resize_mixers(model, sizes, None if optimizer is None else unwrap_optimizer(optimizer))
    if records:
        set_history(model, records)


def resize_every_load(trainer: Trainer) -> None:
    """Attach the hook before each `resume_from_checkpoint` of this Trainer.

    No event comes between the making of a model by `model_init`, or the end of an earlier `train`, and the loading.
    Weights that transformers saves under other names than it trains with are loaded too, here and for the best model;
    the Trainer alone ignores them.
    """
    if not isinstance(trainer._load_from_checkpoint, _LoadResized):
        trainer._load_from_checkpoint = _LoadResized(trainer, trainer._load_from_checkpoint)  # type: ignore[method-assign]
        trainer._load_best_model = _LoadResized(trainer, trainer._load_best_model)  # type: ignore[method-assign]
        trainer._load_optimizer_and_scheduler = _LoadMoments(  # type: ignore[method-assign]
            trainer, trainer._load_optimizer_and_scheduler
        )


class _LoadResized:
    def __init__(self, trainer: Trainer, load: Callable[..., Any]):
        self.trainer, self.load = trainer, load

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.trainer.model
        attach_resizing(model)
        best = self.trainer.state.best_model_checkpoint
        folder = args[0] if args else kwargs.get("resume_from_checkpoint", best)
        if folder is not None and is_sharded(model):
            return load_weights(self.trainer, Path(folder), lambda: self.load(*args, **kwargs))
        converted = None if folder is None else converted_weights(model, folder)
        return self.load(*args, **kwargs) if converted is None else model.load_state_dict(converted)


class _LoadMoments:
    def __init__(self, trainer: Trainer, load: Callable[..., Any]):
        self.trainer, self.load = trainer, load

    def __call__(self, checkpoint: str | None) -> Any:
        model: Any = self.trainer.model
        if checkpoint is None or not is_sharded(model):
            return self.load(checkpoint)
        return load_moments(self.trainer, Path(checkpoint), lambda: self.load(checkpoint))


def converted_weights(model: nn.Module, folder: str | os.PathLike[str]) -> dict[str, Tensor] | None:
    """A checkpoint's weights (shape of the parameter) by the model's own names, if saved under others; None if not.

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
    if is_sharded(module):  # resized before its state dict was made, on all ranks; see `load_weights`
        return
    trainer = running_trainer()
    optimizer = trainer.optimizer if trainer is not None and trainer.model is module else None
    sizes = sizes_in_state_dict(module, state_dict, prefix)
    resize_mixers(module, sizes, None if optimizer is None else unwrap_optimizer(optimizer))
