"""Loading checkpoints of another size into a live model, and the callback's own file in a checkpoint folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..surgery import resize_mixers, sizes_in_state_dict, unwrap_optimizer

logger = logging.get_logger(__name__)

STATE_NAME = "compression_state.pt"


class ResizeOnLoad:
    """A load hook that gives a model's mixers the sizes of the checkpoint being loaded, smaller or larger.

    It makes `resume_from_checkpoint` work with a model built at its original size, and `load_best_model_at_end` with
    a best checkpoint from before a cut, sharded or not.

    Attributes:
        optimizer: optimizer that must learn of replaced parameters, if there is one already.
    """

    def __init__(self, model: nn.Module, optimizer: Any = None):
        self.optimizer = optimizer
        self._handle = model.register_load_state_dict_pre_hook(self._resize)

    def remove(self) -> None:
        """Detach from the model."""
        self._handle.remove()

    def _resize(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        sizes = sizes_in_state_dict(module, state_dict, prefix)
        resize_mixers(module, sizes, None if self.optimizer is None else unwrap_optimizer(self.optimizer))


def verify_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Check that a checkpoint's weights are whole and have the sizes that its config speaks of.

    Only file headers are read.

    Raises:
        FileNotFoundError: if the folder lacks a config or safetensors weights.
        ValueError: if a weight file is damaged, or a tensor's shape disagrees with the config's `state_sizes`; the
            message names the file or tensor.
    """
    from transformers import AutoConfig, AutoModel

    folder = Path(folder)
    for name in (CONFIG_NAME,):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}; it is not a complete checkpoint")
    shapes = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118  not a dict
                    shapes[key] = torch.empty(weights.get_slice(key).get_shape(), device="meta")
        except Exception as error:
            raise ValueError(f"{file} cannot be read: {error}. Use another checkpoint.") from error
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    prefix = f"{model.base_model_prefix}."
    prefix = prefix if any(key.startswith(prefix) for key in shapes) else ""
    wrong = [
        f"{prefix}{name} is {tuple(shapes[prefix + name].shape)}, the config wants {tuple(tensor.shape)}"
        for name, tensor in model.state_dict().items()
        if prefix + name in shapes and shapes[prefix + name].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(
            f"the tensors in {folder} disagree with its {CONFIG_NAME}: {'; '.join(wrong[:4])}"
            f"{f' and {len(wrong) - 4} more' if len(wrong) > 4 else ''}. Restore the {CONFIG_NAME} that was saved with "
            "them, or use another checkpoint."
        )


def _weight_files(folder: Path) -> list[Path]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = [folder / SAFE_WEIGHTS_NAME]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no {file.name}; it is not a complete checkpoint")
    return files


def save_callback_state(folder: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write the callback's tensors into a checkpoint folder: a temporary name first, so that no half file is read."""
    target = Path(folder) / STATE_NAME
    partial = target.with_suffix(".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, target)


def load_callback_state(folders: list[str | os.PathLike[str]]) -> dict[str, Any] | None:
    """Read the callback's tensors from the first of the folders that has them; None if none does."""
    for folder in folders:
        path = Path(folder) / STATE_NAME
        if path.is_file():
            return torch.load(path, map_location="cpu", weights_only=True)
    return None
